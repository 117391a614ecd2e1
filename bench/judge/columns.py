"""Columns of a report: what was measured of each model, votes between them, pictures side by side, training curves."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.bench.judge import results
from reelforge.bench.judge.bootstrap import Floats, Labels
from reelforge.bench.judge.charts import Curve, read_series
from reelforge.bench.judge.gsb import Panel, Scores, compare
from reelforge.bench.judge.report import write_report
from reelforge.bench.judge.results import Results, Score, StageResult
from reelforge.bench.judge.sheets import Row, Sheet, contact_sheet, webp
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.metrics import read_jsonl, training_time

_SHOWN, _FAILURES = 10, 6  # rows of a sheet
_HEALTH = {
    "cosine of successive gradients": "gradient_cosine",
    "distance to the model before": "kl_reference",
    "share of answers out of form": "malformed",
}


@dataclass(frozen=True)
class Training:
    """The runs that made a model, in order; the last one's curves are shown."""

    metrics: tuple[Path, ...]

    @property
    def cost(self) -> tuple[int, float]:
        """Steps and seconds."""
        steps, seconds = zip(*(training_time(path) for path in self.metrics), strict=True)
        return sum(steps), sum(seconds)


@dataclass(frozen=True)
class Column:
    """A model, sampled and measured.

    Attributes:
        scores: of its clips, in an order that all columns share.
        labels: ``[N]`` prompt ids.
        nfe: network evaluations a video.
        token_forwards: tokens through the network a video.
        seconds_per_video: sampling and decoding.
        against: columns that it is compared with, clip by clip.
        asked: what it was asked for. A change is to the first column that was asked for the same.
        training: what made it; None for a model that is only sampled in another way.
        note: for the reader.
    """

    scores: Scores
    labels: Labels
    nfe: int
    token_forwards: int
    seconds_per_video: float
    against: tuple[str, ...] = ()
    asked: str = ""
    training: Training | None = None
    note: str = ""


def stage_results(
    columns: Mapping[str, Column],
    table: Callable[[str, str | None], dict[str, Score]],
    panel: Panel,
    seed: int,
) -> tuple[StageResult, ...]:
    """One result a column.

    Args:
        table: means of a column, and changes to another one or to none.
        panel: who votes.
        seed: names every bootstrap.
    """
    rows: list[StageResult] = []
    firsts: dict[str, str] = {}
    for name, column in columns.items():
        first = firsts.setdefault(column.asked, name)
        steps, seconds = column.training.cost if column.training else (None, None)
        rows.append(
            StageResult(
                name,
                nfe=column.nfe,
                token_forwards=column.token_forwards,
                note=column.note,
                seconds_per_video=column.seconds_per_video,
                seconds_train=seconds,
                steps=steps,
                gsb=tuple(
                    compare(column.scores, columns[below].scores, column.labels, panel, below, seed)
                    for below in column.against
                ),
                scores=table(name, None if name == first else first),
            )
        )
    return tuple(rows)


def spread(clips: int, samples: int) -> list[int]:
    """The first clip of each prompt that a sheet shows, evenly over all."""
    return list(dict.fromkeys((np.linspace(0, clips - 1, _SHOWN).astype(int) // samples * samples).tolist()))


def failures(
    names: Sequence[str], rating: Floats, row: Callable[[int, str], Row], fps: float, title: str = "Failures"
) -> Sheet:
    """The last column's clips that the panel rates lowest."""
    worst = [clip for clip in np.argsort(rating)[:_FAILURES].tolist() if np.isfinite(rating[clip])]
    return Sheet(
        title,
        tuple(names),
        tuple(row(clip, f"rating {rating[clip]:.2f}") for clip in worst),
        fps,
        lead=f"The {len(worst)} clips of the last stage that the voting verifiers rate lowest.",
    )


def publish(outcome: Results, sheets: Sequence[Sheet], trained: Mapping[str, Training | None], root: Path) -> Path:
    """Write ``results.json``, ``sheets/*.webp`` and ``report.html``; returns the page's path."""
    results.write(outcome, root / "results.json")
    page = root / "report.html"
    write_report(outcome, sheets, curves(trained), page)
    for sheet in sheets:
        name = "_".join(re.findall("[a-z]+", sheet.title.lower()))
        replace_file(make_folder(root / "sheets") / f"{name}.webp", webp([contact_sheet(sheet)], lossless=False))
    return page


def curves(trained: Mapping[str, Training | None]) -> list[Curve]:
    """Training curves, a column's last run each."""
    found = []
    for name, training in trained.items():
        if training is None:
            continue
        metrics = training.metrics[-1]
        lines = list(read_jsonl(metrics))
        if any("reward" in line for line in lines):
            found += _reward_curves(name, lines)
            continue
        if any("dmd" in line for line in lines):
            told = {"teacher and critic apart": "dmd", "critic's flow-matching loss": "critic_loss"}
            found.append(Curve(f"{name}: self-forcing", read_series(metrics, told), "", smooth=3))
            continue
        loss = read_series(metrics, {"training": "loss", "held out": "validation_loss"})
        found.append(Curve(f"{name}: flow-matching loss", loss, "mean squared velocity error", smooth=5))
        if bins := _validation_bins(lines):
            found.append(Curve(f"{name}: held-out loss by noise level", bins, "mean squared velocity error", log=True))
    return found


def _reward_curves(name: str, lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """What training saw: rewards of its own samples in deviations of the first line's, and how healthy the run is."""
    lines = [line for line in lines if "reward" in line]
    steps = np.array([float(line["step"]) for line in lines])
    first = lines[0]["reward"]
    rewards = {
        axis: (steps, np.array([(line["reward"][axis]["mean"] - kind["mean"]) / (kind["std"] or 1) for line in lines]))
        for axis, kind in first.items()
    }
    health = {
        label: (steps, np.array([np.nan if line[key] is None else line[key] for line in lines], float))
        for label, key in _HEALTH.items()
        if key in lines[0]
    }
    return [
        Curve(f"{name}: rewards of the training samples", rewards, "change, standard deviations", smooth=3),
        Curve(f"{name}: {', '.join(health)}", health, "", smooth=3),
    ]


def _validation_bins(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every second of the eight sigma bins, over steps."""
    lines = [line for line in lines if "validation_bins" in line]
    if not lines:
        return {}
    steps = np.array([float(line["step"]) for line in lines])
    values = np.array([line["validation_bins"] for line in lines])
    return {
        f"sigma {index / 8:.3g} to {(index + 1) / 8:.3g}": (steps, values[:, index])
        for index in range(0, values.shape[1], 2)
    }
