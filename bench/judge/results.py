"""results.json: what was measured, one column per stage."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reelforge.bench.judge.bootstrap import (
    Clips,
    Interval,
    Labels,
    mean_interval,
    paired_interval,
    recentred_interval,
    resampled_clips,
)
from reelforge.bench.judge.gsb import Gsb, Scores, Verifier
from reelforge.engine.core.config import build
from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.core.files import replace_file


@dataclass(frozen=True)
class Score:
    """One verifier over a set of clips, with its 95 % interval over prompts.

    Attributes:
        target: some stage was trained on it.
        missing: clips for which the verifier gave no score; they are left out of the mean.
        change: paired difference to the first stage.
    """

    mean: float
    low: float
    high: float
    target: bool
    unit: str
    better: Literal["higher", "lower"]
    missing: int = 0
    change: Interval | None = None


@dataclass(frozen=True)
class Calibration:
    """The same verifiers on clips of known quality (the truth, the truth with wrong prompts, ...)."""

    name: str
    scores: Mapping[str, Score] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class StageResult:
    """One stage's model on the held-out prompts.

    Attributes:
        nfe: network evaluations per video (both branches of guidance counted).
        token_forwards: tokens through the network per video; 0 is not counted.
        seconds_per_video: sampling and decoding, on ``Results.hardware``.
        seconds_train: wall time of the stage's training; None for a model that was given.
        steps: optimiser steps.
        gsb: against each reference; empty for the first stage.
    """

    name: str
    nfe: int
    seconds_per_video: float
    seconds_train: float | None = None
    steps: int | None = None
    gsb: tuple[Gsb, ...] = ()
    note: str = ""
    scores: Mapping[str, Score] = field(default_factory=dict)
    token_forwards: int = 0


@dataclass(frozen=True)
class Results:
    """A whole pipeline's outcome.

    Attributes:
        stages: in the order they were trained; the first is the reference of every ``change``.
        truth: the verifiers on real clips: what a perfect model would score.
        calibration: further rows of known quality.
        self_check: the base judged against its own other seed; its net should be near 0.
        seed: the evaluation seed.
        prompts, clips: held-out prompts, and clips per stage.
        note: one paragraph for the reader.
    """

    stages: tuple[StageResult, ...]
    seed: int
    prompts: int
    clips: int
    truth: Calibration | None = None
    calibration: tuple[Calibration, ...] = ()
    self_check: Gsb | None = None
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def verifiers(self) -> dict[str, Score]:
        """Every verifier of any stage, in order of appearance, with a score that tells unit and direction."""
        rows = (*self.stages, *((self.truth,) if self.truth else ()))
        return {name: score for row in rows for name, score in row.scores.items()}


def score_clips(
    scores: Scores, prompts: Labels, verifiers: Sequence[Verifier], seed: int, reference: Scores | None = None
) -> dict[str, Score]:
    """Per-clip scores to intervals.

    Args:
        scores: verifier -> ``[N]``, NaN where missing.
        prompts: ``[N]`` prompt ids.
        seed: names the bootstrap draw.
        reference: the first stage's scores on the same prompts and seeds, for the paired change.
    """
    found = {}
    for verifier in verifiers:
        values, change = scores[verifier.name], None
        if reference is not None:
            change = paired_interval(values, reference[verifier.name], prompts, seed)
        missing = int(np.isnan(values).sum())
        found[verifier.name] = _score(mean_interval(values, prompts, seed), verifier, change, missing)
    return found


def score_set(
    statistic: Callable[[Clips], float],
    prompts: Labels,
    verifier: Verifier,
    seed: int,
    reference: Callable[[Clips], float] | None = None,
) -> Score:
    """A set-level score (a Frechet distance): ``statistic`` maps clip indices to a number.

    The reference's statistic is evaluated on the same draws, so ``change`` is paired.
    """
    everything, draws = np.arange(len(prompts)), list(resampled_clips(prompts, seed))
    point, values = statistic(everything), np.array([statistic(clips) for clips in draws])
    change = None
    if reference is not None:
        below = np.array([reference(clips) for clips in draws])
        change = recentred_interval(point - reference(everything), values - below)
    return _score(recentred_interval(point, values), verifier, change)


def _score(interval: Interval, verifier: Verifier, change: Interval | None, missing: int = 0) -> Score:
    mean, low, high = dataclasses.astuple(interval)
    return Score(mean, low, high, verifier.target, verifier.unit, verifier.better, missing, change)


def to_json(results: Results) -> str:
    """Keys in the order of the dataclasses; NaN is refused."""
    return json.dumps(dataclasses.asdict(results), indent=2, allow_nan=False) + "\n"


def from_json(text: str, origin: str = "results.json") -> Results:
    """Read strictly: an unknown, missing or ill-typed key is an error that names it.

    Raises:
        DataError: the text is not JSON, or not these results.
    """
    try:
        table = json.loads(text)
        if not isinstance(table, dict):
            raise DataError(f"{origin} is no table.", "Run the stage again.")
        return build(Results, table)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin} is not JSON ({error}).", "Run the stage again.") from error
    except ConfigError as error:
        raise DataError(f"{origin}: {error.what}", error.hint) from error


def write(results: Results, path: Path) -> None:
    """Write the JSON; a reader never sees half of it."""
    replace_file(path, to_json(results))


def read(path: Path) -> Results:
    """Read what :func:`write` wrote."""
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
