"""Judges the demo's stages on the same held-out prompts and seeds, and writes results.json and report.html."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.bench.evaluation import REWARDS, VOTERS, Evaluation, EvaluationConfig, Measured, chunk_seconds, recovery
from reelforge.bench.exam import Exam
from reelforge.bench.rewrites import Rewrite, held_out_requests, kept
from reelforge.bench.toy import calibration
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware, rng
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.core.progress import say
from reelforge.engine.judge import results
from reelforge.engine.judge.charts import Curve, read_series
from reelforge.engine.judge.gsb import Gsb, Panel, compare, fix_panel
from reelforge.engine.judge.report import write_report
from reelforge.engine.judge.results import Calibration, Results, StageResult
from reelforge.engine.judge.sheets import Row, Sheet, contact_sheet, webp
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import through_codec

_SHEET_ROWS, _FAILURES = 10, 6
_HEALTH = {
    "cosine of successive gradients": "gradient_cosine",
    "distance to the model before": "kl_reference",
    "share of answers out of form": "malformed",
}
_NOTE = (
    "Every stage is the same transformer, sampled on the same prompts and noise, none of whose captions any training "
    "saw; the student decodes frame by frame in a few steps. Columns named after a request are asked for the same "
    "scenes in a user's words, in phrasings that no rewriter saw, and judged by the request: raw, and rewritten (PE). "
    "Intervals are 95 % bootstraps over prompts. Rewards (vq, mq, ta) are what rlhf and the rewriter train on; votes "
    "come from measures that no stage trains on and that share nothing with the rewards. The truth is clean renderings "
    "of the same scenes, through the codec."
)


@dataclass(frozen=True)
class StageCost:
    """What a stage's training took, and where its curves are."""

    steps: int
    seconds: float
    metrics: Path


@dataclass(frozen=True)
class Entrant:
    """One column of the report.

    Attributes:
        model: model folder.
        references: entrants that it is compared with, clip by clip.
        cost: of the training that made it; None for a model that is only sampled in another way.
        settings: how it is sampled, over the folder's defaults.
        teacher: the entrant that it was distilled from, if it was.
        rewrite: turns requests, in a user's words, into prompts; None is given captions.
    """

    model: Path
    references: tuple[str, ...]
    cost: StageCost | None = None
    settings: tuple[str, ...] = ()
    teacher: str | None = None
    rewrite: Rewrite | None = None


def judge_and_report(
    config: EvaluationConfig,
    entrants: Mapping[str, Entrant],
    root: Path,
    recipe: Any,
    seed: int,
) -> Path:
    """Sample, score, compare and write.

    Args:
        entrants: by name, in order; the first is the reference of every change.
        root: where ``results.json`` and ``report.html`` go.
        recipe: the demo's config, for the record.
        seed: names prompts' noise and every bootstrap.
    """
    report = root / "report.html"
    folders = {name: ModelFolder.load(entrant.model) for name, entrant in entrants.items()}
    first, base = next(iter(folders.items()))
    exam = Exam(config, base, seed)
    requests = held_out_requests(config.prompts)
    texts = {name: entrant.rewrite(requests) for name, entrant in entrants.items() if entrant.rewrite}
    evaluations = {
        name: exam.evaluate(
            folder, entrants[name].settings, f"sampling {name}", 0, requests if name in texts else None, texts.get(name)
        )
        for name, folder in folders.items()
    }
    again = exam.evaluate(base, entrants[first].settings, f"sampling {first}, second noise", draw=1).measured
    say("scoring clips of known quality")
    panel = fix_panel(evaluations[first].measured.scores, again.scores, (*REWARDS, *VOTERS))
    notes = {
        name: _student_note(folders[name], evaluations[name], evaluations[entrant.teacher], exam, entrant.teacher)
        for name, entrant in entrants.items()
        if entrant.teacher
    } | {name: _rewrite_note(requests, written) for name, written in texts.items()}
    outcome = Results(
        stages=_stages(entrants, evaluations, exam, panel, notes),
        seed=seed,
        prompts=len(exam.prompts),
        clips=len(exam.asked),
        truth=Calibration("truth", exam.table(exam.truth)),
        calibration=_known_rows(exam),
        self_check=_against(evaluations[first].measured, again, panel, first, seed),
        note=_NOTE,
        versions=hardware.versions(),
        hardware=hardware.hardware(),
        config=_jsonable(configuration.to_table(recipe)),
    )
    results.write(outcome, root / "results.json")
    pages = _sheets({name: found for name, found in evaluations.items() if name not in texts}, exam, panel)
    if texts:
        pages.insert(1, _request_sheet({name: evaluations[name] for name in texts}, exam, texts))
    write_report(outcome, pages, _curves(entrants), report)
    for sheet in pages:
        name = "_".join(re.findall("[a-z]+", sheet.title.lower()))
        replace_file(make_folder(root / "sheets") / f"{name}.webp", webp([contact_sheet(sheet)], lossless=False))
    return report


