"""What a measuring process prints: a table a case, the model's floor beside every time."""

from collections.abc import Sequence

import torch

from reelforge.bench import cost
from reelforge.bench.cases.case import Case
from reelforge.bench.records import OURS, Record
from reelforge.bench.session import Session

_HEAD = ("arm", "L2", "us", "p20", "p80", "GB/s", "TF/s", "% sheet", "% peak", "rel-L2", "x ours", "host us", "SM MHz")


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; all but the first are numbers."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]


def rates(case: Case, records: Sequence[Record]) -> str:
    """The arms of a case side by side, and what is in the timer."""
    timed = [record for record in records if record.timing is not None]
    title = case.name
    if timed:
        derived = timed[0].derived
        inside = " + ".join(timed[0].workload.inside_timer)
        title += f": floor {derived.floor_us:.4g} us ({derived.bound}){_waves(timed[0])}"
        title += f"; timed: {inside}, launches ahead of the GPU"
    rows = [_row(record, timed) for record in timed]
    failed = [f"  {record.identity.arm}: {record.verdict.status}" for record in records if record.verdict.status]
    table = [f"  {line}" for line in lines(_HEAD, rows)] if rows else []
    return "\n".join([title, *table, *failed])


def _waves(record: Record) -> str:
    """What a grid of attention loses in its last wave, on a GPU whose multiprocessors are known."""
    work, sms = record.workload, record.hardware.sm_count
    if not (work.op.startswith("attention") and work.tokens and work.heads and sms):
        return ""
    grid = cost.attention_waves(work.tokens, work.heads, sms=sms)
    return f", 128-row CTAs fill {100 * grid.efficiency:.0f} % of {grid.waves} waves"


def _row(record: Record, timed: Sequence[Record]) -> list[str]:
    timing, derived, quality, stamps = record.timing, record.derived, record.quality, record.stamps
    assert timing is not None and quality is not None, "timed after its accuracy was"
    # The latest of ours: its ratios are to all arms.
    ours = next((r for r in reversed(timed) if r.identity.arm == OURS and r.timing and r.timing.l2 == timing.l2), None)
    ratio = ours.derived.ratio_vs.get(record.identity.arm) if ours is not None else None
    clock = stamps.sm_clock_mhz if stamps is not None else None
    return [
        record.identity.arm + ("" if quality.gate == "pass" else " WRONG"),
        f"{timing.l2} {timing.method}",
        *(_number(value) for value in (timing.median_us, timing.p20, timing.p80, derived.gbps, derived.tflops)),
        *(_number(value) for value in (derived.pct_datasheet, derived.pct_measured_peak)),
        f"{quality.rel_l2:.1e}",
        "" if ratio is None else f"{ratio.median:.2f}",
        _number(timing.host_us),
        _number(clock.med if clock is not None else None),
    ]


def accuracy(case: Case, records: Sequence[Record]) -> str:
    """One line an arm: relative L2 error against its tolerance."""
    found = []
    for record in records:
        quality = record.quality
        if quality is None or quality.rel_l2 is None:
            found.append(f"  {case.name} {record.identity.kernel_impl}: {record.verdict.status}")
            continue
        facts = f"rel-L2 {quality.rel_l2:.1e} of {quality.tolerance:.1e}, largest error {quality.max_abs:.1e}"
        found.append(f"  {case.name} {record.identity.kernel_impl}: {quality.gate}, {facts}")
    return "\n".join(found)


def machine(session: Session) -> str:
    """The machine and its peaks."""
    gpu, software, peak = session.hardware, session.software, session.measured
    facts = [
        gpu.gpu_name or f"no GPU, {gpu.host_cpu}",
        f"driver {gpu.driver}, {gpu.power_limit_w} W, ECC {gpu.ecc}, MIG {gpu.mig}" if gpu.gpu_name else "",
        f"torch {software.torch}, triton {software.triton}, CUDA {software.cuda}, cuDNN {software.cudnn}",
        f"no clock stamps: {session.nvml}" if isinstance(session.nvml, str) else "",
        "" if peak is None else _peak(peak),
    ]
    return "\n".join(filter(None, facts))


def _peak(peak: cost.Peak) -> str:
    bf16, fp8 = (peak.flops[dtype] / 1e12 for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    copy, clock = peak.bytes_per_s / 1e9, peak.sm_clock_hz / 1e6
    return f"measured: copy {copy:.0f} GB/s, products bf16 {bf16:.3g} and fp8 {fp8:.3g} TF/s, SM {clock:.0f} MHz"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
