"""Where a captured block's time goes: its kernels one by one, and what is left between them.

A CUDA graph has no host in it, so what the kernels' own times leave of the replay is launch latency, dependencies and
tails. The profiler stretches gaps but not kernels: the replay is timed without it, the kernels with it, both in bursts
of one length behind the same rest, so that clocks are the same. The holes of the trace, from one kernel's end to the
next one's start, are the other bound: clocks do not enter them, the profiler does.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from reelforge.bench import samplers

_BURST_S, _MIN_REPLAYS, _MAX_REPLAYS = 20e-3, 3, 30
_REST_S = 0.2  # the power limit's average forgets what was before
_LEAD_S = 2e-3  # until the host has launched the replays
_SPIN = "spin_kernel"  # torch's, of that lead
_NOISE = re.compile(r"void |at::native::|\(anonymous namespace\)::|<.*|\(.*")


@dataclass(frozen=True)
class Launch:
    """A kernel in the trace, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in one replay."""

    name: str
    launches: int
    us: float


@dataclass(frozen=True)
class Breakdown:
    """One replay.

    Attributes:
        replay_us: without the profiler.
        kernels: the longest first.
        holes_us: in which no kernel ran, with the profiler.
    """

    replay_us: float
    kernels: tuple[KernelTime, ...]
    holes_us: float

    @property
    def busy_us(self) -> float:
        return sum(kernel.us for kernel in self.kernels)

    @property
    def gap(self) -> float:
        """Share of the replay that its kernels leave."""
        return max(0.0, 1.0 - self.busy_us / self.replay_us)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    def markdown(self, title: str) -> str:
        """A section with a row a kernel."""
        head = (
            f"### {title}\n\n{self.launches} kernels take {self.busy_us:.1f} of {self.replay_us:.1f} us: "
            f"{100 * self.gap:.1f} % of a replay lies between them. In the trace, which the profiler stretches, "
            f"{self.holes_us:.1f} us lie between one's end and the next one's start.\n\n"
            "| kernel | launches | us | share |\n| --- | --: | --: | --: |\n"
        )
        rows = [
            f"| `{kernel.name}` | {kernel.launches} | {kernel.us:.1f} | {100 * kernel.us / self.replay_us:.1f} % |"
            for kernel in self.kernels
        ]
        return head + "\n".join(rows) + "\n"


def breakdown(replay: Callable[[], object], replay_s: float) -> Breakdown | None:
    """Time and profile ``replay``, of about ``replay_s``; None where the profiler sees no kernels (no CUPTI)."""
    replay()  # which may capture it
    replays = max(_MIN_REPLAYS, min(_MAX_REPLAYS, round(_BURST_S / replay_s)))
    seconds = _burst(replay, replays)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        _burst(replay, replays)
    found = [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == DeviceType.CUDA and _SPIN not in event.name
    ]
    return summarise(found, seconds, replays) if found else None


def _burst(replay: Callable[[], object], replays: int) -> float:
    """Seconds of one replay."""
    torch.cuda.synchronize()
    time.sleep(_REST_S)
    return samplers.between_events(replay, replays, _LEAD_S)


def summarise(launches: Sequence[Launch], replay_s: float, replays: int) -> Breakdown:
    """All kernels of ``replays`` replays to one replay."""
    by_name: dict[str, list[float]] = {}
    for launch in launches:
        by_name.setdefault(short_name(launch.name), []).append(launch.end - launch.start)
    kernels = [KernelTime(name, round(len(times) / replays), sum(times) / replays) for name, times in by_name.items()]
    longest_first = tuple(sorted(kernels, key=lambda kernel: -kernel.us))
    return Breakdown(1e6 * replay_s, longest_first, _holes(launches) / replays)


def _holes(launches: Sequence[Launch]) -> float:
    """Microseconds between the first launch and the last in which none ran."""
    ordered = sorted(launches, key=lambda launch: launch.start)
    total, end = 0.0, ordered[0].end
    for launch in ordered[1:]:
        total += max(0.0, launch.start - end)
        end = max(end, launch.end)
    return total


def short_name(name: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters, at most 60 characters."""
    return (_NOISE.sub("", name).strip() or name)[:60]
