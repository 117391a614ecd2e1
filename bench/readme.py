"""The README's table: each op at its largest size, made from records and put between two marker comments."""

from collections.abc import Sequence
from pathlib import Path

from reelforge.bench.record_files import Entry
from reelforge.bench.records import OURS
from reelforge.bench.report import (
    NO_RECORD,
    NONE,
    Group,
    error_cell,
    groups,
    machine_line,
    machines,
    number,
    percent,
    ratio_cell,
    table,
)
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.files import replace_file

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_HEAD = ("op", "largest case", "us", "of measured peak", "rel-L2", "best peer", "peer over ours", "least of all cases")


def summary(entries: Sequence[Entry]) -> str:
    """Each op's largest case with a cold L2, and its least ratio to any peer over all its cases."""
    parts = []
    for records in machines(entries).values():
        kinds: dict[tuple[str, bool], list[Group]] = {}
        for group in groups(records):
            if group.ours is not None and group.l2 == "cold":
                workload = group.ours.workload
                kinds.setdefault((workload.op, workload.backward), []).append(group)
        if kinds:
            note = f"{machine_line(records)}; peer over ours: ratio of times with p20 and p80, above 1 ours is faster."
            parts += [*table(_HEAD, map(_row, kinds.values()), 2), note, ""]
    return "\n".join(parts).rstrip() or NO_RECORD


def _row(found: Sequence[Group]) -> list[str]:
    largest = max(found, key=lambda group: group.first.workload.bytes)
    record = largest.arms[OURS]
    peer = min(largest.ratios, key=lambda arm: largest.ratios[arm].median, default=None)
    least = min((ratio.median for group in found for ratio in group.ratios.values()), default=None)
    return [
        record.workload.op,
        largest.label,
        number(largest.microseconds(OURS)),
        percent(record.derived.pct_measured_peak),
        error_cell(record.quality.rel_l2 if record.quality else None),
        peer or NONE,
        ratio_cell(largest.ratios[peer] if peer else None),
        NONE if least is None else f"{least:.2f}",
    ]


def update(entries: Sequence[Entry], path: Path) -> None:
    """Put :func:`summary` between the two comments of a Markdown file.

    Raises:
        DataError: the file cannot be read or has no such comments.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{path} has no {BEGIN} ... {END}.", "Put the two comments where the table belongs.")
    replace_file(path, f"{head}{begin}\n{summary(entries)}\n{end}{tail}")
