"""Markdown from records: arms side by side, rates against the roofs, ratios, what is slower, and what is not valid.

Every number comes out of a record; nothing here is typed by hand. Of several records of one case, arm, L2 state and
machine the latest valid one counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reelforge.bench import roofline
from reelforge.bench.compare import hardware_profile
from reelforge.bench.record_files import Entry
from reelforge.bench.records import OURS, Ratio, Record
from reelforge.engine.core.files import make_folder, replace_file

NO_RECORD = "No GPU record exists yet: nothing here has been timed on a GPU."
NONE = "–"
_KEY = (
    "Times are medians of one call; the floor is what the arithmetic model leaves at the roof. Ratios are of times, "
    'round by round, with their 20 % and 80 % quantiles: "x over ours" above 1 means ours is faster. Cold: L2 was '
    "overwritten first."
)


@dataclass(frozen=True)
class Group:
    """The arms of one case in one L2 state.

    Attributes:
        l2: ``"cold"`` or ``"warm"``.
        arms: by name, ours first.
    """

    l2: str
    arms: dict[str, Record]

    @property
    def first(self) -> Record:
        return next(iter(self.arms.values()))

    @property
    def ours(self) -> Record | None:
        return self.arms.get(OURS)

    @property
    def label(self) -> str:
        workload = self.first.workload
        return workload.label + (" backward" if workload.backward else "")

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Peers' times over ours, for the peers whose own record is valid."""
        found = self.ours.derived.ratio_vs if self.ours is not None else {}
        return {arm: ratio for arm, ratio in found.items() if arm in self.arms}

    def microseconds(self, arm: str) -> float | None:
        record = self.arms.get(arm)
        return record.timing.median_us if record is not None and record.timing is not None else None


def groups(records: Iterable[Record]) -> list[Group]:
    """The timed records by case and L2 state, in order of appearance."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if record.timing is not None:
            arms = found.setdefault((record.identity.case_id, record.timing.l2), {})
            known = arms.get(record.identity.arm)
            if known is None or known.identity.timestamp <= record.identity.timestamp:
                arms[record.identity.arm] = record
    return [Group(l2, dict(sorted(arms.items(), key=lambda arm: arm[0] != OURS))) for (_, l2), arms in found.items()]


def write(entries: Sequence[Entry], path: Path, picture: str = ".svg") -> None:
    """The report, and beside it a roofline picture of every machine.

    Raises:
        StorageError: the disk refused.
    """
    pictures: dict[str, str] = {}
    make_folder(path.parent)
    for number, (profile, records) in enumerate(machines(entries).items()):
        if roofline.drawable(records):
            pictures[profile] = f"{path.stem}-roofline{number or ''}{picture}"
            roofline.draw(records, machine_line(records), path.with_name(pictures[profile]))
    replace_file(path, render(entries, pictures))


def render(entries: Sequence[Entry], pictures: dict[str, str] | None = None) -> str:
    """The report as Markdown.

    Args:
        entries: of all files.
        pictures: hardware profile to its roofline's file.
    """
    parts = ["# Benchmarks", ""]
    by_machine = machines(entries)
    on_gpu = any(records[-1].hardware.gpu_name for records in by_machine.values())
    parts += [] if on_gpu else [NO_RECORD, ""]
    for profile, records in by_machine.items():
        parts += [f"## {_name(records[-1])}", "", machine_line(records), "", _KEY, ""]
        if pictures and profile in pictures:
            parts += [f"![Roofline]({pictures[profile]})", ""]
        found = groups(records)
        for op in dict.fromkeys(group.first.workload.op for group in found):
            parts += _op_section(op, [group for group in found if group.first.workload.op == op])
        parts += _losses(found) + _accuracy(records)
    return "\n".join(parts + _invalid(entries)).rstrip() + "\n"


def machines(entries: Iterable[Entry]) -> dict[str, list[Record]]:
    """Valid records by hardware profile."""
    found: dict[str, list[Record]] = {}
    for entry in entries:
        if entry.record is not None and not entry.reasons:
            found.setdefault(hardware_profile(entry.record), []).append(entry.record)
    return found


def machine_line(records: Sequence[Record]) -> str:
    """What the records were taken on, and when."""
    gpu, software = records[-1].hardware, records[-1].software
    days = sorted(record.identity.timestamp[:10] for record in records)
    facts = [
        _name(records[-1]),
        f"{gpu.sm_count} SMs" if gpu.sm_count else "",
        f"{gpu.power_limit_w:.0f} W" if gpu.power_limit_w else "",
        f"driver {gpu.driver}" if gpu.driver else "",
        f"torch {software.torch}",
        f"triton {software.triton}" if software.triton else "",
        f"CUDA {software.cuda}" if software.cuda else "",
        f"cuDNN {software.cudnn}" if software.cudnn else "",
        "source " + ", ".join(sorted({_source(record) for record in records})),
        " to ".join(dict.fromkeys((days[0], days[-1]))),
    ]
    return ", ".join(filter(None, facts))


def _name(record: Record) -> str:
    return record.hardware.gpu_name or f"{record.hardware.host_cpu}, no GPU"


def _source(record: Record) -> str:
    return (record.identity.git_sha or "unknown") + ("+dirty" if record.identity.dirty else "")


# -- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown; all columns but the first ``left`` are numbers."""
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] + [""]


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f} %"


