"""A process that measures, so that a lost CUDA context, a crash or a hang costs one arm and not the run.

``python -m reelforge.bench.worker JOB`` takes a job as JSON and writes one JSON object a line to standard output:
``{"begin": record}`` before each piece of work, with the record to write should the process die of it, ``{"record":
record}``, ``{"note": text}``, and ``{"end": true}`` when the job is done. Whoever started it writes the files;
``bench.supervise`` is that side.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from reelforge.bench import machine, measure, peaks, quick, tables
from reelforge.bench.arms import Arm, kernel_arms
from reelforge.bench.cases.case import Case
from reelforge.bench.compare import hardware_profile
from reelforge.bench.record_files import read
from reelforge.bench.records import Record
from reelforge.bench.session import WHOLE, Session

Kind = Literal["peaks", "accuracy", "rates", "peers", "sanitize", "block", "rl", "distill"]
_COMPILE_UNTIL = 0.6  # of the budget: later cases go without the arms that compile, so that more of them are reached
# What matters most comes first: a section may be cut off.
_FIRST = [("1.3B", 32760), ("1.3B", 4680), ("14B", 32760), ("14B", 4680), ("1.3B", 1560), ("14B", 1560)]


@dataclass(frozen=True)
class Job:
    """What a worker has to do.

    Attributes:
        kind: of the work.
        family: module of ``bench.cases``, for the kinds that take cases from there; of ``rl`` the frames, of
            ``distill`` the teacher.
        ops: only cases of these ops; empty is all.
        match: only cases whose name contains it.
        skip: pairs of case and arm to leave out, the arm being :data:`session.WHOLE` for a whole case.
        resume: records of an earlier run, whose cases are left out where source and hardware are the same.
        quick: miniature sizes and few rounds, on whatever device there is.
        budget_s: time for all of it.
    """

    kind: Kind
    family: str = ""
    ops: tuple[str, ...] = ()
    match: str = ""
    skip: tuple[tuple[str, str], ...] = ()
    resume: str = ""
    quick: bool = False
    budget_s: float = 480.0

    def text(self) -> str:
        """As a command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Job":
        """From :meth:`text`."""
        table = json.loads(text)
        pairs = tuple((case, arm) for case, arm in table["skip"])
        return cls(**{**table, "ops": tuple(table["ops"]), "skip": pairs})

    def wants(self, case: str, arm: str = WHOLE) -> bool:
        """Whether to run an arm of a case, or the case at all."""
        return (case, arm) not in self.skip


Event = dict[str, Any]


def run(job: Job, device: torch.device) -> Iterator[Event]:
    """Do the job; each event as it happens."""
    if job.quick:
        quick.shrink()
    kinds = {"peaks": _peaks, "accuracy": _accuracy, "rates": _rates, "peers": _peers, "sanitize": _sanitize}
    yield from (kinds | {"block": _block, "rl": _rl, "distill": _distill})[job.kind](job, device)


def _peaks(job: Job, device: torch.device) -> Iterator[Event]:
    session = _session(job, device)
    yield {"note": tables.machine(session)}
    for case in _left(job, session, peaks.cases(device), "rate"):
        yield from _rated(session, case, [Arm("torch", "torch", case.run)])


def _accuracy(job: Job, device: torch.device) -> Iterator[Event]:
    session = _session(job, device, rated=False)
    for case in _cases(job, session, "accuracy"):
        records = []
        for record in measure.prove(session, case):
            records.append(record)
            yield {"record": record.table()}
        if records:
            yield {"note": tables.accuracy(case, records)}


def _rates(job: Job, device: torch.device) -> Iterator[Event]:
    session = _session(job, device)
    affordable = _affordable(job)
    for case in _cases(job, session, "rate"):
        arms = measure.all_arms(session, case, compiled=device.type == "cuda")
        yield from _rated(session, case, affordable(arms))


def _peers(job: Job, device: torch.device) -> Iterator[Event]:
    from reelforge.bench import peers

    session = _session(job, device)
    affordable = _affordable(job)
    found, missing = peers.available(device)
    yield {"note": f"peers: {', '.join(found)}; not here: {'; '.join(missing)}"}
    for case in _left(job, session, peers.cases(found, small=job.quick), "rate"):
        arms = [Arm(name, name, op) for name, op in case.peers.items() if job.wants(case.name, name)]
        yield from _rated(session, case, affordable(arms))


def _affordable(job: Job) -> Callable[[list[Arm]], list[Arm]]:
    """Drops the arms that compile once the budget, which begins now, is too far spent for them."""
    end = time.monotonic() + _COMPILE_UNTIL * job.budget_s
    return lambda arms: [arm for arm in arms if arm.name not in measure.COMPILING or time.monotonic() < end]


