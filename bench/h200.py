"""``reelforge bench h200``: everything a fresh GPU machine should be asked, unattended, in sections of minutes.

Each section has its own time limit and ends there; what it recorded until then counts. A machine that is lent for less
than the sum gives ``--limit``: the sections share it in proportion to their limits, and what one leaves is the next
one's. Sections do not depend on each
other's processes: a worker measures the machine's peaks before its own cases. ``records.jsonl`` and ``report.md`` in
the folder are complete after every section.
"""

import argparse
import importlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reelforge.bench import distill_run, promote, record_files, rl_run, runner, supervise
from reelforge.bench.arms import FAILURES
from reelforge.bench.session import WHOLE
from reelforge.bench.supervise import Folder, Outcome
from reelforge.bench.worker import Job, Kind
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import replace_file

_PROVING = 4  # processes that check accuracy at once: enough to compile on many cores, few enough for the memory
_QUICK_LIMIT_S = 240.0
_INTERPRETED = ("env", "TRITON_INTERPRET=1")
_SANITIZER = "compute-sanitizer"
_SANITIZER_TOOLS = ("memcheck", "racecheck")
_OWN_SECTIONS = {"rates_attention": ("attention",), "rates_fp8": ("fp8", "fp8_linears")}  # families by section


@dataclass(frozen=True)
class Run:
    """One invocation.

    Attributes:
        folder: its results.
        quick: miniature sizes.
        resume: leave out what the folder has already.
        interpreted: there is no GPU, kernels run in Triton's interpreter.
    """

    folder: Folder
    quick: bool
    resume: bool
    interpreted: bool

    def job(self, kind: Kind, family: str = "") -> Job:
        return Job(kind, family, resume=str(self.folder.records) if self.resume else "", quick=self.quick)

    def work(self, jobs: Sequence[Job], deadline: float, parallel: int = 1, **options: Any) -> list[Outcome]:
        """Do jobs until the deadline, each with an even share of what is left when it is its turn."""
        options = {"launcher": _INTERPRETED if self.interpreted else ()} | options
        if parallel > 1:
            return supervise.run_all(jobs, self.folder, deadline, parallel, **options)
        outcomes = []
        for place, job in enumerate(jobs):
            now = time.monotonic()
            share = (deadline - now) / (len(jobs) - place)
            outcomes.append(supervise.run(job, self.folder, now + share, **options))
        return outcomes


Work = Callable[[Run, float], list[Outcome]]  # until a deadline


@dataclass(frozen=True)
class Section:
    """A named part of the run.

    Attributes:
        limit_s: when it is cut off.
        work: does it.
    """

    limit_s: float
    work: Work


# -- the sections ------------------------------------------------------------------------------------------------------


def _simple(kind: Kind, run: Run, deadline: float, **options: Any) -> list[Outcome]:
    return run.work([run.job(kind)], deadline, **options)


def _accuracy(run: Run, deadline: float) -> list[Outcome]:
    """Every kernel against fp64, several families at once, which also compiles what later sections time."""
    parallel = 1 if run.interpreted else _PROVING
    outcomes = run.work([run.job("accuracy", family) for family in runner.families()], deadline, parallel)
    _promote(run, all(outcome.finished for outcome in outcomes))
    return outcomes


def _promote(run: Run, finished: bool) -> None:
    """Prove what passed. A family that was cut off or lost a case leaves its ops as they were."""
    records = [entry.record for entry in record_files.read(run.folder.records) if entry.record]
    records = [record for record in records if record.identity.kind == "accuracy"]
    # What did not run at first may have run since, with --resume.
    by_case = {record.identity.case_id: record for record in records}
    by_arm = {(record.identity.case_id, record.identity.arm): record for record in records}
    lost = {record.workload.op for record in by_case.values() if record.identity.arm == WHOLE}
    judged = [record for record in records if record.workload.op not in lost]
    judged = [r for r in judged if r.quality or by_arm[r.identity.case_id, r.identity.arm] is r]
    for outcome in promote.promote(judged, promote.PROVEN, check=run.quick or not finished):
        run.folder.note(str(outcome))
    if not finished:
        run.folder.note("Accuracy did not finish: the table of proven kernels stays as it is; go on with --resume.")
    elif not run.quick:
        shutil.copy(promote.PROVEN, run.folder.path)


def _sanitizer(run: Run, deadline: float) -> list[Outcome]:
    """Each kernel once under the memory and the race checker."""
    tool = None if run.interpreted else shutil.which(_SANITIZER)
    if tool is None and not run.interpreted:
        run.folder.note(f"{_SANITIZER} is not on PATH; nothing was checked.")
        return []
    outcomes = []
    for name in _SANITIZER_TOOLS if tool is not None else ("no checker",):
        left = deadline - time.monotonic()
        share = time.monotonic() + left / (1 if name == _SANITIZER_TOOLS[-1] else 2)
        log = run.folder.path / f"{_SANITIZER}.txt"
        launcher = _checker(tool, name, log) if tool is not None else _INTERPRETED
        jobs = [run.job("sanitize", family) for family in runner.families()]
        parallel = 1 if run.interpreted else _PROVING
        outcomes += run.work(jobs, share, parallel, launcher=launcher, step_limit_s=supervise.COMPILING_STEP_S)
        run.folder.note(f"{name}: {_verdict(name, log)}")
    return outcomes


def _checker(tool: str, name: str, log: Path) -> tuple[str, ...]:
    # Without torch's caching allocator an access past a tensor's end leaves its allocation and is seen.
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    return (*uncached, tool, "--tool", name, "--log-file", f"{log}.%p", "--print-limit", "20")


