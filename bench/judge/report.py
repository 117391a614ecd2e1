"""One self-contained HTML page for a pipeline's results: opens from disk, asks the network for nothing."""

import base64
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from reelforge.bench.judge import charts, sheets
from reelforge.bench.judge.results import Results, Score
from reelforge.engine.core.files import replace_file

_MOTION_BUDGET_BYTES = 2_000_000  # rows beyond it are shown as strips alone: a report stays under 5 MB


@dataclass(frozen=True)
class Axis:
    """A score's horizontal scale; positions are percentages of its length."""

    low: float
    high: float
    ticks: tuple[float, ...]
    decimals: int

    def at(self, value: float) -> float:
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class VerifierView:
    """One verifier's chart: a whisker per stage, the truth as a line."""

    name: str
    kind: Score
    axis: Axis
    stages: tuple[tuple[str, Score], ...]
    truth: Score | None


def write_report(
    results: Results, contact_sheets: Sequence[sheets.Sheet], curves: Sequence[charts.Curve], path: Path
) -> int:
    """Write the report; returns its size in bytes.

    Args:
        results: the numbers.
        contact_sheets: comparisons and galleries, shown in this order, the first one at the top.
        curves: training curves.
        path: the HTML file.

    Raises:
        StorageError: it cannot be written.
    """
    page = render(results, contact_sheets, curves)
    replace_file(path, page)
    return len(page.encode())


def render(results: Results, contact_sheets: Sequence[sheets.Sheet], curves: Sequence[charts.Curve]) -> str:
    """The page as text; everything from outside (prompts, names, notes) is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"signed": signed, "number": number, "duration": duration, "p": p_value, "plain": plain}
    views = [_verifier(results, name) for name in results.verifiers()]
    budget = _MOTION_BUDGET_BYTES // max(1, len(contact_sheets))
    return environment.get_template("report.html.j2").render(
        results=results,
        held_out=[view for view in views if not view.kind.target],
        targets=[view for view in views if view.kind.target],
        rows=[row for row in (results.truth, *results.calibration) if row],
        sheets=[(sheet, _pictures(sheet, budget)) for sheet in contact_sheets],
        curves=[(curve, Markup(charts.svg(curve)), charts.table(curve)) for curve in curves],
        net_axis=Axis(-1, 1, (-1, -0.5, 0, 0.5, 1), 1),
    )


def _pictures(sheet: sheets.Sheet, budget: int) -> list[tuple[sheets.Row, str | None, list[str]]]:
    """Per row: the moving picture while the budget lasts, and a strip per column, as data URIs."""
    shown: list[tuple[sheets.Row, str | None, list[str]]] = []
    for row in sheet.rows:
        moving = None
        if budget > 0:
            pictures, duration_ms = sheets.moving_row(row, sheet.fps)
            picture = sheets.webp(pictures, row.pixelated, duration_ms)
            budget -= len(picture)
            moving = _data_uri(picture) if budget >= 0 else None
        strips = [_data_uri(sheets.webp([sheets.filmstrip(clip)], row.pixelated)) for clip in row.clips]
        shown.append((row, moving, strips))
    return shown


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _verifier(results: Results, name: str) -> VerifierView:
    stages = tuple((stage.name, stage.scores[name]) for stage in results.stages if name in stage.scores)
    truth = results.truth.scores.get(name) if results.truth else None
    scores = [*(score for _, score in stages), *([truth] if truth else [])]
    return VerifierView(name, scores[0], _axis(scores), stages, truth)


def _axis(scores: Sequence[Score]) -> Axis:
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    margin = 0.06 * (high - low) or 0.5
    ticks = tuple(float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high)
    # One digit of the interval's half-width, two where the first is a 1 or a 2.
    half_width = statistics.median(score.high - score.low for score in scores) / 2 or 0.01
    return Axis(low - margin, high + margin, ticks, min(3, max(0, math.ceil(-math.log10(half_width / 3)))))


def number(value: float, decimals: int = 2) -> str:
    """Fixed decimals and a real minus sign; a rounded zero carries none."""
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "\u2212")


def signed(value: float, decimals: int = 2) -> str:
    """As :func:`number` with a plus in front of what is positive."""
    return ("+" if round(value, decimals) > 0 else "") + number(value, decimals)


def p_value(value: float) -> str:
    """``p = 0.012``; below 0.001 only the bound."""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.3f}"


def duration(seconds: float) -> str:
    """``340 ms``, ``12.3 s``, ``2 min 5 s`` or ``1 h 12 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested table as dotted keys and readable values."""
    rows: list[tuple[str, str]] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            rows += plain(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows
