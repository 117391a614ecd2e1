"""``reelforge bench study``: the whole pipeline under three seeds, and every ablation; one page out of their records.

A cell is a command of its own that leaves a JSON file. Stopped, the same command goes on: a finished cell is not run
again, an unfinished one continues.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.bench.judge import results
from reelforge.bench.judge.gsb import Gsb
from reelforge.bench.judge.results import Results, Score, StageResult
from reelforge.bench.markdown import table
from reelforge.engine.core import hardware
from reelforge.engine.core.errors import TrainingError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.progress import say

SEEDS = (0, 1, 2)
SAMPLES = 6  # clips a prompt: 432 pairs a comparison, where the demo's own report has fewer
# Acceptance for every seed, beside that of the studies. Fixed before the reported run; a failed check is reported.
#   net GSB of a column against another: interval above 0; change of an accuracy against base: interval above 0
VOTES = (("sft", "base"), ("rlhf", "sft"), ("rlhf + PE", "rlhf, raw request"))
IMPROVED = ("accuracy_colour", "accuracy_motion")  # of sft
PAGES = ("rl", "rl_ablation", "enhance", "distill")
_SHOWN = (
    "vq", "mq", "ta", "accuracy_colour", "accuracy_motion", "accuracy_shape", "strangeness", "frechet", "background",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A command and the file that says it is finished."""

    name: str
    product: Path
    command: tuple[str, ...]


def cells(out: Path, nfe: int) -> list[Cell]:
    """Pipelines first: the ablations start from the first one's models.

    Args:
        nfe: network evaluations of each arm of the RLHF ablation.
    """
    demos = [out / f"pipeline_{seed}" for seed in SEEDS]

    def ablation(name: str, verb: str, *more: str) -> Cell:
        folder = out / name
        return Cell(verb, folder / "study.json", ("bench", verb, "--demo", str(demos[0]), "--out", str(folder), *more))

    return [
        *(
            Cell(
                f"pipeline, seed {seed}",
                root / "results.json",
                ("demo", "--out", str(root), "--seed", str(seed), "--set", f"evaluation.samples={SAMPLES}"),
            )
            for seed, root in zip(SEEDS, demos, strict=True)
        ),
        ablation("rl", "rl-study"),
        ablation("enhance", "enhance-study"),
        ablation("distill", "distill-study"),
        ablation("rl_ablation", "rl-ablation", "--nfe", str(nfe)),
    ]


def run(cell: Cell) -> float:
    """Run an unfinished cell; returns its seconds, 0 for a finished one.

    Raises:
        TrainingError: the command failed.
    """
    if cell.product.exists():
        return 0.0
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "reelforge.stages.cli", *cell.command], stdout=subprocess.DEVNULL)
    if done.returncode or not cell.product.exists():
        raise TrainingError(
            f"{cell.name} ended with exit status {done.returncode}.",
            f"Run it by itself to see why: reelforge {' '.join(cell.command)}",
        )
    return time.monotonic() - start


def main(arguments: argparse.Namespace) -> int:
    """The verb."""
    planned = cells(make_folder(arguments.out), arguments.nfe)
    log = arguments.out / "record.json"
    begun = {"commit": hardware.git_revision() or "no checkout", "seconds": {}}
    record: dict[str, Any] = json.loads(log.read_text(encoding="utf-8")) if log.exists() else begun
    seconds: dict[str, float] = record["seconds"]
    for number, cell in enumerate(planned, 1):
        known = "is there" if cell.product.exists() else "begins"
        say(f"[{number}/{len(planned)}] {cell.name} {known} ({sum(seconds.values()) / 60:.0f} min so far)")
        seconds[cell.name] = seconds.get(cell.name, 0.0) + run(cell)
        replace_file(log, json.dumps(record, indent=1))
    found = [results.read(cell.product) for cell in planned[: len(SEEDS)]]
    pictures = _pictures(arguments.out / f"pipeline_{SEEDS[0]}", arguments.page)
    studies = {name: _read(arguments.out / name) for name in PAGES}
    replace_file(arguments.page, markdown(found, studies, record, pictures))
    say(f"{arguments.page} is written")
    return 0


