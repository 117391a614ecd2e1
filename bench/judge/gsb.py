"""Automatic Good/Same/Bad: paired clips, votes by verifiers that no stage was trained on, a fixed dead zone.

Good means that the stage's clip is better than the reference's clip of the same prompt and seed. The dead zone is
set once, on the base model against itself, before any stage is judged: the size of difference that a fresh noise
seed alone exceeds in half of the pairs. These are votes by pixel verifiers, not by people.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from reelforge.bench.judge.bootstrap import RESAMPLES, Floats, Labels, mean_interval
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.rng import generator

Scores = Mapping[str, Floats]  # verifier -> one value per clip, NaN where it is missing


@dataclass(frozen=True)
class Verifier:
    """What a score means.

    Attributes:
        name: key in score tables.
        better: which direction is an improvement.
        target: some stage was trained on it; then it never votes.
        unit: as printed behind a number, e.g. ``"%"`` or ``"dB"``.
    """

    name: str
    better: Literal["higher", "lower"]
    target: bool
    unit: str = ""


@dataclass(frozen=True)
class Gsb:
    """Good/Same/Bad against ``reference``; N = good + same + bad.

    Attributes:
        net: (G - B) / N, the headline; ``low`` and ``high`` bound it at 95 % (bootstrap over prompts).
        no_tie_net: (G - B) / (G + B); 0 when all pairs tie.
        win_rate: (G + S / 2) / N.
        p_value: exact two-sided sign test on G against B, pairs taken as independent.
        p_clustered: sign-flip permutation over prompts, which does not assume that.
        dead_zone: |mean z-score difference| up to which a pair is Same.
        voters: the verifiers that voted.
        missing: pairs left out because a voter gave no score.
    """

    reference: str
    good: int
    same: int
    bad: int
    net: float
    low: float
    high: float
    no_tie_net: float
    win_rate: float
    p_value: float
    p_clustered: float
    dead_zone: float
    voters: tuple[str, ...]
    missing: int = 0

    @property
    def verdict(self) -> str:
        """In words; a difference is claimed only when the interval excludes 0."""
        if self.low <= 0 <= self.high:
            return "not separable at this N"
        return "better" if self.low > 0 else "worse"


@dataclass(frozen=True)
class Panel:
    """Who votes, on which scale, and from which difference on.

    Attributes:
        scale: per voter, the base's standard deviation, negative where lower is better.
        dead_zone: in units of mean z-score.
    """

    scale: Mapping[str, float]
    dead_zone: float

    def rating(self, scores: Scores) -> Floats:
        """Mean z-score per clip up to a constant, higher is better; NaN where a voter is missing."""
        return _rating(self.scale, scores)


def fix_panel(first: Scores, second: Scores, verifiers: Sequence[Verifier], tie_share: float = 0.5) -> Panel:
    """Scale and dead zone from two draws of the base model (same prompts, independent seeds).

    Args:
        first, second: the two draws, clip i of both sharing its prompt.
        verifiers: training targets among them are left out.
        tie_share: the dead zone is this quantile of the absolute differences,
            so the share of base-against-base pairs that tie.

    Raises:
        DataError: every verifier is a training target, or one is constant over the base's clips.
    """
    voters = [verifier for verifier in verifiers if not verifier.target]
    if not voters:
        names = ", ".join(verifier.name for verifier in verifiers)
        raise DataError(f"All verifiers are training targets ({names}).", "Hold one out to vote.")
    scale = {}
    for verifier in voters:
        draws = first[verifier.name], second[verifier.name]
        std = float(np.sqrt(np.mean([np.nanvar(draw, ddof=1) for draw in draws])))
        if not std > 0:
            raise DataError(f"Verifier {verifier.name!r} is constant on the base.", "Leave it out of the votes.")
        scale[verifier.name] = std if verifier.better == "higher" else -std
    differences = np.abs(_rating(scale, first) - _rating(scale, second))
    return Panel(scale, float(np.nanquantile(differences, tie_share)))


def compare(scores: Scores, reference_scores: Scores, prompts: Labels, panel: Panel, reference: str, seed: int) -> Gsb:
    """Judge a stage against ``reference`` on paired clips.

    Args:
        scores, reference_scores: clip i of both made from the same prompt and noise seed.
        prompts: ``[N]`` prompt ids, the unit that is resampled.
        reference: the reference's name.
        seed: names the bootstrap and permutation draws.
    """
    difference = panel.rating(scores) - panel.rating(reference_scores)
    valid = np.isfinite(difference)
    votes = np.where(np.abs(difference) <= panel.dead_zone, 0.0, np.sign(difference))[valid]
    good, same, bad = (int((votes == side).sum()) for side in (1, 0, -1))
    decided = good + bad
    net = mean_interval(votes, prompts[valid], seed)
    return Gsb(
        reference=reference, good=good, same=same, bad=bad,
        net=net.mean, low=net.low, high=net.high,
        no_tie_net=(good - bad) / decided if decided else 0.0,
        win_rate=(good + same / 2) / len(votes),
        p_value=float(binomtest(good, decided).pvalue) if decided else 1.0,
        p_clustered=sign_flip_test(votes, prompts[valid], seed),
        dead_zone=panel.dead_zone, voters=tuple(panel.scale), missing=int((~valid).sum()),
    )  # fmt: skip


def sign_flip_test(votes: Floats, prompts: Labels, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of sum(votes) when each prompt's votes may flip sign together.

    Monte Carlo with the observed labelling counted in, so it is never 0 (Phipson & Smyth 2010).
    """
    _, cluster = np.unique(prompts, return_inverse=True)
    sums = np.bincount(cluster, weights=votes)
    flips = generator("sign flip", seed).integers(0, 2, size=(resamples, len(sums))) * 2 - 1
    at_least = np.abs(flips @ sums) >= abs(sums.sum()) - 1e-9
    return float((1 + at_least.sum()) / (1 + resamples))


def _rating(scale: Mapping[str, float], scores: Scores) -> Floats:
    return np.mean([scores[name] / std for name, std in scale.items()], axis=0)
