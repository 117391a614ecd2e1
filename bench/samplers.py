"""How one arm's calls are timed.

    cold    L2 is overwritten before every call, outside the pair of events around it. Overwritten rather than read:
            the call then pays for writing back the dirty lines it evicts, as much as it leaves behind itself, so its
            bytes over its time is a bandwidth.
    warm    one pair of events around many calls on the same operands
    graph   many launches captured in one CUDA graph, for calls that are over before the host can launch the next
    wall    the host's clock, on a CPU

Work behind an event pair waits for a short spin of the GPU, so the host is always ahead and its launch times stay out.
Clocks are watched from the first event on: a spinning GPU draws little and would hide that the work is held down.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from reelforge.bench.timing import BURST_S, L2, Method, Running, Sampler

Call = Callable[[], object]

GRAPH_BELOW_S = 300e-6  # host launch times of an op reach 100 us
_MAX_CALLS = 30  # of an arm in a turn: a queue of launches that stays below CUDA's limit for eager chains too
_GRAPH_S, _MAX_LAUNCHES = 1e-3, 500  # of one graph: what lies between two replays must not count
_WARM_UP_S, _WARM_UP_CALLS = 0.05, 3
_SPIN_CLOCK_HZ = 1.98e9
_MAX_SPIN_S = 0.05


def sampler(call: Call, device: torch.device, l2: L2, *, graph: bool = True) -> Sampler:
    """Warm ``call`` up and choose how to time it.

    Args:
        call: launches the work; its result is dropped.
        device: where it runs.
        l2: cold or warm; a CPU's caches are what they are.
        graph: short warm calls may be captured; False for calls that CUDA graphs do not take.
    """
    if device.type != "cuda":
        return WallSampler(call, l2)
    if l2 == "cold":
        return ColdSampler(call, device)
    warm = WarmSampler(call)
    if not graph or warm.call_s >= GRAPH_BELOW_S:
        return warm
    try:
        return GraphSampler(call, warm)
    except RuntimeError:  # it copies from the host, or synchronises
        torch.cuda.synchronize()
        return warm


class WallSampler:
    """Host clock around single calls, for work that is done when the call returns."""

    method: Method = "wall"
    iters = 1

    def __init__(self, call: Call, l2: L2 = "warm") -> None:
        self._call, self.l2 = call, l2
        self.warmup = _warm_up(call, lambda: None)
        self._call_s = _wall(call)
        self.host_s: float | None = self._call_s
        self.burst(BURST_S)

    def burst(self, seconds: float) -> None:
        self._calls = _calls(self._call_s, seconds)

    def sample(self, running: Running = nullcontext) -> tuple[float, ...]:
        with running():
            return tuple(_wall(self._call) for _ in range(self._calls))


class ColdSampler:
    """A pair of CUDA events around every single call, L2 overwritten in front of each."""

    method: Method = "event"
    l2: L2 = "cold"
    iters = 1

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call, self._device = call, device
        self.warmup = _warm_up(call, torch.cuda.synchronize)
        self._lead_s = _launch_s(call)
        self.host_s: float | None = self._lead_s
        self._call_s = between_events(call, 3, 3 * self._lead_s)
        self.burst(BURST_S)

    def burst(self, seconds: float) -> None:
        self._calls = _calls(self._call_s, seconds)

    def sample(self, running: Running = nullcontext) -> tuple[float, ...]:
        cache = flush_buffer(self._device)
        pairs = [(_event(), _event()) for _ in range(self._calls)]
        spin(self._calls * (self._lead_s + 20e-6))  # the flush and the events take the host that long
        for start, end in pairs:
            cache.zero_()
            start.record()
            self._call()
            end.record()
        _wait(pairs[0][0], running)
        return tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)


class WarmSampler:
    """A pair of CUDA events around several calls."""

    method: Method = "event"
    l2: L2 = "warm"

    def __init__(self, call: Call) -> None:
        self._call = call
        self.warmup = _warm_up(call, torch.cuda.synchronize)
        self._lead_s = _launch_s(call)
        self.host_s: float | None = self._lead_s
        self.call_s = between_events(call, 5, 5 * self._lead_s)
        self.burst(BURST_S)

    def burst(self, seconds: float) -> None:
        self.iters = _calls(self.call_s, seconds)

    def sample(self, running: Running = nullcontext) -> tuple[float, ...]:
        return (between_events(self._call, self.iters, self.iters * self._lead_s, running),)


class GraphSampler:
    """Replays of a CUDA graph of several launches; the host takes no part in them."""

    method: Method = "graph"
    l2: L2 = "warm"
    host_s: float | None = None

    def __init__(self, call: Call, warm: WarmSampler) -> None:
        self.warmup = warm.warmup
        self.iters = max(_MAX_CALLS, min(_MAX_LAUNCHES, round(_GRAPH_S / warm.call_s)))
        self._replay = capture(call, self.iters).replay
        self._replay_s = self.iters * warm.call_s
        self._lead_s = _launch_s(self._replay)
        self.burst(BURST_S)

    def burst(self, seconds: float) -> None:
        self._replays = _calls(self._replay_s, seconds)

    def sample(self, running: Running = nullcontext) -> tuple[float, ...]:
        return (between_events(self._replay, self._replays, self._replays * self._lead_s, running) / self.iters,)


def capture(call: Call, launches: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``launches`` calls; what they allocate lives as long as the graph.

    Raises:
        RuntimeError: the call synchronises, which a capture does not take; it is found out before one begins, because
            a capture that fails leaves torch's state behind.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _refusing_syncs():
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that reads the clocks, must not end the capture. The outer context puts the stream
    # back, which torch 2.11 does not where a capture fails.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        for _ in range(launches):
            call()
    return graph


@contextmanager
def _refusing_syncs() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def flush_buffer(device: torch.device) -> Tensor:
    """Twice the L2 cache."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def spin(seconds: float) -> None:
    """Keep the GPU waiting while the host queues what comes next."""
    torch.cuda._sleep(int(min(seconds, _MAX_SPIN_S) * _SPIN_CLOCK_HZ) + 1)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _wait(start: torch.cuda.Event, running: Running) -> None:
    """Until the GPU is done, in ``running()`` from ``start`` on; all of its work is queued."""
    start.synchronize()
    with running():
        torch.cuda.synchronize()


def between_events(call: Call, calls: int, lead_s: float, running: Running = nullcontext) -> float:
    """Seconds of one of ``calls`` calls, launched behind a spin of ``lead_s``."""
    start, end = _event(), _event()
    spin(lead_s)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    _wait(start, running)
    return start.elapsed_time(end) / 1e3 / calls


def _launch_s(call: Call) -> float:
    """Seconds until a call returns while the GPU is idle."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        seconds.append(_wall(call))
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _warm_up(call: Call, synchronize: Call) -> int:
    """Run ``call`` until its work has taken a while; how often it ran."""
    calls, begin = 0, time.perf_counter()
    while calls < _WARM_UP_CALLS or time.perf_counter() - begin < _WARM_UP_S:
        call()
        synchronize()
        calls += 1
    return calls


def _calls(call_s: float, burst_s: float) -> int:
    """How many calls fill an arm's turn."""
    return max(1, min(_MAX_CALLS, round(burst_s / max(call_s, 1e-9))))
