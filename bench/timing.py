"""Interleaved timing: every arm once a round, round after round, so that a drift of the machine meets all arms alike.

Samples are seconds of one call, taken by an arm's :class:`Sampler` (:mod:`bench.samplers`). Ratios of arms are taken
within a round, then their distribution over rounds: a ratio of medians would mix rounds at different clocks.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

Watch = Callable[[str], AbstractContextManager[object]]
Running = Callable[[], AbstractContextManager[object]]
L2 = Literal["cold", "warm"]
Method = Literal["event", "graph", "wall"]

ROUNDS = 7
BURST_S = 20e-3  # of one arm in one round
REST = 1.0  # of an arm's time the GPU idles after it: products back to back run into the power limit


class Spread(NamedTuple):
    """A distribution by its median and what surrounds it."""

    median: float
    p20: float
    p80: float
    min: float
    mean: float
    stdev: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quantiles are interpolated."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        below = int(at)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (at - below) * (ordered[above] - ordered[below])

    deviation = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    mean = min(max(statistics.fmean(ordered), ordered[0]), ordered[-1])
    return Spread(quantile(0.5), quantile(0.2), quantile(0.8), ordered[0], mean, deviation)


@dataclass(frozen=True)
class Times:
    """What one arm took.

    Attributes:
        method: how it was timed.
        l2: state of the L2 cache before a call.
        warmup: calls before the first sample.
        iters: calls behind one sample.
        rounds: the samples of each round, seconds of one call.
        host_s: time until a call returns to the host; None where a graph replays it.
        rest: how long the GPU idled after an arm's turn, in lengths of that turn.
    """

    method: Method
    l2: L2
    warmup: int
    iters: int
    rounds: tuple[tuple[float, ...], ...]
    host_s: float | None
    rest: float = REST

    @property
    def seconds(self) -> Spread:
        return spread([sample for samples in self.rounds for sample in samples])

    def ratios(self, other: "Times") -> Spread:
        """The other arm's time over this one's, round by round: above 1 where this arm is faster."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return spread([statistics.median(theirs) / statistics.median(own) for own, theirs in pairs])


class Sampler(Protocol):
    """Times one arm: a call of :meth:`sample` is its turn in one round."""

    method: Method
    l2: L2
    warmup: int
    iters: int
    host_s: float | None

    def burst(self, seconds: float) -> None:
        """How long a turn takes from now on; :data:`BURST_S` at first."""

    def sample(self, running: Running = nullcontext) -> tuple[float, ...]:
        """Seconds of one call, several times; the GPU is at the timed calls, and at nothing else, in ``running()``."""


def interleave(
    samplers: Mapping[str, Sampler],
    rounds: int = ROUNDS,
    watch: Watch | None = None,
    active: Watch | None = None,
    rest: float = REST,
) -> dict[str, Times]:
    """Sample every arm once a round: A B C, A B C ...

    Args:
        samplers: by arm.
        rounds: how often.
        watch: makes a context in which an arm's timed calls run, for clocks.
        active: makes a context around all of an arm's turn.
        rest: idle time after a turn, in lengths of the turn.
    """
    taken: dict[str, list[tuple[float, ...]]] = {arm: [] for arm in samplers}
    for _ in range(rounds):
        for arm, sampler in samplers.items():
            running = partial(watch, arm) if watch is not None else nullcontext
            with stopwatch() as seconds, active(arm) if active is not None else nullcontext():
                taken[arm].append(sampler.sample(running))
            if sampler.method != "wall":
                time.sleep(rest * seconds())
    return {
        arm: Times(sampler.method, sampler.l2, sampler.warmup, sampler.iters, tuple(taken[arm]), sampler.host_s, rest)
        for arm, sampler in samplers.items()
    }


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start
