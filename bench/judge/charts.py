"""Training curves as inline SVG that follows the page's colours, each with its numbers as a table."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reelforge.bench.judge.bootstrap import Floats
from reelforge.engine.core.metrics import read_jsonl

# Sentinels that become CSS variables of the page, so that one SVG is readable on light and on dark paper.
_TEXT, _GRID = "#0a0b0c", "#0a0b0d"
_SERIES = tuple(f"#0a0b{0x10 + i:02x}" for i in range(6))
_VARIABLES = {_TEXT: "var(--muted)", _GRID: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
_TABLE_ROWS = 24
_STYLE = {
    "svg.fonttype": "none", "font.size": 9, "text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _GRID,
    "xtick.color": _GRID, "ytick.color": _GRID, "xtick.labelcolor": _TEXT, "ytick.labelcolor": _TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
    "grid.linewidth": 0.5, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One chart: series over steps.

    Attributes:
        title: heading, e.g. ``"SFT: validation loss by sigma"``.
        series: label -> ``(steps [n], values [n])``; at most six.
        y_label: what the values are.
        smooth: window of a centred running mean, drawn over the raw points; 1 draws the points alone.
        log: logarithmic values.
    """

    title: str
    series: Mapping[str, tuple[Floats, Floats]]
    y_label: str
    smooth: int = 1
    log: bool = False


def read_series(metrics: Path, keys: Mapping[str, str]) -> dict[str, tuple[Floats, Floats]]:
    """Series from ``metrics.jsonl``: label -> key; records without the key or with no finite value are passed by."""
    records = list(read_jsonl(metrics))
    found = {}
    for label, key in keys.items():
        pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and "step" in r]
        points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        points = points[np.isfinite(points[:, 1])]
        found[label] = points[:, 0], points[:, 1]
    return found


def svg(curve: Curve) -> str:
    """The chart as an ``<svg>`` element without fixed size; colours are the page's CSS variables."""
    assert len(curve.series) <= len(_SERIES), "more series than colours: split the chart"
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": curve.title}):
        figure = Figure(figsize=(4.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for (label, (x, y)), color, dash in zip(curve.series.items(), _SERIES, _DASHES, strict=False):
            if curve.smooth > 1:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(x, running_mean(y, curve.smooth), color=color, linewidth=1.7, linestyle=dash, label=label)
        axes.set(xlabel="step", ylabel=curve.y_label)
        if curve.log:
            axes.set_yscale("log", subs=(2, 3, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if len(curve.series) > 1:
            axes.legend(fontsize=8, handlelength=3)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue())


def table(curve: Curve) -> tuple[list[str], list[list[float | None]]]:
    """Header and at most 24 evenly spread rows of the chart's (smoothed) numbers, at steps of the sparsest series."""
    steps = min((x for x, _ in curve.series.values()), key=len)
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _TABLE_ROWS)).round().astype(int))]
    columns = [dict(zip(x, running_mean(y, curve.smooth), strict=True)) for x, y in curve.series.values()]
    return ["step", *curve.series], [[step, *(column.get(step) for column in columns)] for step in steps]


def running_mean(values: Floats, window: int) -> Floats:
    """Centred mean; the window shrinks at both ends."""
    if window <= 1 or len(values) == 0:
        return values
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _inline(document: str) -> str:
    """Matplotlib's SVG file to an element for a page: no header, metadata, fixed size, or group ids."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element)
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    for sentinel, variable in _VARIABLES.items():
        element = element.replace(sentinel, variable)
    return element