def _sanitize(job: Job, device: torch.device) -> Iterator[Event]:
    """Each kernel once on its smallest case, forward and backward: for a memory checker to watch."""
    session = _session(job, device, rated=False)
    for case in quick.smallest(_cases(job, session, "sanitize")):
        for arm in kernel_arms(case):
            if arm.ours and job.wants(case.name, arm.name):
                yield {"note": f"{case.name} {arm.impl}: {measure.run_once(session, case, arm)}"}


def _block(job: Job, device: torch.device) -> Iterator[Event]:
    from reelforge.bench import block

    session = _session(job, device)
    affordable = _affordable(job)
    by_name = {block.case(setting).name: setting for setting in block.settings(small=job.quick)}
    for case in _left(job, session, [block.case(setting) for setting in by_name.values()], "rate"):
        yield from block.events(session, by_name[case.name], affordable)


def _rl(job: Job, device: torch.device) -> Iterator[Event]:
    """RLHF iterations at the frames that the family names."""
    from reelforge.bench import rl_run

    session, frames = _session(job, device), int(job.family)
    if _left(job, session, [rl_run.measured(frames, small=job.quick)], "rate"):
        yield from rl_run.events(session, frames, job.budget_s, small=job.quick)


def _distill(job: Job, device: torch.device) -> Iterator[Event]:
    """Self-forcing cycles with the teacher that the family names."""
    from reelforge.bench import distill_run

    session = _session(job, device)
    if _left(job, session, [distill_run.measured(job.family, small=job.quick)], "rate"):
        yield from distill_run.events(session, job.family, job.budget_s, small=job.quick)


def _rated(session: Session, case: Case, arms: list[Arm]) -> Iterator[Event]:
    records = []
    for record in measure.rates(session, case, arms):
        records.append(record)
        yield {"record": record.table()}
    yield {"note": tables.rates(case, records)}


def _cases(job: Job, session: Session, kind: str) -> list[Case]:
    """What is left of the job's family, the most important first."""
    found = importlib.import_module(f"reelforge.bench.cases.{job.family}").CASES
    if job.quick and session.device.type != "cuda":
        found = quick.smallest(case for case in found if quick.small(case))
    return sorted(_left(job, session, found, kind), key=_rank)


def _left(job: Job, session: Session, cases: Sequence[Case], kind: str) -> list[Case]:
    """Cases that the job wants and an earlier run has not finished."""
    done = _finished(job, session, kind)
    wanted = [case for case in cases if job.wants(case.name) and job.match in case.name]
    return [case for case in wanted if (not job.ops or case.op in job.ops) and case.name not in done]


def _rank(case: Case) -> int:
    for rank, (model, tokens) in enumerate(_FIRST):
        if case.label.startswith(f"{model} {tokens}"):
            return rank
    return 0


def _session(job: Job, device: torch.device, *, rated: bool = True) -> Session:
    session = Session.open(device, rated=rated, begin=_announce, wants=job.wants)
    return quick.session(session) if job.quick else session


def _finished(job: Job, session: Session, kind: str) -> set[str]:
    """Cases that an earlier run recorded on this hardware with the present source."""
    if not job.resume or not Path(job.resume).exists():
        return set()
    records = [entry.record for entry in read(Path(job.resume)) if entry.record is not None]
    return _settled([record for record in records if record.identity.kind == kind and _is_current(record, session)])


def _settled(records: Sequence[Record]) -> set[str]:
    """Cases that need not run again; one that was lost, or whose accuracy failed to run, needs to until it has run."""
    done: set[str] = set()
    lost: set[tuple[str, str]] = set()
    for record in records:
        case, arm = record.identity.case_id, record.identity.arm
        if arm == WHOLE or (record.identity.kind == "accuracy" and record.quality is None):
            lost.add((case, arm))
            continue
        lost -= {(case, arm), (case, WHOLE)}
        if _is_last(record):
            done.add(case)
    return done - {case for case, _ in lost}


def _is_last(record: Record) -> bool:
    """Of its case: warm times come behind cold ones, or accuracy was all that was wanted."""
    return record.identity.kind == "accuracy" or (record.timing is not None and record.timing.l2 == "warm")


def _is_current(record: Record, session: Session) -> bool:
    kernel = f"{record.workload.op}/{record.identity.kernel_impl}"
    here = replace(record, hardware=session.hardware)
    same_source = record.identity.kernel_hash == machine.sources().get(kernel, "")
    return same_source and hardware_profile(record) == hardware_profile(here)


def _announce(record: Record) -> None:
    _emit({"begin": record.table()})


def _emit(event: Event) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Run the job of the command line."""
    job = Job.of(argv[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for event in run(job, device):
        _emit(event)
    _emit({"end": True})
    if job.kind != "sanitize":  # a checker sums up what it saw at a regular exit
        os._exit(0)  # which torch's compile workers and a broken context can keep from ending well
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