def _verdict(name: str, log: Path) -> str:
    """The checker's own summaries; what each process wrote is moved into one file."""
    parts = sorted(log.parent.glob(f"{log.name}.*"))
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in parts)
    with log.open("a", encoding="utf-8") as whole:
        whole.write(f"{name}\n{text}")
    for path in parts:
        path.unlink()
    telling = ("SUMMARY", "not supported", "Error:")
    found = (line.strip(" =") for line in text.splitlines() if any(word in line for word in telling))
    return "; ".join(dict.fromkeys(found)) or "it said nothing"


def _rates(section: str, run: Run, deadline: float) -> list[Outcome]:
    """The section's families, or those that have no section of their own."""
    others = [family for family in runner.families() if not any(family in own for own in _OWN_SECTIONS.values())]
    chosen = _OWN_SECTIONS.get(section, others)
    return run.work([run.job("rates", family) for family in chosen], deadline)


def _rl(run: Run, deadline: float) -> list[Outcome]:
    """RLHF iterations at real shapes; with more time than the section's own, more rounds of them."""
    jobs = [run.job("rl", str(frames)) for frames in rl_run.SHAPES]
    return run.work(jobs, deadline, step_limit_s=supervise.COMPILING_STEP_S)


def _distill(run: Run, deadline: float) -> list[Outcome]:
    """Self-forcing cycles at real shapes, the larger teacher where the memory is there."""
    jobs = [run.job("distill", teacher) for teacher in distill_run.TEACHERS]
    return run.work(jobs, deadline, step_limit_s=supervise.COMPILING_STEP_S)


def _report(run: Run, deadline: float) -> list[Outcome]:
    """Tables, a roofline and what sections had to say beside them, from the records there are."""
    entries = record_files.read(run.folder.records)
    path = run.folder.path / "report.md"
    try:
        importlib.import_module("reelforge.bench.report").write(entries, path)
        if run.folder.pages.exists():
            pages = run.folder.pages.read_text(encoding="utf-8")
            replace_file(path, path.read_text(encoding="utf-8") + "\n## In detail\n\n" + pages)
    except FAILURES as error:  # the records are what counts; a report can be made from them anywhere
        run.folder.note(f"no report: {type(error).__name__}: {error}")
    sound = sum(not entry.reasons for entry in entries)
    run.folder.note(f"{path}: {sound} valid records, {len(entries) - sound} invalid")
    return []


SECTIONS: dict[str, Section] = {
    "peaks": Section(120.0, partial(_simple, "peaks")),
    "accuracy": Section(480.0, _accuracy),
    "sanitizer": Section(420.0, _sanitizer),
    "rates_memory": Section(480.0, partial(_rates, "rates_memory")),
    "rates_attention": Section(420.0, partial(_rates, "rates_attention")),
    "rates_fp8": Section(480.0, partial(_rates, "rates_fp8")),
    "peers": Section(480.0, partial(_simple, "peers", step_limit_s=supervise.COMPILING_STEP_S)),
    "block": Section(480.0, partial(_simple, "block", step_limit_s=supervise.COMPILING_STEP_S)),
    "rl": Section(480.0, _rl),
    "distill": Section(420.0, _distill),
    "report": Section(60.0, _report),
}


def main(arguments: argparse.Namespace) -> int:
    """Run the sections that were asked for, or all.

    Raises:
        ConfigError: no such section, or no GPU and not a quick run.
    """
    names = _chosen(arguments.section)
    if not arguments.quick:
        runner.require_gpu()
    interpreted = not torch.cuda.is_available()
    with Folder(arguments.out) as folder:
        run = Run(folder, arguments.quick, arguments.resume, interpreted)
        if interpreted:
            folder.note(
                "There is no GPU: small cases in Triton's interpreter show that everything works, and no speed."
            )
        finished = _sections(run, names, arguments.limit)
    return 0 if all(finished) else 1


def _sections(run: Run, names: Sequence[str], limit_s: float | None) -> list[bool]:
    """The sections one after another, within ``limit_s`` for all; whether all of each was done."""
    limits = {name: _QUICK_LIMIT_S if run.quick else SECTIONS[name].limit_s for name in names}
    left = sum(limits.values())
    if limit_s is not None:
        limits = {name: limit * limit_s / left for name, limit in limits.items()}
        left = limit_s
    finished, spare = [], 0.0
    for name, limit in limits.items():
        start = time.monotonic()
        finished.append(_section(run, name, limit + spare, left + spare))
        left -= limit
        if limit_s is not None:
            spare += limit - (time.monotonic() - start)
    return finished


def _chosen(asked: Iterable[str]) -> list[str]:
    unknown = next((name for name in asked if name not in SECTIONS), None)
    if unknown is not None:
        raise ConfigError(f"There is no section {unknown!r}.", f"Choose of {', '.join(SECTIONS)}.")
    return [name for name in SECTIONS if not asked or name in asked]


def _section(run: Run, name: str, limit_s: float, left_s: float) -> bool:
    """One section; whether all of it was done."""
    run.folder.note(f"== {name}: at most {limit_s:.0f} s; all that is left at most {left_s / 60:.0f} min")
    start = time.monotonic()
    outcomes = SECTIONS[name].work(run, start + limit_s)
    run.folder.note(f"== {name}: {time.monotonic() - start:.0f} s, {runner.summary(outcomes)}")
    if name != "report" and run.folder.records.exists():
        _report(run, 0.0)
    return all(outcome.finished and not outcome.failed for outcome in outcomes)