def _read(folder: Path) -> tuple[str, list[Sequence[Any]]]:
    """A study's page, and its checks."""
    checks = json.loads((folder / "study.json").read_text(encoding="utf-8")).get("checks", [])
    rows = [list(check.values()) if isinstance(check, Mapping) else check for check in checks]
    return (folder / "study.md").read_text(encoding="utf-8"), rows


def _pictures(demo: Path, page: Path) -> list[str]:
    """The demo's contact sheets beside the page, by file name."""
    folder = make_folder(page.parent / page.stem)
    sheets = sorted((demo / "sheets").glob("*.webp"))
    for sheet in sheets:
        shutil.copy(sheet, folder / sheet.name)
    return [f"{page.stem}/{sheet.name}" for sheet in sheets]


def markdown(
    found: Sequence[Results],
    studies: Mapping[str, tuple[str, Sequence[Sequence[Any]]]],
    record: Mapping[str, Any],
    pictures: Sequence[str],
) -> str:
    """The page: acceptance, every seed, pictures, then each study's own tables.

    Args:
        record: ``commit`` that the study began at, ``seconds`` of each cell.
    """
    judged = [row for result in found for row in pipeline_checks(result)]
    judged += [[f"{name}: {check[0]}", *check[1:]] for name, (_, checks) in studies.items() for check in checks]
    rows = [[*map(str, row[:-1]), "pass" if row[-1] else "**fail**"] for row in judged]
    passed, first = sum(bool(row[-1]) for row in judged), found[0]
    parts = [
        "# The miniature's study",
        f"Made by `make study` from its records, on {first.hardware.get('cpu', 'a CPU')}, torch "
        f"{first.versions.get('torch')}: {sum(record['seconds'].values()) / 60:.0f} minutes. {first.prompts} held-out "
        f"prompts, {first.clips} clips a column; 95 % intervals over prompts. Recipes, prompts, verifiers and bars are "
        f"those of commit {record['commit']}. {passed} of {len(judged)} checks pass. [study.md](study.md) says how "
        "to read it, what failed and what was tried.",
        "## Acceptance",
        table(["what", "criterion", "found", ""], rows),
        *(f"## The pipeline, seed {result.seed}\n\n{columns(result)}" for result in found),
        *(["## Pictures", *(f"![{name}]({name})" for name in pictures)] if pictures else []),
        *(f"## {name}\n\n{text.strip()}" for name, (text, _) in studies.items()),
    ]
    return "\n\n".join(parts) + "\n"


def pipeline_checks(result: Results) -> list[list[Any]]:
    """(what, criterion, found, passed) of one seed's pipeline."""
    stages, rows = {stage.name: stage for stage in result.stages}, []
    for name, other in VOTES:
        vote = next(vote for vote in stages[name].gsb if vote.reference == other)
        rows.append([f"seed {result.seed}: {name}", f"net GSB against {other} above 0", _vote(vote), vote.low > 0])
    for name in IMPROVED:
        change = stages["sft"].scores[name].change
        assert change is not None, "the first column is base"
        told = f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
        rows.append([f"seed {result.seed}: sft", f"{name} over base above 0", told, change.low > 0])
    return rows


def columns(result: Results) -> str:
    """One seed's columns as rows."""
    head = ["column", *_SHOWN, "GSB", "token-forwards", "training, s"]
    return table(head, [_row(stage) for stage in result.stages])


def _row(stage: StageResult) -> list[str]:
    votes = "; ".join(f"{_vote(vote)} against {vote.reference}" for vote in stage.gsb)
    taken = f"{stage.seconds_train:.0f}" if stage.seconds_train else "–"
    shown = [_score(stage.scores[name]) for name in _SHOWN]
    return [stage.name, *shown, votes or "–", f"{stage.token_forwards:,}", taken]


def _score(score: Score) -> str:
    return f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]"


def _vote(vote: Gsb) -> str:
    return f"{vote.net:+.2f} [{vote.low:+.2f}, {vote.high:+.2f}]"
