"""Which kernels are proven: those whose present source passed every accuracy case on real hardware of a class.

``kernels.dispatch`` never chooses a kernel of ours by default that is not in ``bench/records/proven.json``; this writes
that table from records. A kernel is proven when, on GPUs of one compute capability, every case of the catalogue that it
serves, forward and backward, has a valid record of the present source, and none a failed one. Records of quick runs or
of other sizes than the catalogue's prove nothing. A failure of the present source takes an earlier proof back.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reelforge.bench import machine
from reelforge.bench.cases.case import Case, Draw
from reelforge.bench.cases.catalogue import all_cases
from reelforge.bench.records import MIN_ROUNDS, Record, accuracy_faults, fingerprint, validate
from reelforge.engine.core.files import replace_file
from reelforge.kernels import dispatch

PROVEN = Path(__file__).parent / "records/proven.json"


@dataclass(frozen=True)
class Outcome:
    """What the records say of one kernel on one class of hardware.

    Attributes:
        kernel: ``op/implementation``.
        hardware: compute capability; empty for a CPU.
        state: ``"refused"`` leaves the table as it is, ``"disproved"`` takes the kernel out of it.
        reason: in words.
    """

    kernel: str
    hardware: str
    state: Literal["promoted", "refused", "disproved"]
    reason: str

    def __str__(self) -> str:
        return f"{self.state:<9}  {self.kernel} on {self.hardware or 'a CPU'}: {self.reason}"


def promote(records: Iterable[Record], path: Path = PROVEN, check: bool = False) -> list[Outcome]:
    """Judge the kernels that have records and write the table.

    Args:
        records: of any arms; peers' are passed by.
        path: the table; made when there is none.
        check: judge only.

    Returns:
        an outcome a kernel and class, in the order of the records.

    Raises:
        StorageError: the table cannot be written.
    """
    cases = all_cases()  # which registers the kernels
    outcomes = judge(records, machine.sources(), cases)
    if not check:
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        replace_file(path, json.dumps(updated(table, outcomes, machine.sources()), indent=2, sort_keys=True) + "\n")
        dispatch.forget()
    return outcomes


def judge(records: Iterable[Record], sources: Mapping[str, str], cases: Sequence[Case]) -> list[Outcome]:
    """An outcome for each kernel and class.

    Args:
        records: what was measured.
        sources: ``op/implementation`` to its present source hash.
        cases: of every op.
    """
    kernels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.identity.ours and record.identity.kernel_hash:
            kernel = f"{record.workload.op}/{record.identity.kernel_impl}"
            kernels.setdefault((kernel, record.hardware.gpu_capability or ""), []).append(record)
    return [_judge(*key, part, sources, cases) for key, part in kernels.items()]


def _judge(
    kernel: str, hardware: str, records: list[Record], sources: Mapping[str, str], cases: Sequence[Case]
) -> Outcome:
    if not hardware:
        return Outcome(kernel, hardware, "refused", "not run on a GPU")
    if kernel not in sources:
        return Outcome(kernel, hardware, "refused", "unknown")
    records = [record for record in records if record.identity.kernel_hash == sources[kernel]]
    if not records:
        return Outcome(kernel, hardware, "refused", "its source is another one now")
    failed = _reasons((record, accuracy_faults(record)) for record in records)
    if failed:
        return Outcome(kernel, hardware, "disproved", failed)
    wanted = served(kernel, cases)
    lacks = [f"{case.name} ({reason})" for case in wanted if (reason := _lacks(case, records))]
    if lacks or not wanted:
        which = ", ".join(lacks) or "the catalogue has none"
        reason = f"{len(lacks)} of {len(wanted)} cases are not proven: {which}"
        return Outcome(kernel, hardware, "refused", reason)
    return Outcome(kernel, hardware, "promoted", f"{len(wanted)} cases passed")


def served(kernel: str, cases: Sequence[Case]) -> list[Case]:
    """The cases of the op that the implementation serves.

    One that serves none here lacks this machine's GPU or library, which tells nothing of the cases: it has them all.
    """
    op, _, name = kernel.partition("/")
    (unfit,) = (entry.unfit for entry in dispatch.registered()[op] if entry.name == name)
    found = [case for case in cases if case.op == op]
    return [case for case in found if unfit(query(case)) is None] or found


class _Asked(Exception):
    """Carries a query out of the op that asked it."""


def query(case: Case) -> dispatch.Query:
    """What the case asks of dispatch on a GPU."""

    def ask(op: str, query: dispatch.Query) -> str:
        if op == case.op:
            raise _Asked(query._replace(device="cuda"))
        return dispatch.REFERENCE

    with FakeTensorMode(), patch.object(dispatch, "choose", ask), torch.set_grad_enabled(case.backward):
        try:
            case.run(*case.inputs(Draw(torch.device("cpu"), None)))
        except _Asked as asked:
            return asked.args[0]
    raise AssertionError(f"{case.name} runs without asking for {case.op}")


def _lacks(case: Case, records: Iterable[Record]) -> str:
    """Why the records do not prove the case; empty when one does."""
    reason = "no record"
    for record in records:
        if record.identity.case_id == case.name:
            faults = validate(record) + _differences(record, case)
            if not faults:
                return ""
            reason = faults[0]
    return reason


def _differences(record: Record, case: Case) -> list[str]:
    """What was measured instead of the case: sizes are miniature in quick runs."""
    work, quality = record.workload, record.quality
    same = (work.bytes, work.flops, work.backward) == (case.work.bytes, case.work.flops, case.backward)
    reasons = [] if same else ["of another size"]
    if quality is not None and quality.tolerance > case.tolerance:
        reasons.append(f"its tolerance {quality.tolerance:.3g} is above the case's {case.tolerance:.3g}")
    quick = fingerprint({"rounds": MIN_ROUNDS, "seed": work.seed})
    return reasons + (["of a quick run"] if record.identity.config_hash == quick else [])


def _reasons(faults: Iterable[tuple[Record, list[str]]]) -> str:
    """The first faulty case and how many there are."""
    found = {record.identity.case_id: reasons[0] for record, reasons in faults if reasons}
    first = next(iter(found.items()), None)
    return "" if first is None else f"{len(found)} cases failed, first {first[0]}: {first[1]}"


def updated(
    table: Mapping[str, Mapping[str, str]], outcomes: Iterable[Outcome], sources: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The table of proven kernels with the outcomes put in."""
    result = {kernel: dict(classes) for kernel, classes in table.items()}
    for outcome in outcomes:
        if outcome.state == "promoted":
            result.setdefault(outcome.kernel, {})[outcome.hardware] = sources[outcome.kernel]
        elif outcome.state == "disproved":
            result.get(outcome.kernel, {}).pop(outcome.hardware, None)
    return {kernel: classes for kernel, classes in result.items() if classes}
