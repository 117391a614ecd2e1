"""Judges the demo's stages on the same held-out prompts and seeds, and writes results.json and report.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.bench.evaluation import REWARDS, VOTERS, Evaluation, EvaluationConfig, chunk_seconds, recovery
from reelforge.bench.exam import Exam
from reelforge.bench.judge import columns
from reelforge.bench.judge.columns import Column, Training
from reelforge.bench.judge.gsb import Panel, compare, fix_panel
from reelforge.bench.judge.results import Calibration, Results
from reelforge.bench.judge.sheets import Row, Sheet
from reelforge.bench.rewrites import Rewrite, held_out_requests, kept
from reelforge.bench.toy import calibration
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware, rng
from reelforge.engine.core.progress import say
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import through_codec

_NOTE = (
    "Every stage is the same transformer, sampled on the same prompts and noise, none of whose captions any training "
    "saw; the student decodes frame by frame in a few steps. Columns named after a request are asked for the same "
    "scenes in a user's words, in phrasings that no rewriter saw, and judged by the request: raw, and rewritten (PE). "
    "Intervals are 95 % bootstraps over prompts. Rewards (vq, mq, ta) are what rlhf and the rewriter train on; votes "
    "come from measures that no stage trains on and that share nothing with the rewards. The truth is clean renderings "
    "of the same scenes, through the codec."
)


@dataclass(frozen=True)
class Entrant:
    """One column of the report.

    Attributes:
        model: model folder.
        against: entrants that it is compared with, clip by clip.
        training: what made it; None for a model that is only sampled in another way.
        teacher: the entrant that it was distilled from, if it was.
        rewrite: turns requests, in a user's words, into prompts; None is given captions.
    """

    model: Path
    against: tuple[str, ...] = ()
    training: Training | None = None
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
    folders = {name: ModelFolder.load(entrant.model) for name, entrant in entrants.items()}
    first, base = next(iter(folders.items()))
    exam = Exam(config, base, seed)
    requests = held_out_requests(config.prompts)
    texts = {name: entrant.rewrite(requests) for name, entrant in entrants.items() if entrant.rewrite}
    films = {
        name: exam.evaluate(folder, (), f"sampling {name}", 0, requests if name in texts else None, texts.get(name))
        for name, folder in folders.items()
    }
    again = exam.evaluate(base, (), f"sampling {first}, second noise", draw=1).measured
    say("scoring clips of known quality")
    measured = films[first].measured
    panel = fix_panel(measured.scores, again.scores, (*REWARDS, *VOTERS))
    notes = {
        name: _student_note(folders[name], films[name], films[entrant.teacher], exam, entrant.teacher)
        for name, entrant in entrants.items()
        if entrant.teacher
    } | {name: _rewrite_note(requests, written) for name, written in texts.items()}
    judged = {name: _column(entrants[name], film, notes.get(name, "")) for name, film in films.items()}
    outcome = Results(
        stages=columns.stage_results(
            judged,
            lambda name, below: exam.table(films[name].measured, films[below].measured if below else None),
            panel,
            seed,
        ),
        seed=seed,
        prompts=len(exam.prompts),
        clips=len(exam.asked),
        truth=Calibration("truth", exam.table(exam.truth)),
        calibration=_known_rows(exam),
        self_check=compare(measured.scores, again.scores, measured.labels, panel, first, seed),
        note=_NOTE,
        versions=hardware.versions(),
        hardware=hardware.hardware(),
        config=_jsonable(configuration.to_table(recipe)),
    )
    sheets = _sheets({name: film for name, film in films.items() if name not in texts}, exam, panel)
    if texts:
        sheets.insert(1, _request_sheet({name: films[name] for name in texts}, exam, texts))
    return columns.publish(outcome, sheets, {name: entrant.training for name, entrant in entrants.items()}, root)


def _jsonable(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: an open end of a range becomes a word."""
    return json.loads(json.dumps(table), parse_constant=str)


def _column(entrant: Entrant, film: Evaluation, note: str) -> Column:
    measured = film.measured
    return Column(
        measured.scores, measured.labels, film.nfe, film.token_forwards, film.seconds_per_video, entrant.against,
        "requests" if entrant.rewrite else "captions", entrant.training, note,
    )  # fmt: skip


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


def _row(films: Mapping[str, Evaluation], exam: Exam, clip: int, note: str = "") -> Row:
    """The truth, then every column."""
    sets = [exam.truth, *(film.measured for film in films.values())]
    pictures = tuple(measured.videos[clip].numpy() for measured in sets)
    return Row(sets[-1].prompts[clip], clip % exam.config.samples, pictures, note)


def _sheets(films: Mapping[str, Evaluation], exam: Exam, panel: Panel) -> list[Sheet]:
    """Stages side by side on fixed prompts, and the last stage's worst clips."""
    names, fps = ("truth", *films), exam.video.fps
    shown = tuple(_row(films, exam, clip) for clip in columns.spread(len(exam.asked), exam.config.samples))
    rating = panel.rating(list(films.values())[-1].measured.scores)
    return [
        Sheet("Same prompts, same noise", names, shown, fps),
        columns.failures(names, rating, lambda clip, note: _row(films, exam, clip, note), fps),
    ]


def _request_sheet(films: Mapping[str, Evaluation], exam: Exam, texts: Mapping[str, Sequence[str]]) -> Sheet:
    """What a request brings, with and without rewriting; the prompt of the last column is told."""
    samples, last = exam.config.samples, list(texts.values())[-1]
    rows = tuple(
        _row(films, exam, clip, f"rewritten: {last[clip // samples]}")
        for clip in columns.spread(len(exam.asked), samples)
    )
    return Sheet("The same scenes in a user's words", ("truth", *films), rows, exam.video.fps)
