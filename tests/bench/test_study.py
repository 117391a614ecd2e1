"""The study of everything: cells run once, and a page that says what failed."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from reelforge.bench import study
from reelforge.bench.judge import results
from reelforge.bench.judge.bootstrap import Interval
from reelforge.bench.judge.gsb import Gsb
from reelforge.bench.judge.results import Results, Score, StageResult
from reelforge.engine.core import hardware
from reelforge.engine.core.errors import TrainingError


def vote(reference: str, low: float) -> Gsb:
    return Gsb(reference, 30, 10, 8, low + 0.1, low, low + 0.2, 0.5, 0.7, 0.01, 0.01, 0.2, ("strangeness",))


def score(change: float | None) -> Score:
    moved = None if change is None else Interval(change, change - 0.05, change + 0.05)
    return Score(0.5, 0.4, 0.6, False, "", "higher", change=moved)


def outcome(seed: int, rlhf_low: float = 0.3) -> Results:
    def stage(name: str, change: float | None, *votes: Gsb) -> StageResult:
        scores = {row: score(change) for row in study._SHOWN}
        return StageResult(name, 10, 0.1, 60.0, 100, votes, "", scores, 800)

    return Results(
        stages=(
            stage("base", None),
            stage("sft", 0.2, vote("base", 0.1)),
            stage("rlhf", 0.3, vote("sft", rlhf_low), vote("sft, longer", 0.0)),
            stage("rlhf + PE", 0.3, vote("rlhf, raw request", 0.2)),
        ),
        seed=seed, prompts=48, clips=432, versions={"torch": "2.13"}, hardware={"cpu": "a CPU"},
    )  # fmt: skip


def test_pipelines_come_first_and_every_cell_is_a_command_of_its_own(tmp_path: Path) -> None:
    planned = study.cells(tmp_path, 500)
    assert [cell.command[0] for cell in planned] == ["demo"] * 3 + ["bench"] * 4
    assert len({cell.product for cell in planned}) == len(planned)
    demo = str(tmp_path / "pipeline_0")
    assert all(demo in cell.command for cell in planned[3:])
    assert planned[-1].command[-2:] == ("--nfe", "500")


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(study.subprocess, "run", None)
    product = tmp_path / "study.json"
    product.write_text("{}")
    assert study.run(study.Cell("known", product, ("demo",))) == 0.0


def test_a_cell_that_fails_is_named_with_its_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(TrainingError) as caught:
        study.run(study.Cell("distill-study", tmp_path / "study.json", ("bench", "distill-study")))
    assert "distill-study ended with exit status 1" in caught.value.what
    assert "reelforge bench distill-study" in caught.value.hint


def test_a_pipelines_checks_are_of_intervals() -> None:
    rows = study.pipeline_checks(outcome(2, rlhf_low=-0.01))
    assert [(row[0], row[3]) for row in rows] == [
        ("seed 2: sft", True), ("seed 2: rlhf", False), ("seed 2: rlhf + PE", True), ("seed 2: sft", True),
        ("seed 2: sft", True),
    ]  # fmt: skip
    assert rows[1][2] == "+0.09 [-0.01, +0.19]"


def test_the_page_is_made_from_the_cells_records(tmp_path: Path, monkeypatch) -> None:
    checks = {
        "rl": [{"arm": "rlhf", "criterion": "c", "found": "0.4", "passed": False}],
        "enhance": [["PE", "c", "f", True]],
    }
    out, page = tmp_path / "study", tmp_path / "docs/miniature.md"
    for cell in study.cells(out, 10)[:3]:
        cell.product.parent.mkdir(parents=True)
        seed = int(cell.command[cell.command.index("--seed") + 1])
        results.write(outcome(seed), cell.product)
    for name in study.PAGES:
        (out / name).mkdir()
        (out / name / "study.json").write_text(json.dumps({"checks": checks.get(name, [])}))
        (out / name / "study.md").write_text(f"table of {name}\n")
    (out / "pipeline_0" / "sheets").mkdir()
    (out / "pipeline_0" / "sheets" / "failures.webp").write_bytes(b"picture")
    monkeypatch.setattr(sys, "executable", "false")
    assert study.main(argparse.Namespace(out=out, page=page, nfe=10)) == 0
    text = page.read_text()
    assert (
        f"those of commit {hardware.git_revision() or 'no checkout'}. 16 of 17 checks pass" in text
        and "| rl: rlhf | c | 0.4 | **fail** |" in text
    )
    assert all(f"table of {name}" in text for name in study.PAGES)
    assert "![miniature/failures.webp](miniature/failures.webp)" in text
    assert (page.parent / "miniature/failures.webp").read_bytes() == b"picture"
