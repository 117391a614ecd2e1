"""What the compile gate found, what it must find, and the stored tables it is compared with.

A stored table, ``records/gate/<compiler>.json``, has one launch a line. A launch is known by its case and its kernel,
so that a tile that was tuned is compared with the one before it.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from reelforge.bench.sass import wide_share
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.files import make_folder, replace_file

FOLDER = Path(__file__).parent / "records/gate"

MAX_REGISTERS = 255
MAX_SHARED = 232_448  # bytes that one block may have on sm_90
MAX_GRID = (2**31 - 1, 65_535, 65_535)
GROWTH = 8  # registers; they are handed out eight at a time
MIN_WIDE_SHARE = 0.5  # of the bytes a memory-bound kernel moves; the rest is scalars, row sums and the like
_TINY = ("LDG.8", "LDG.16", "STG.8", "STG.16")
KEPT = ("HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "LDG.128", "STG.128", "LDGSTS.128")


@dataclass(frozen=True)
class Row:
    """One distinct launch and its code, or a case that has none.

    Attributes:
        kernel: module and function; empty for a refusal.
        cases: that launch it.
        types: of the arguments at run time.
        constants: the arguments at compile time.
        warps: of a program.
        stages: of its pipelined loops.
        options: of the compiler, where not the default.
        grid: of programs, the largest of the cases.
        source: hash of the kernel's module.
        registers: of a thread.
        stack: bytes of a thread's local memory.
        shared: bytes of a program.
        counts: instructions, see ``bench.sass``.
        error: why it does not compile.
        refusal: why the Triton implementation does not take the case.
    """

    kernel: str
    cases: tuple[str, ...]
    types: str = ""
    constants: str = ""
    warps: int = 0
    stages: int = 0
    options: str = ""
    grid: tuple[int, ...] = ()
    source: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""
    refusal: str = ""

    @classmethod
    def of(cls, table: dict[str, Any]) -> Self:
        """The row of a table that :meth:`table` made.

        Raises:
            TypeError: it has other keys.
        """
        return cls(**{"kernel": "", **table, "cases": tuple(table["cases"]), "grid": tuple(table.get("grid", ()))})

    def but(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def table(self) -> dict[str, Any]:
        """As JSON, without what is empty."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name)}

    @property
    def label(self) -> str:
        return _label(self.kernel, self.cases)


@dataclass(frozen=True)
class Report:
    """What one compiler made of all cases.

    Attributes:
        compiler: its name and version; names the stored table.
        rows: launches, then refusals.
        needs: by case, the instruction that must do its work, ``"memory"``, or nothing.
        never_launched: kernels that no case launches.
    """

    compiler: str
    rows: Sequence[Row]
    needs: dict[str, str] = field(default_factory=dict)
    never_launched: Sequence[str] = ()

    def table(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.table() for row in self.rows]}

    @classmethod
    def of(cls, table: dict[str, Any]) -> Self:
        return cls(**{**table, "rows": [Row.of(row) for row in table["rows"]]})


@dataclass(frozen=True)
class Problem:
    """Why the gate is shut.

    Attributes:
        text: what is wrong, the value and the limit.
        row: of the table; None where no row has it.
        new: only not in the stored table yet.
    """

    text: str
    row: Row | None = None
    new: bool = False


