"""Did a change make a kernel slower or hungrier? Two gates over stored records, and one exit code.

Records are comparable within a cohort: the same hardware profile and the same recipe, which is workload, software and
way of measuring. The static gate holds a record to an absolute limit from a file, so that ten small losses do not add
up unseen; the rolling gate holds it to the median of the last baselines of its cohort. There it is worse when it is
worse by a share AND by an amount: 8 % of 5 us is noise, and so are 2 us of 40 ms.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path

from reelforge.bench.record_files import Entry, RecordLog, read
from reelforge.bench.records import OURS, Record, Verdict, fingerprint
from reelforge.engine.core.config import build
from reelforge.engine.core.errors import DataError, ReelforgeError

LIMITS = Path(__file__).with_name("limits.json")
MIN_BASELINES, MAX_BASELINES = 3, 5
TIME_SHARE, TIME_FLOOR_US = 0.08, 1.0
MEMORY_SHARE, MEMORY_FLOOR_MB = 0.05, 256.0


class Status(IntEnum):
    """Verdicts, the graver the higher; the value is the exit code. 1 and 2 stay with crashes and bad input."""

    PASS = 0
    CALIBRATION_NEEDED = 10  # fewer than MIN_BASELINES in the cohort
    RECIPE_MISMATCH = 11  # baselines of this machine, but of another workload, software or way of measuring
    INFRA_ERROR = 12  # unreadable, invalid, throttled or missing
    REGRESSION = 13  # one of the gates is broken


@dataclass(frozen=True)
class Limit:
    """The worst that the static gate allows a case; None allows anything."""

    median_us: float | None = None
    peak_alloc_mb: float | None = None


Limits = Mapping[str, Mapping[str, Limit]]  # GPU name, then case_id


@dataclass(frozen=True)
class Row:
    """One record of ours against its cohort.

    Attributes:
        name: case, arm and L2 state; where the record could not be read, its place.
        status: of this record.
        reason: in words.
        median_us, baseline_us: of the record, and the median over ``baselines`` records.
        verdict: the same for the record's own verdict group.
    """

    name: str
    status: Status
    reason: str
    median_us: float | None = None
    baseline_us: float | None = None
    baselines: int = 0
    verdict: Verdict = Verdict()


@dataclass(frozen=True)
class Comparison:
    """All rows, and the gravest status among them."""

    rows: tuple[Row, ...]

    @property
    def status(self) -> Status:
        return max(row.status for row in self.rows)

    def json(self) -> str:
        """For scripts."""
        rows = [{**asdict(row), "status": row.status.name} for row in self.rows]
        return json.dumps({"status": self.status.name, "exit_code": int(self.status), "rows": rows}, indent=2)

    def table(self) -> str:
        """For people; the gravest rows last, next to the verdict."""
        head = ("status", "case", "us", "baseline us", "change", "of", "why")
        rows = [_cells(row) for row in sorted(self.rows, key=lambda row: row.status)]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join([*(line.rstrip() for line in lines), f"{self.status.name} (exit code {int(self.status)})"])


def _cells(row: Row) -> tuple[str, ...]:
    times = [f"{value:.2f}" if value is not None else "" for value in (row.median_us, row.baseline_us)]
    change = "" if row.verdict.delta_pct is None else f"{row.verdict.delta_pct:+.1f} %"
    return (row.status.name, row.name, *times, change, str(row.baselines or ""), row.reason)


def hardware_profile(record: Record) -> str:
    """Fingerprint of what makes machines interchangeable: a relabelled GPU differs in its SMs or its power limit."""
    gpu = record.hardware
    return fingerprint(gpu.gpu_name, gpu.gpu_capability, gpu.sm_count, gpu.power_limit_w, gpu.ecc, gpu.mig)


def recipe(record: Record) -> str:
    """Fingerprint of workload, software and way of measuring; peers' versions do not matter to our arms."""
    software, timing = record.software, record.timing
    versions = (software.torch, software.triton, software.cuda, software.cudnn, software.env_flags)
    method = None if timing is None else timing.method
    return fingerprint(record.workload, *versions, record.hardware.driver, method, record.identity.config_hash)


def _name(record: Record) -> str:
    arm = "" if record.identity.arm == OURS else f" {record.identity.arm}"
    return f"{record.identity.case_id}{arm} {record.timing.l2 if record.timing else record.identity.kind}"