def _jsonable(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: an open end of a range becomes a word."""
    return json.loads(json.dumps(table), parse_constant=str)


def _against(measured: Measured, below: Measured, panel: Panel, reference: str, seed: int) -> Gsb:
    return compare(measured.scores, below.scores, measured.labels, panel, reference, seed)


def _stages(
    entrants: Mapping[str, Entrant],
    evaluations: Mapping[str, Evaluation],
    exam: Exam,
    panel: Panel,
    notes: Mapping[str, str],
) -> tuple[StageResult, ...]:
    """One result a column, each judged against its references."""
    rows: list[StageResult] = []
    firsts: dict[bool, Measured] = {}  # a change is to the first column that was asked for the same
    for name, evaluation in evaluations.items():
        entrant, measured = entrants[name], evaluation.measured
        first = firsts.setdefault(entrant.rewrite is None, measured)
        rows.append(
            StageResult(
                name,
                nfe=evaluation.nfe,
                token_forwards=evaluation.token_forwards,
                note=notes.get(name, ""),
                seconds_per_video=evaluation.seconds_per_video,
                seconds_train=entrant.cost.seconds if entrant.cost else None,
                steps=entrant.cost.steps if entrant.cost else None,
                gsb=tuple(
                    _against(measured, evaluations[below].measured, panel, below, exam.seed)
                    for below in entrant.references
                ),
                scores=exam.table(measured, None if measured is first else first),
            )
        )
    return tuple(rows)


def _student_note(folder: ModelFolder, student: Evaluation, teacher: Evaluation, exam: Exam, name: str) -> str:
    """What a distilled model keeps of its teacher, and what a viewer waits for."""
    kept = recovery(student.measured, teacher.measured, exam.floor, "ta", exam.seed)
    chunks = [f"{1000 * seconds:.0f}" for seconds in chunk_seconds(folder, exam.prompts[0])]
    return (
        f"on ta it is {kept.mean:.2f} [{kept.low:.2f}, {kept.high:.2f}] of the way from clean clips of other prompts, "
        f"at 0, to {name}, at 1, with 1/{teacher.token_forwards / student.token_forwards:.1f} of its token-forwards. "
        f"One video alone: the first chunk after {chunks[0]} ms, the next ones in {', '.join(chunks[1:])} ms each, "
        "decoding not counted."
    )


def _rewrite_note(requests: Sequence[str], written: Sequence[str]) -> str:
    found = kept(requests, written)
    return (
        f"{100 * found.preserved:.0f} % of the prompts still name all that the request names, "
        f"{100 * found.copied:.0f} % are the request itself; {found.words:.0f} words on average. E.g. "
        f"\u201c{requests[0]}\u201d becomes \u201c{written[0]}\u201d."
    )


def _known_rows(exam: Exam) -> tuple[Calibration, ...]:
    """The verifiers on clips of known quality, all through the codec."""
    clips = calibration.known_clips(exam.config.calibration_clips, rng.key("known", exam.seed), exam.video)
    return tuple(
        Calibration(name, exam.table(exam.judge.measure(through_codec(exam.codec, videos), prompts)))
        for name, videos, prompts in clips
    )


def _sheets(evaluations: Mapping[str, Evaluation], exam: Exam, panel: Panel) -> list[Sheet]:
    """Stages side by side on fixed prompts, and the last stage's worst clips."""
    samples, fps = exam.config.samples, exam.video.fps
    columns = ("truth", *evaluations)
    sets = [exam.truth, *(evaluation.measured for evaluation in evaluations.values())]

    def row(clip: int, note: str = "") -> Row:
        pictures = tuple(measured.videos[clip].numpy() for measured in sets)
        return Row(exam.asked[clip], clip % samples, pictures, note)

    spread = np.linspace(0, len(exam.asked) - 1, _SHEET_ROWS).astype(int) // samples * samples
    rating = panel.rating(sets[-1].scores)
    worst = np.argsort(rating)[:_FAILURES]
    return [
        Sheet("Same prompts, same noise", columns, tuple(row(clip) for clip in spread.tolist()), fps),
        Sheet(
            "Failures",
            columns,
            tuple(row(clip, f"rating {rating[clip]:.2f}") for clip in worst.tolist()),
            fps,
            lead=f"The {_FAILURES} clips of the last stage that the voting verifiers rate lowest.",
        ),
    ]


def _request_sheet(evaluations: Mapping[str, Evaluation], exam: Exam, texts: Mapping[str, Sequence[str]]) -> Sheet:
    """What a request brings, with and without rewriting; the prompt of the last column is told."""
    samples, last = exam.config.samples, list(texts.values())[-1]
    sets = [exam.truth, *(evaluation.measured for evaluation in evaluations.values())]
    rows = []
    for clip in (np.linspace(0, len(exam.asked) - 1, _SHEET_ROWS).astype(int) // samples * samples).tolist():
        pictures = tuple(measured.videos[clip].numpy() for measured in sets)
        rows.append(Row(sets[1].prompts[clip], clip % samples, pictures, f"rewritten: {last[clip // samples]}"))
    return Sheet("The same scenes in a user's words", ("truth", *evaluations), tuple(rows), exam.video.fps)


def _curves(entrants: Mapping[str, Entrant]) -> list[Curve]:
    curves = []
    for name, entrant in entrants.items():
        if entrant.cost is None:
            continue
        lines = list(read_jsonl(entrant.cost.metrics))
        if any("reward" in line for line in lines):
            curves += _reward_curves(name, lines)
            continue
        if any("dmd" in line for line in lines):
            told = {"teacher and critic apart": "dmd", "critic's flow-matching loss": "critic_loss"}
            curves.append(Curve(f"{name}: self-forcing", read_series(entrant.cost.metrics, told), "", smooth=3))
            continue
        loss = read_series(entrant.cost.metrics, {"training": "loss", "held out": "validation_loss"})
        curves.append(Curve(f"{name}: flow-matching loss", loss, "mean squared velocity error", smooth=5))
        bins = _validation_bins(entrant.cost.metrics)
        if bins:
            curves.append(Curve(f"{name}: held-out loss by noise level", bins, "mean squared velocity error", log=True))
    return curves


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


def _validation_bins(metrics: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every second of the eight sigma bins, over steps."""
    lines = [line for line in read_jsonl(metrics) if "validation_bins" in line]
    if not lines:
        return {}
    steps = np.array([float(line["step"]) for line in lines])
    values = np.array([line["validation_bins"] for line in lines])
    return {
        f"sigma {index / 8:.3g} to {(index + 1) / 8:.3g}": (steps, values[:, index])
        for index in range(0, values.shape[1], 2)
    }