def stored(compiler: str) -> list[Row] | None:
    """The stored table of a compiler, None if there is none.

    Raises:
        DataError: the file is not such a table.
    """
    path = FOLDER / f"{compiler}.json"
    if not path.exists():
        return None
    try:
        return [Row.of(table) for table in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a table of the gate ({error}).", "Restore it or --update.") from error


def store(report: Report) -> None:
    """Make ``report`` the stored table of its compiler.

    Raises:
        StorageError: the disk refused.
    """
    lines = ",\n".join(json.dumps(row.table()) for row in report.rows if not row.error)
    replace_file(make_folder(FOLDER) / f"{report.compiler}.json", f"[\n{lines}\n]\n")


# -- rules that hold without a stored table ---------------------------------------------------------------------------


def broken_rules(report: Report) -> list[Problem]:
    """What no kernel may do."""
    problems = [Problem(f"{name} is launched by no case; add one to bench/cases.") for name in report.never_launched]
    for row in report.rows:
        problems += [Problem(f"{row.label} {fault}", row) for fault in _faults(row, report.needs)]
    return problems + _missing_tensor_cores(report)


def _faults(row: Row, needs: dict[str, str]) -> Iterable[str]:
    if row.refusal:
        return []
    return [f"does not compile: {row.error}"] if row.error else [*_code_faults(row), *_need_faults(row, needs)]


def _code_faults(row: Row) -> Iterable[str]:
    loads, stores = row.counts.get("LDL", 0), row.counts.get("STL", 0)
    if row.stack or loads or stores:
        yield f"spills: {row.stack} B of stack, {loads} local loads, {stores} local stores; limit 0."
    if row.registers > MAX_REGISTERS:
        yield f"takes {row.registers} registers; limit {MAX_REGISTERS}."
    if row.shared > MAX_SHARED:
        yield f"takes {row.shared} B of shared memory; limit {MAX_SHARED}."
    for axis, (size, limit) in enumerate(zip(row.grid, MAX_GRID, strict=False)):
        if size > limit:
            yield f"has {size} programs along axis {axis} of its grid; limit {limit}."


def _need_faults(row: Row, needs: dict[str, str]) -> Iterable[str]:
    needed = {needs.get(case, "") for case in row.cases}
    if needed & {"HGMMA", "QGMMA"} and row.counts.get("HMMA"):
        yield f"multiplies by {row.counts['HMMA']} HMMA, Ampere's instruction; limit 0."
    products = row.counts.get("HGMMA", 0) + row.counts.get("QGMMA", 0)
    if row.counts.get("WARPGROUP", 0) > products:
        # ptxas found an accumulator in use between two products and made every one of them wait (C7510, C7515).
        yield f"waits {row.counts['WARPGROUP']} times for {products} tensor-core products: they run one by one."
    if "memory" in needed and _aligned(row):
        share, tiny = wide_share(row.counts), sum(row.counts.get(kind, 0) for kind in _TINY)
        if share < MIN_WIDE_SHARE:
            yield f"moves {share:.0%} of its bytes 16 at a time; limit {MIN_WIDE_SHARE:.0%}."
        if tiny:
            yield f"has {tiny} global accesses of one or two bytes; limit 0."


def _aligned(row: Row) -> bool:
    return all(kind.endswith("/16") for kind in row.types.split() if kind.startswith("*"))


def _missing_tensor_cores(report: Report) -> list[Problem]:
    kernels: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        for case in row.cases if row.kernel and not row.error else ():
            kernels[case].append(row)
    return [
        Problem(f"{kernels[case][0].kernel} [{case}] has 0 {need}; limit at least 1.", kernels[case][0])
        for case, need in report.needs.items()
        if need not in ("", "memory") and case in kernels and not any(row.counts.get(need) for row in kernels[case])
    ]


# -- comparison with the stored table ---------------------------------------------------------------------------------


def regressions(report: Report, before: Sequence[Row] | None) -> list[Problem]:
    """What got worse than the stored table, vanished from it or is not in it."""
    if before is None:
        text = f"There is no stored table for {report.compiler}; --update writes one."
        return [Problem(text, new=True)] if report.rows else []
    problems = []
    for row, matches, unknown in pair(report.rows, before):
        if unknown:
            state = f"is refused ({row.refusal})" if row.refusal else "is launched"
            text = f"{_label(row.kernel, unknown)} {state}, which the stored table lacks; --update adds it."
            problems.append(Problem(text, row, new=True))
        faults = [fault for match in matches for fault in _worse(row, match)]
        problems += [Problem(f"{row.label} {fault}", row) for fault in dict.fromkeys(faults)]
    for row, _, gone in pair(before, report.rows):
        if gone:
            state = "refused" if row.refusal else "launched"
            problems.append(Problem(f"{_label(row.kernel, gone)} is no longer {state}, as the stored table has it."))
    return problems


def pair(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, list[Row], list[str]]]:
    """Each row with its counterparts among ``others``, and its cases that have none.

    A counterpart has the same kernel at the same place among the kernel's launches in the same case.
    """
    counterparts = {place: other for other, places in _places(others) for place in places}
    return [
        (
            row,
            [counterparts[place] for place in places if place in counterparts],
            [place.case for place in places if place not in counterparts],
        )
        for row, places in _places(rows)
    ]


class _Place(NamedTuple):
    case: str
    kernel: str
    nth: int


def _places(rows: Sequence[Row]) -> list[tuple[Row, list[_Place]]]:
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for row in rows:
        keys = [(case, row.kernel) for case in row.cases]
        result.append((row, [_Place(*key, seen[key]) for key in keys]))
        seen.update(keys)
    return result


def _worse(row: Row, before: Row) -> Iterable[str]:
    if row.error or row.refusal:
        return
    if row.options != before.options:
        yield f"is compiled with [{row.options}]; stored [{before.options}]."
    origin = "its source changed" if row.source != before.source else "its source is the same"
    limit = before.registers + GROWTH
    if row.registers > limit:
        yield f"takes {row.registers} registers; limit {limit}, the stored {before.registers} and {GROWTH} ({origin})."
    for kind in KEPT:
        now, then = row.counts.get(kind, 0), before.counts.get(kind, 0)
        if now < then:
            yield f"has {now} {kind}; limit at least the stored {then} ({origin})."


def _label(kernel: str, cases: Sequence[str]) -> str:
    where = cases[0] + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
    return f"{kernel} [{where}]" if kernel else where
