"""Which kernels are proven: those whose present source passed every accuracy case on real hardware of a class.

``kernels.dispatch`` never chooses a kernel of ours by default that is not in ``bench/records/proven.json``; this writes
that table from records. A kernel is proven when, on GPUs of one compute capability, each of its cases has a valid
record of the present source, none has a failed one, and backward cases are among them where the op has some. A
failure of the present source takes an earlier proof back.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelforge.bench import machine
from reelforge.bench.cases.catalogue import all_cases
from reelforge.bench.records import Record, accuracy_faults, validate
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
    outcomes = judge(records, machine.sources(), {case.op for case in cases if case.backward})
    if not check:
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        replace_file(path, json.dumps(updated(table, outcomes, machine.sources()), indent=2, sort_keys=True) + "\n")
        dispatch.proven.cache_clear()
    return outcomes


def judge(records: Iterable[Record], sources: Mapping[str, str], with_backward: Collection[str]) -> list[Outcome]:
    """An outcome for each kernel and class.

    Args:
        records: what was measured.
        sources: ``op/implementation`` to its present source hash.
        with_backward: ops that have backward cases.
    """
    kernels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.identity.ours and record.identity.kernel_hash:
            kernel = f"{record.workload.op}/{record.identity.kernel_impl}"
            kernels.setdefault((kernel, record.hardware.gpu_capability or ""), []).append(record)
    return [_judge(*key, part, sources, with_backward) for key, part in kernels.items()]


def _judge(
    kernel: str, hardware: str, records: list[Record], sources: Mapping[str, str], with_backward: Collection[str]
) -> Outcome:
    if not hardware:
        return Outcome(kernel, hardware, "refused", "not run on a GPU")
    records = [record for record in records if record.identity.kernel_hash == sources.get(kernel)]
    if not records:
        return Outcome(kernel, hardware, "refused", "its source is another one now" if kernel in sources else "unknown")
    failed = _reasons((record, accuracy_faults(record)) for record in records)
    if failed:
        return Outcome(kernel, hardware, "disproved", failed)
    sound = {record.identity.case_id for record in records if not validate(record)}
    invalid = _reasons((record, validate(record)) for record in records if record.identity.case_id not in sound)
    if invalid:
        return Outcome(kernel, hardware, "refused", invalid)
    if kernel.split("/")[0] in with_backward and not any(record.workload.backward for record in records):
        return Outcome(kernel, hardware, "refused", "its backward pass has no record")
    return Outcome(kernel, hardware, "promoted", f"{len(sound)} cases passed")


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