def read_limits(path: Path) -> Limits:
    """The static gate's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {gpu: {case: build(Limit, limit) for case, limit in cases.items()} for gpu, cases in table.items()}
    except (OSError, json.JSONDecodeError, AttributeError, ReelforgeError) as error:
        raise DataError(f"Limits {path} cannot be read ({error}).", "See docs/benchmarks.md.") from error


def compare_files(base: Path, new: Path, limits: Path = LIMITS, renew: bool = False) -> Comparison:
    """:func:`compare` on files; one that cannot be read is an INFRA_ERROR.

    Args:
        base: earlier records of any commits, machines and recipes.
        new: records to judge.
        limits: the static gate.
        renew: append the new records that could be judged to ``base``, with their verdicts.
    """
    try:
        new_entries = read(new)
        comparison, judged = compare(read(base), new_entries, read_limits(limits))
    except DataError as error:
        return Comparison((Row(str(new), Status.INFRA_ERROR, error.what),))
    if renew:
        with RecordLog(base) as log:
            for record in judged:
                log.append(record)
    return comparison


def compare(base: Iterable[Entry], new: Iterable[Entry], limits: Limits) -> tuple[Comparison, list[Record]]:
    """Judge every new record of ours; peers' are theirs to mend.

    Returns:
        the comparison, and the records that could be judged with their verdicts.
    """
    baselines = [entry.record for entry in base if entry.record and not entry.reasons and _timed(entry.record)]
    entries = [entry for entry in new if entry.record is None or entry.record.identity.ours]
    bad = [entry for entry in entries if entry.reasons]
    sound = [entry.record for entry in entries if entry.record and not entry.reasons and _timed(entry.record)]
    rows = [_judge(record, baselines, limits) for record in sound]
    judged = [replace(record, verdict=row.verdict) for record, row in zip(sound, rows, strict=True)]
    rows += [Row(_entry_name(entry), Status.INFRA_ERROR, "; ".join(entry.reasons)) for entry in bad]
    rows += _vanished(baselines, [entry.record for entry in entries if entry.record])
    return Comparison(tuple(rows) or (Row("", Status.INFRA_ERROR, "there is no new record of ours"),)), judged


def _timed(record: Record) -> bool:
    return record.identity.ours and record.timing is not None


def _entry_name(entry: Entry) -> str:
    return entry.origin if entry.record is None else _name(entry.record)


def _vanished(baselines: Iterable[Record], seen: Iterable[Record]) -> list[Row]:
    """Cases that this machine has baselines of and the new records lack, among the ops that were run."""
    names = {_name(record) for record in seen}
    ran = {(record.workload.op, hardware_profile(record)) for record in seen}
    lost = {_name(old) for old in baselines if (old.workload.op, hardware_profile(old)) in ran} - names
    return [Row(name, Status.INFRA_ERROR, "it has baselines but no new record") for name in sorted(lost)]


def _judge(record: Record, baselines: Iterable[Record], limits: Limits) -> Row:
    same = [old for old in baselines if _name(old) == _name(record)]
    same = [old for old in same if hardware_profile(old) == hardware_profile(record)]
    cohort = sorted((old for old in same if recipe(old) == recipe(record)), key=lambda old: old.identity.timestamp)
    cohort = cohort[-MAX_BASELINES:]
    row = _against(record, cohort)
    over = _over_limits(record, limits)
    if over:
        row = replace(row, status=Status.REGRESSION, reason="; ".join(over))
    elif same and not cohort:
        row = replace(row, status=Status.RECIPE_MISMATCH, reason=f"{len(same)} baselines, all of another recipe")
    elif len(cohort) < MIN_BASELINES:
        row = replace(row, status=Status.CALIBRATION_NEEDED, reason=f"{len(cohort)} baselines, not {MIN_BASELINES}")
    return replace(row, verdict=replace(row.verdict, status=row.status.name))


def _over_limits(record: Record, limits: Limits) -> list[str]:
    """The static gate, for the arm that users get."""
    limit = limits.get(record.hardware.gpu_name or "", {}).get(record.identity.case_id)
    if limit is None or record.identity.arm != OURS:
        return []
    median_us, memory_mb = _measured(record)
    reasons = []
    if limit.median_us is not None and median_us > limit.median_us:
        reasons.append(f"{median_us:.2f} us are above the limit of {limit.median_us:g}")
    if limit.peak_alloc_mb is not None and memory_mb is not None and memory_mb > limit.peak_alloc_mb:
        reasons.append(f"{memory_mb:.0f} MB are above the limit of {limit.peak_alloc_mb:g}")
    return reasons


def _against(record: Record, cohort: list[Record]) -> Row:
    """The rolling gate."""
    median_us, memory_mb = _measured(record)
    row = Row(_name(record), Status.PASS, "", median_us, baselines=len(cohort))
    if not cohort:
        return row
    usual_us = statistics.median(_measured(old)[0] for old in cohort)
    used_mb = [used for _, used in map(_measured, cohort) if used is not None]
    change, reasons = median_us - usual_us, []
    if _worse(median_us, usual_us, TIME_SHARE, TIME_FLOOR_US):
        reasons.append(f"slower by {change:.2f} us")
    if memory_mb is not None and used_mb:
        usual_mb = statistics.median(used_mb)
        if _worse(memory_mb, usual_mb, MEMORY_SHARE, MEMORY_FLOOR_MB):
            reasons.append(f"{memory_mb:.0f} MB instead of {usual_mb:.0f}")
    if _worse(usual_us, median_us, TIME_SHARE, TIME_FLOOR_US) and not reasons:
        row = replace(row, reason=f"faster by {-change:.2f} us")
    if reasons:
        row = replace(row, status=Status.REGRESSION, reason="; ".join(reasons))
    cohort_id = fingerprint(hardware_profile(record), recipe(record))
    verdict = Verdict(None, f"{cohort_id}/{len(cohort)}", 100 * change / usual_us, change)
    return replace(row, baseline_us=usual_us, verdict=verdict)


def _measured(record: Record) -> tuple[float, float | None]:
    assert record.timing is not None, "only timed records are compared"
    return record.timing.median_us, record.memory.peak_alloc_mb


def _worse(value: float, usual: float, share: float, amount: float) -> bool:
    """By more than the share and by more than the amount; exactly as much is not worse."""
    return value - usual > share * usual and value - usual > amount
