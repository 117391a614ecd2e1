"""Where a captured block's time goes: its kernels one by one, and what is left between them.

A CUDA graph has no host in it, so what the kernels' own times leave of the replay is launch latency, dependencies and
tails. The profiler stretches gaps but not kernels: the replay is timed without it, the kernels with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REPLAYS = 3
_NOISE = re.compile(r"void |at::native::|\(anonymous namespace\)::|<.*|\(.*")


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
    """

    replay_us: float
    kernels: tuple[KernelTime, ...]

    @property
    def busy_us(self) -> float:
        return sum(kernel.us for kernel in self.kernels)

    @property
    def gap(self) -> float:
        """Share of the replay in which no kernel runs."""
        return max(0.0, 1.0 - self.busy_us / self.replay_us)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    def markdown(self, title: str) -> str:
        """A section with a row a kernel."""
        head = (
            f"### {title}\n\n{self.launches} kernels take {self.busy_us:.1f} of {self.replay_us:.1f} us: "
            f"{100 * self.gap:.1f} % of a replay lies between them.\n\n"
            "| kernel | launches | us | share |\n| --- | --: | --: | --: |\n"
        )
        rows = [
            f"| `{kernel.name}` | {kernel.launches} | {kernel.us:.1f} | {100 * kernel.us / self.replay_us:.1f} % |"
            for kernel in self.kernels
        ]
        return head + "\n".join(rows) + "\n"


def breakdown(replay: Callable[[], object], replay_s: float) -> Breakdown | None:
    """Profile ``replay``, which takes ``replay_s``; None where the profiler sees no kernels (no CUPTI)."""
    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.elapsed_us()) for event in trace.events() if event.device_type == DeviceType.CUDA
    ]
    return summarise(found, replay_s) if found else None


def summarise(events: Sequence[tuple[str, float]], replay_s: float, replays: int = REPLAYS) -> Breakdown:
    """Names and microseconds of all kernels of ``replays`` replays to one replay."""
    by_name: dict[str, list[float]] = {}
    for name, micro in events:
        by_name.setdefault(short_name(name), []).append(micro)
    kernels = [KernelTime(name, round(len(times) / replays), sum(times) / replays) for name, times in by_name.items()]
    return Breakdown(1e6 * replay_s, tuple(sorted(kernels, key=lambda kernel: -kernel.us)))


def short_name(name: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters, at most 60 characters."""
    return (_NOISE.sub("", name).strip() or name)[:60]
