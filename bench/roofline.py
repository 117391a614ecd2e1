"""The roofline picture: how far each op and each peer is from what the machine did best in the same run.

Left, ops on the tensor cores: rate over arithmetic intensity, under min(intensity x bandwidth, peak). Right, ops that
only move bytes: bandwidth over the bytes they must move, under the bandwidth of a plain copy. Solid roofs were
measured, dashed ones are the datasheet's; both axes are logarithmic. Only cold-L2 times are drawn: a warm cache
beats the device memory's roof.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from reelforge.bench.records import OURS, Record
from reelforge.engine.core.files import make_folder

_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4b00", "#6a3d9a", "#b2182b", "#808000",
    "#00868b", "#8b8b8b",
)  # fmt: skip
_PEER_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_ROOF = "#333333"
_LEAST_INTENSITY = 100.0  # left of every GPU's ridge, so that the slope of the roof is in the picture
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "roofline", "font.size": 9, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def drawable(records: Sequence[Record]) -> list[Record]:
    """Those with a cold-L2 time and a rate."""
    return [r for r in records if r.timing is not None and r.timing.l2 == "cold" and _rate(r) is not None]


def draw(records: Sequence[Record], title: str, path: Path) -> None:
    """Write the picture; ``path``'s suffix says whether as SVG or PNG.

    Args:
        records: of one machine; at least one is :func:`drawable`.
        title: names the machine.
        path: the file.
    """
    shown = drawable(records)
    panels = [
        (panel, part)
        for panel, part in (
            (_compute_panel, [record for record in shown if record.workload.flops > 0]),
            (_memory_panel, [record for record in shown if record.workload.flops == 0]),
        )
        if part
    ]
    colors = dict(zip(dict.fromkeys(r.workload.op for r in shown), _COLORS * 4, strict=False))
    peers = dict.fromkeys(r.identity.arm for r in shown if r.identity.arm != OURS)
    markers = {OURS: "o"} | dict(zip(peers, _PEER_MARKERS * 4, strict=False))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * len(panels) + 0.4, 5.4), layout="constrained")
        for axes, (panel, part) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            panel(axes, part)
            _plain_ticks(axes)
            _points(axes, part, _intensity if panel is _compute_panel else _megabytes, colors, markers)
        figure.suptitle(title, fontsize=10)
        ops, arms = _legends(colors, markers)
        figure.legend(handles=ops, loc="outside lower left", ncols=min(len(ops), 6), handletextpad=0.3)
        figure.legend(handles=arms, loc="outside lower right", ncols=min(len(arms), 4), handletextpad=0.3)
        make_folder(path.parent)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _rate(record: Record) -> float | None:
    return record.derived.tflops if record.workload.flops > 0 else record.derived.gbps


def _intensity(record: Record) -> float:
    return record.workload.flops / record.workload.bytes


def _megabytes(record: Record) -> float:
    return record.workload.bytes / 1e6


def _points(
    axes: Axes, records: Sequence[Record], x: Callable[[Record], float], colors: dict[str, str], markers: dict[str, str]
) -> None:
    """Ours are filled and on top; peers are outlines."""
    for record in sorted(records, key=lambda r: r.identity.arm == OURS):
        color, ours, rate = colors[record.workload.op], record.identity.arm == OURS, _rate(record)
        assert rate is not None, "drawable"
        axes.plot(
            x(record), rate, markers[record.identity.arm], color=color, markersize=7 if ours else 6,
            markerfacecolor=color if ours else "white", markeredgewidth=1.2, linestyle="none",
        )  # fmt: skip


def _compute_panel(axes: Axes, records: Sequence[Record]) -> None:
    reach = [_intensity(record) for record in records]
    x = np.geomspace(min(*reach, _LEAST_INTENSITY) / 2, max(reach) * 2, 256)
    for dtype in dict.fromkeys(record.workload.dtype_in for record in records):
        part = [record for record in records if record.workload.dtype_in == dtype]
        for source, dash in (("peak", "-"), ("datasheet", "--")):
            gbps, tflops = _median(part, f"{source}_gbps"), _median(part, f"{source}_tflops")
            if gbps is None or tflops is None:
                continue
            axes.plot(x, np.minimum(x * gbps / 1e3, tflops), dash, color=_ROOF, linewidth=1.2)
            _name_roof(axes, x[-1], tflops, f"{dtype} {_SOURCE[source]}: {tflops:.0f} TF/s")
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte", ylabel="TFLOP/s")
    axes.set_title("ops on the tensor cores", fontsize=9)


def _memory_panel(axes: Axes, records: Sequence[Record]) -> None:
    reach = [_megabytes(record) for record in records]
    ends = (min(reach) / 2, max(reach) * 2)
    for source, dash in (("peak", "-"), ("datasheet", "--")):
        gbps = _median(records, f"{source}_gbps")
        if gbps is not None:
            axes.plot(ends, (gbps, gbps), dash, color=_ROOF, linewidth=1.2)
            _name_roof(axes, ends[1], gbps, f"{_SOURCE[source]}: {gbps:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes that must move, MB", ylabel="GB/s")
    axes.set_title("ops that only move bytes", fontsize=9)


_SOURCE = {"peak": "measured", "datasheet": "datasheet"}


def _name_roof(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color=_ROOF)


def _median(records: Sequence[Record], name: str) -> float | None:
    found = [value for record in records if (value := getattr(record.derived, name)) is not None]
    return statistics.median(found) if found else None


def _plain_ticks(axes: Axes) -> None:
    for axis, subs in ((axes.xaxis, (1, 3)), (axes.yaxis, (1, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _legends(colors: dict[str, str], markers: dict[str, str]) -> tuple[list[Line2D], list[Line2D]]:
    """Colours name ops, shapes name arms."""
    ops = [Line2D([], [], color=color, marker="o", linestyle="none", label=op) for op, color in colors.items()]
    arms = []
    for arm, marker in markers.items():
        face = _ROOF if arm == OURS else "white"
        arms.append(Line2D([], [], color=_ROOF, marker=marker, markerfacecolor=face, linestyle="none", label=arm))
    return ops, arms
