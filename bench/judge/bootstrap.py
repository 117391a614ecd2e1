"""Intervals that respect the prompt: clips of one prompt are not independent, so prompts are resampled.

Percentile cluster bootstrap (Efron & Tibshirani 1993, ch. 13; Cameron, Gelbach & Miller 2008, pairs cluster):
draw as many prompts as there are, with replacement, keep every clip of a drawn prompt, recompute.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.engine.core.errors import DataError
from reelforge.engine.core.rng import generator

Floats = NDArray[np.float64]
Clips = NDArray[np.int64]  # clip indices, a repeated clip repeated
Labels = NDArray[Any]  # one prompt id per clip

RESAMPLES = 10_000
SET_RESAMPLES = 300  # set-level scores cost a full evaluation per draw
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Floats, prompts: Labels, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Mean over clips with a 95 % interval over prompts.

    Args:
        values: ``[N]``, one score per clip; NaN is a missing score and is left out.
        prompts: ``[N]``, the clip's prompt id.
        seed: names the draw; equal seeds give equal intervals.

    Raises:
        DataError: fewer than two prompts have a score.
    """
    return ratio_interval(values, np.ones_like(values), prompts, seed, resamples)


def paired_interval(first: Floats, second: Floats, prompts: Labels, seed: int) -> Interval:
    """Mean of ``first - second`` over clips that share prompt and seed; far narrower than two intervals."""
    return mean_interval(first - second, prompts, seed)


def ratio_interval(above: Floats, below: Floats, prompts: Labels, seed: int, resamples: int = RESAMPLES) -> Interval:
    """mean(above) / mean(below) over clips that have both, with a 95 % interval over prompts."""
    valid = np.isfinite(above) & np.isfinite(below)
    _, cluster = np.unique(prompts[valid], return_inverse=True)
    tops, bottoms = (np.bincount(cluster, weights=values[valid]) for values in (above, below))
    drawn = _multiplicities(len(tops), resamples, seed)
    low, high = np.quantile((drawn @ tops) / (drawn @ bottoms), _TAILS)
    return Interval(float(tops.sum() / bottoms.sum()), float(low), float(high))


def resampled_clips(prompts: Labels, seed: int, resamples: int = SET_RESAMPLES) -> Iterator[Clips]:
    """The clips of each bootstrap draw, for scores of a whole set (a Frechet distance)."""
    _, cluster = np.unique(prompts, return_inverse=True)
    for multiplicity in _multiplicities(int(cluster.max()) + 1, resamples, seed):
        yield np.repeat(np.arange(len(cluster)), multiplicity[cluster].astype(np.int64))


def recentred_interval(point: float, draws: Floats) -> Interval:
    """Spread of bootstrap values, put around the estimate.

    A draw repeats clips, so it shows less diversity and its Frechet distance reads too high. That bias is no
    uncertainty: the draws are shifted so that their mean is the estimate.
    """
    low, high = np.quantile(draws - draws.mean() + point, _TAILS)
    return Interval(float(point), float(low), float(high))


@lru_cache(maxsize=8)  # 50 ms a draw of 10,000, which every score and every change of a report asks for again
def _multiplicities(clusters: int, resamples: int, seed: int) -> Floats:
    """How often each of ``clusters`` prompts is drawn, whole numbers ``[resamples, clusters]``."""
    if clusters < 2:
        raise DataError(f"Scores of {clusters} prompt(s) are too few for an interval.", "Hold out at least 2 prompts.")
    drawn = generator("bootstrap", seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    counts = drawn.astype(np.float64)
    counts.flags.writeable = False
    return counts
