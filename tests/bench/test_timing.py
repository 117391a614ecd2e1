"""Interleaving, spreads and ratios; the CUDA samplers against a GPU that is played by the host's clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from reelforge.bench import samplers, timing

CPU = torch.device("cpu")


class Scripted:
    """A sampler whose times are given, round by round."""

    method: timing.Method = "event"
    l2: timing.L2 = "cold"
    warmup, iters, host_s = 3, 1, None

    def __init__(self, name: str, seconds: list[float], order: list[str]) -> None:
        self._name, self._seconds, self._order = name, iter(seconds), order

    def burst(self, seconds: float) -> None:
        raise AssertionError("nobody asked for it")

    def sample(self, running: timing.Running = nullcontext) -> tuple[float, ...]:
        self._order.append(self._name)
        with running():
            return (next(self._seconds),)


def test_arms_take_turns_and_each_is_watched() -> None:
    order: list[str] = []
    watched: list[str] = []

    active: list[str] = []

    @contextmanager
    def watch(arm: str) -> Iterator[None]:
        assert active[-1] == arm == order[-1], "inside the arm's turn"
        watched.append(arm)
        yield

    @contextmanager
    def activate(arm: str) -> Iterator[None]:
        active.append(arm)
        yield

    arms = {name: Scripted(name, [1e-6] * 3, order) for name in "abc"}
    times = timing.interleave(arms, 3, watch, activate)
    assert order == watched == active == list("abcabcabc")
    assert [len(times[name].rounds) for name in "abc"] == [3, 3, 3]


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down threefold in the middle: ratios of medians would not notice that b always takes double.
    order: list[str] = []
    arms = {
        "a": Scripted("a", [1.0, 1.0, 3.0, 3.0, 3.0], order),
        "b": Scripted("b", [2.0, 2.0, 6.0, 6.0, 6.0], order),
    }
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    times = timing.interleave(arms, 5)
    ratio = times["a"].ratios(times["b"])
    assert ratio.median == ratio.p20 == ratio.p80 == 2.0
    assert times["a"].seconds.median == 3.0


def test_the_rest_is_in_lengths_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = iter(range(100))
    clock = SimpleNamespace(sleep=slept.append, perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(timing, "time", clock)
    times = timing.interleave({"a": Scripted("a", [1e-6] * 2, [])}, 2, rest=8.0)
    assert slept == [8.0, 8.0] and times["a"].rest == 8.0


def test_spread_interpolates_and_stays_in_order() -> None:
    spread = timing.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.p20, spread.p80, spread.min, spread.mean) == (3.0, 1.8, 4.2, 1.0, 3.0)
    alone = timing.spread([0.1])
    assert alone.min == alone.p20 == alone.median == alone.p80 == alone.mean and alone.stdev == 0.0


def test_wall_sampler_times_a_sleep() -> None:
    sampler = samplers.sampler(lambda: time.sleep(0.004), CPU, "warm")
    times = timing.interleave({"sleep": sampler}, 5)["sleep"]
    assert times.method == "wall" and len(times.rounds) == 5
    assert 0.004 <= times.seconds.min <= times.seconds.median
    assert times.host_s is not None and times.host_s >= 0.004


# -- the CUDA samplers on a GPU whose time passes only while it works -------------------------------------------------


class Gpu:
    """What the samplers use of torch.cuda; the host's launches take no time of their own.

    Attributes:
        now: seconds.
        spins, flushes, calls: what was asked of it.
        awaited: events that the host waited for.
        synced: calls when the host last waited for all of it.
        capturing: calls of the graph that is being captured.
        refuses: what it does with calls that synchronise.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.spins: list[int] = []
        self.flushes = self.calls = self.synced = 0
        self.awaited: list[object] = []
        self.refuses: int | str = 0
        self.capturing: list[Callable[[], None]] | None = None

    def zero_(self) -> None:
        """As the buffer that is overwritten: takes time outside the pair of events."""
        self.flushes += 1
        self.now += 5e-5

    def call(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.calls += 1
            self.now += seconds

        return lambda: work() if self.capturing is None else self.capturing.append(work)

    def synchronize(self, device: object = None) -> None:
        self.synced = self.calls

    def refuse(self, mode: int | str) -> None:
        self.refuses = mode

    @contextmanager
    def capture(self, graph: "Graph", capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.capturing = graph.calls
        yield
        self.capturing = None


class Graph:
    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = made.now

        def synchronize(self) -> None:
            made.awaited.append(self)

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.at - self.at)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": made.capture,
        "synchronize": made.synchronize,
        "get_sync_debug_mode": lambda: made.refuses,
        "set_sync_debug_mode": made.refuse,
        "_sleep": made.spins.append,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda used: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(samplers, "flush_buffer", lambda device: made)
    monkeypatch.setattr(samplers, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


CUDA = SimpleNamespace(type="cuda")


def test_cold_flushes_before_every_call_and_times_only_the_call(gpu: Gpu) -> None:
    sampler = samplers.sampler(gpu.call(2e-3), CUDA, "cold")
    assert (sampler.method, sampler.l2, sampler.iters) == ("event", "cold", 1)
    seconds = sampler.sample()
    assert gpu.flushes == len(seconds) == 10 and seconds == pytest.approx([2e-3] * 10)
    assert gpu.spins[-1] >= 10 * 2e-3 * 1.98e9, "the spin covers the host's launches"


def test_long_warm_calls_are_timed_by_one_pair_of_events(gpu: Gpu) -> None:
    sampler = samplers.sampler(gpu.call(1e-3), CUDA, "warm")
    assert isinstance(sampler, samplers.WarmSampler) and sampler.iters == 20
    before = gpu.calls
    assert sampler.sample() == (pytest.approx(1e-3),)
    assert gpu.calls - before == 20 and sampler.host_s == pytest.approx(1e-3)


def test_short_warm_calls_are_captured_in_a_graph(gpu: Gpu) -> None:
    sampler = samplers.sampler(gpu.call(4e-6), CUDA, "warm")
    assert sampler.method == "graph" and sampler.host_s is None and sampler.iters == 250
    before = gpu.calls
    assert sampler.sample() == (pytest.approx(4e-6),)
    assert (gpu.calls - before) % 250 == 0, "whole graphs are replayed"


def test_what_a_graph_does_not_take_is_timed_by_events(gpu: Gpu) -> None:
    assert samplers.sampler(gpu.call(2e-5), CUDA, "warm", graph=False).method == "event"


@pytest.mark.parametrize(("seconds", "l2"), [(2e-3, "cold"), (1e-3, "warm"), (4e-6, "warm")])
def test_clocks_are_watched_from_the_first_event_on(gpu: Gpu, seconds: float, l2: timing.L2) -> None:
    sampler = samplers.sampler(gpu.call(seconds), CUDA, l2)
    gpu.awaited.clear()
    seen: list[tuple[int, bool]] = []

    @contextmanager
    def running() -> Iterator[None]:
        seen.append((len(gpu.awaited), gpu.synced < gpu.calls))
        yield
        assert gpu.synced == gpu.calls, "the work ends inside"

    sampler.sample(running)
    assert seen == [(1, True)], "behind the spin, with the work still to be waited for"


@pytest.mark.parametrize(("seconds", "l2", "share"), [(1e-3, "cold", 5), (1e-3, "warm", 5), (4e-6, "warm", 5 * 250)])
def test_a_turn_can_be_shortened(gpu: Gpu, seconds: float, l2: timing.L2, share: int) -> None:
    sampler = samplers.sampler(gpu.call(seconds), CUDA, l2)
    sampler.burst(5e-3)
    before = gpu.calls
    assert sampler.sample() == pytest.approx((seconds,) * (share if l2 == "cold" else 1))
    assert gpu.calls - before == share


def test_the_warm_up_waits_for_the_gpu_and_takes_its_time(gpu: Gpu) -> None:
    calls: list[bool] = []

    def call() -> None:
        calls.append(gpu.synced == gpu.calls)
        gpu.call(1e-4)()

    assert samplers._warm_up(call, gpu.synchronize) == len(calls) >= 499 and all(calls)


def test_a_call_that_synchronises_is_not_captured(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: captured.append(graph))
    work = gpu.call(2e-5)

    def call() -> None:
        if gpu.refuses == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        work()

    assert samplers.sampler(call, CUDA, "warm").method == "event"
    assert not captured and gpu.refuses == 0, "and it may synchronise again"


def test_a_capture_that_fails_falls_back_to_events(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Graph, capture_error_mode: str) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert samplers.sampler(gpu.call(2e-5), CUDA, "warm").method == "event"


def test_a_spin_is_bounded(gpu: Gpu) -> None:
    samplers.spin(10.0)
    assert gpu.spins == [pytest.approx(0.05 * 1.98e9, abs=2)]
