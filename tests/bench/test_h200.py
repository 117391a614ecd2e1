"""The unattended command: its sections, what it refuses, what it proves, and its plumbing on a CPU."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reelforge.bench import h200, machine, peers, promote, supervise
from reelforge.bench.arms import Arm
from reelforge.bench.cases.case import Case, Work
from reelforge.bench.record_files import read
from reelforge.bench.records import OURS, Quality, Record, Verdict
from reelforge.bench.session import WHOLE, Session
from reelforge.bench.supervise import Folder, Outcome
from reelforge.bench.worker import Job
from reelforge.engine.core.errors import ConfigError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def arguments(out: Path, *sections: str, quick: bool = True, resume: bool = False) -> argparse.Namespace:
    return argparse.Namespace(out=out, section=list(sections), quick=quick, resume=resume, limit=None)


def run(folder: Folder, quick: bool = True) -> h200.Run:
    return h200.Run(folder, quick=quick, resume=False, interpreted=True)


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device") as raised:
        h200.main(arguments(tmp_path, quick=False))
    assert "--quick" in raised.value.hint and not list(tmp_path.iterdir())


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section 'rate'") as raised:
        h200.main(arguments(tmp_path, "rate"))
    assert "rates_memory" in raised.value.hint


def test_no_section_takes_more_than_eight_minutes() -> None:
    assert all(section.limit_s <= 480 for section in h200.SECTIONS.values())
    assert list(h200.SECTIONS)[:2] == ["peaks", "accuracy"] and list(h200.SECTIONS)[-1] == "report"


@no_gpu
def test_quick_sections_on_a_cpu_leave_records_and_a_report(tmp_path: Path) -> None:
    assert h200.main(arguments(tmp_path, "peaks", "peers")) == 0
    entries = read(tmp_path / "records.jsonl")
    ops = {entry.record.workload.op for entry in entries if entry.record}
    assert ops == {"peak", peers.OP}
    assert all("clock stamps are not valid" in " ".join(entry.reasons) for entry in entries)
    assert "Invalid records" in (tmp_path / "report.md").read_text()
    log = (tmp_path / "records.log").read_text()
    assert "== peaks" in log and "== peers" in log and "no speed" in log

    before = len(entries)
    assert h200.main(arguments(tmp_path, "peers", resume=True)) == 0
    assert len(read(tmp_path / "records.jsonl")) == before, "what is there is not measured again"


def test_jobs_share_what_is_left_of_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def note_share(job: Job, folder: Folder, deadline: float, **options: object) -> Outcome:
        shares.append(deadline - time.monotonic())
        assert options["launcher"] == ("env", "TRITON_INTERPRET=1")
        return Outcome(True, 0, 0)

    monkeypatch.setattr(supervise, "run", note_share)
    with Folder(tmp_path) as folder:
        outcomes = run(folder).work([Job("rates", name) for name in "abc"], time.monotonic() + 90)
    assert len(outcomes) == 3 and shares == pytest.approx([30, 45, 90], abs=1), "unused time goes to those behind"


class Clock:
    """Time that passes only while a section works."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("limit_s", "limits"),
    [(None, [120, 480, 420]), (510.0, [60, 290, 210])],  # the first takes 10 s, the second all it may
)
def test_a_limit_is_shared_and_what_is_left_is_the_next_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float | None, limits: list[float]
) -> None:
    clock, given = Clock(), []

    def section(run: h200.Run, name: str, limit: float, left: float) -> bool:
        given.append(limit)
        clock.now += 10 if name == "peaks" else limit
        return True

    monkeypatch.setattr(h200, "_section", section)
    monkeypatch.setattr(h200, "time", clock)
    with Folder(tmp_path) as folder:
        assert h200._sections(run(folder, quick=False), ["peaks", "accuracy", "sanitizer"], limit_s) == [True] * 3
    assert given == pytest.approx(limits)


def test_families_are_checked_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, str]] = []

    def run_all(jobs: list[Job], folder: Folder, deadline: float, parallel: int, **options: tuple) -> list[Outcome]:
        asked.append((len(jobs), parallel, options["launcher"][options["launcher"].index("--tool") + 1]))
        return [Outcome(True, 0, 0)] * len(jobs)

    monkeypatch.setattr(supervise, "run_all", run_all)
    monkeypatch.setattr(h200.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    with Folder(tmp_path) as folder:
        outcomes = h200._sanitizer(h200.Run(folder, False, False, interpreted=False), time.monotonic() + 60)
    families = len(h200.runner.families())
    assert asked == [(families, 4, "memcheck"), (families, 4, "racecheck")] and len(outcomes) == 2 * families


# -- proofs ------------------------------------------------------------------------------------------------------------


def accuracy_record(op: str, arm: str, case_id: str) -> Record:
    made = Case(op, case_id, lambda draw: (), lambda: None, lambda: None, Work(1.0))
    told = Session(torch.device("cpu"), "none", machine.hardware(), machine.software())
    quality = Quality(1e-3, 4e-3, "pass") if arm == OURS else None
    return told.record(made, (), Arm(arm, "triton", lambda: None), "accuracy", quality=quality)


@pytest.mark.parametrize("finished", [True, False])
def test_only_a_finished_run_proves_and_a_lost_case_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    judged: list[tuple[list[str], bool]] = []

    def judge(records: list[Record], path: Path, check: bool) -> list[promote.Outcome]:
        judged.append(([record.workload.op for record in records], check))
        return []

    monkeypatch.setattr(promote, "promote", judge)
    monkeypatch.setattr(h200.shutil, "copy", lambda source, target: None)
    with Folder(tmp_path) as folder:
        for op, arm in (("gelu", OURS), ("rms_norm", OURS), ("rms_norm", WHOLE)):
            folder.append(accuracy_record(op, arm, f"{op} {arm}"))
        h200._promote(run(folder, quick=False), finished)
    assert judged == [(["gelu"], not finished)]


def test_a_lost_case_that_has_run_since_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def judge(records: list[Record], path: Path, check: bool) -> list[promote.Outcome]:
        judged.extend(record.verdict.status or record.identity.arm for record in records if record.identity.ours)
        return []

    monkeypatch.setattr(promote, "promote", judge)
    ran, lost = (accuracy_record("gelu", arm, "gelu a") for arm in (OURS, WHOLE))
    crashed = replace(ran, quality=None, verdict=Verdict(status="failed: its process ended with SIGSEGV"))
    wrong = replace(ran, verdict=Verdict(status="wrong"))
    with Folder(tmp_path) as folder:
        for each in (lost, crashed, wrong, ran):
            folder.append(each)
        h200._promote(run(folder), True)
    assert judged == ["wrong", OURS], "a wrong result stays one"


def test_a_checkers_verdict_is_read_and_its_files_are_joined(tmp_path: Path) -> None:
    log = tmp_path / "compute-sanitizer.txt"
    (tmp_path / "compute-sanitizer.txt.11").write_text(
        "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    )
    (tmp_path / "compute-sanitizer.txt.12").write_text("========= ERROR SUMMARY: 2 errors\n")
    assert h200._verdict("memcheck", log) == "ERROR SUMMARY: 0 errors; ERROR SUMMARY: 2 errors"
    assert [path.name for path in tmp_path.iterdir()] == [log.name]
    assert h200._verdict("racecheck", log) == "it said nothing"


def test_the_checker_wraps_python() -> None:
    command = h200._checker("/usr/bin/compute-sanitizer", "memcheck", Path("log.txt"))
    assert command[:2] == ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1") and "memcheck" in command
    assert command[command.index("--log-file") + 1] == "log.txt.%p"