def ratio_cell(ratio: Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio.median:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]"


def error_cell(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def _op_section(op: str, found: Sequence[Group]) -> list[str]:
    arms = list(dict.fromkeys(arm for group in found for arm in group.arms))
    peers = [arm for arm in arms if arm != OURS]
    times = []
    for group in found:
        derived = (group.ours or group.first).derived
        floor = [number(derived.floor_us), derived.bound or NONE]
        medians = [number(group.microseconds(arm)) for arm in arms]
        times.append([group.label, group.l2, *floor, *medians, *(ratio_cell(group.ratios.get(arm)) for arm in peers)])
    head = ["case", "L2", "floor us", "bound", *(f"{arm} us" for arm in arms), *(f"{arm} over ours" for arm in peers)]
    detail = [_detail(group.label, record) for group in found for record in group.arms.values()]
    columns = ("case", "L2", "arm", "us [p20, p80]", "GB/s", "TF/s", "of datasheet", "of measured peak", "rel-L2",
               "SM MHz", "inside the timer")  # fmt: skip
    return [f"### {op}", "", *table(head, times, 2), *table(columns, detail, 3)]


def _detail(label: str, record: Record) -> list[str]:
    timing, derived, quality, stamps = record.timing, record.derived, record.quality, record.stamps
    assert timing is not None and quality is not None and stamps is not None, "valid and timed"
    clock = stamps.sm_clock_mhz
    implementation = f" ({record.identity.kernel_impl})" if record.identity.ours else ""
    return [
        label,
        timing.l2,
        record.identity.arm + implementation,
        f"{number(timing.median_us)} [{number(timing.p20)}, {number(timing.p80)}]",
        number(derived.gbps),
        number(derived.tflops) if record.workload.flops else NONE,
        percent(derived.pct_datasheet),
        percent(derived.pct_measured_peak),
        error_cell(quality.rel_l2),
        number(clock.med if clock else None, 4),
        " + ".join(record.workload.inside_timer),
    ]


def _losses(found: Sequence[Group]) -> list[str]:
    pairs = [(group, arm, ratio) for group in found for arm, ratio in group.ratios.items()]
    lost = sorted((pair for pair in pairs if pair[2].median < 1), key=lambda pair: pair[2].median)
    if not pairs:
        return []
    lines = ["### Where a peer is faster", "", f"{len(lost)} of {len(pairs)} comparisons.", ""]
    rows = [[f"{g.first.workload.op} {g.label}", g.l2, arm, ratio_cell(ratio)] for g, arm, ratio in lost]
    return lines + (table(("case", "L2", "peer", "peer over ours"), rows, 3) if rows else [])


def _accuracy(records: Sequence[Record]) -> list[str]:
    """Worst error of every implementation of ours, over rates and accuracy runs."""
    kernels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.identity.ours and record.quality is not None:
            kernels.setdefault((record.workload.op, record.identity.kernel_impl), []).append(record)
    rows = []
    for (op, implementation), part in sorted(kernels.items()):
        worst = max(
            (record.quality for record in part if record.quality), key=lambda q: (q.rel_l2 or 0.0) - q.tolerance
        )
        cases = len({record.identity.case_id for record in part})
        rows.append([op, implementation, str(cases), error_cell(worst.rel_l2), error_cell(worst.tolerance)])
    head = ("op", "implementation", "cases", "worst rel-L2", "its tolerance")
    return ["### Accuracy against fp64", "", *table(head, rows, 2)] if rows else []


def _invalid(entries: Iterable[Entry]) -> list[str]:
    rows = []
    for entry in entries:
        if entry.reasons:
            identity = entry.record.identity if entry.record else None
            case, arm = (identity.case_id, identity.arm) if identity else (NONE, NONE)
            why = "; ".join(entry.reasons).replace("|", "\\|")
            rows.append([Path(entry.origin).name, case, arm, why, *_refused(entry.record)])
    head = ("line", "case", "arm", "why", "L2", "us", "others over it")
    lines = [
        "## Invalid records, in no table above",
        "",
        "Their times are shown to be looked into, not to be quoted.",
        "",
    ]
    return [*lines, *table(head, rows, 5)] if rows else []


def _refused(record: Record | None) -> list[str]:
    """L2 state, median and ratios of what is not valid."""
    if record is None or record.timing is None:
        return [NONE] * 3
    ratios = "; ".join(f"{arm} {ratio_cell(ratio)}" for arm, ratio in record.derived.ratio_vs.items())
    return [record.timing.l2, number(record.timing.median_us), ratios or NONE]
