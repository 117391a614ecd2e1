"""The page: well-formed, self-contained, escaped, small; charts and contact sheets."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reelforge.bench.judge import charts, report, sheets
from reelforge.bench.judge.gsb import Verifier, compare, fix_panel
from reelforge.bench.judge.results import Calibration, Results, StageResult, score_clips
from reelforge.engine.core.errors import StorageError

VOID = {"meta", "img", "br", "link", "input", "hr"}
PROMPT = "a <script>alert('x')</script> \"red\" circle & a square"
VERIFIERS = [Verifier("reward", "higher", True, "dB"), Verifier("haze", "lower", False, "%")]


class Page(HTMLParser):
    """Checks nesting and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def clips(seed: int, frames: int = 17, size: int = 32) -> np.ndarray:
    """Pure noise: what compresses worst."""
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def make_results(stages: int) -> Results:
    prompts = np.repeat(np.arange(6), 3)

    def scores(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {"reward": rng.normal(seed, 1, 18), "haze": rng.normal(5 - 0.7 * seed, 1, 18)}

    base, found = scores(0), []
    panel = fix_panel(base, scores(100), VERIFIERS)
    for i in range(stages):
        votes = (compare(scores(i), base, prompts, panel, "base", seed=0),) if i else ()
        table = score_clips(scores(i), prompts, VERIFIERS, 0, base if i else None)
        name = ("base", "<b>sft</b>")[i] if i < 2 else f"stage {i}"
        found.append(StageResult(name, 20, 0.4, 60.0 * i if i else None, 100 * i, votes, "a <i>note</i>", table))
    truth = Calibration("truth", score_clips(scores(7), prompts, VERIFIERS, 0))
    return Results(
        tuple(found), seed=1, prompts=6, clips=18, truth=truth, versions={"torch": "2"}, note="5 < 6",
        self_check=compare(scores(100), base, prompts, panel, "base", seed=0), config={"sft": {"lr": 1e-4}},
        hardware={"cpu": "a <cpu>", "threads": 2},
    )  # fmt: skip


def make_sheet(columns: int, rows: int = 2, frames: int = 17, size: int = 32) -> sheets.Sheet:
    made = [
        sheets.Row(PROMPT, seed, tuple(clips(10 * seed + i, frames, size) for i in range(columns)), "mean z 1")
        for seed in range(rows)
    ]
    return sheets.Sheet("Same <noise>", tuple(f"column {i}" for i in range(columns)), tuple(made), fps=8.0, lead="x")


def make_curves() -> list[charts.Curve]:
    x = np.arange(1.0, 101.0)
    return [
        charts.Curve("loss", {"loss": (x, 1 / x)}, "loss", smooth=9),
        charts.Curve("by <sigma>", {f"σ {s}": (x[::20], s + 0 * x[::20]) for s in (0.1, 0.5)}, "loss", log=True),
    ]


@pytest.mark.parametrize("stages", [1, 2, 6])
def test_page_is_well_formed_self_contained_and_escaped(stages: int) -> None:
    results = make_results(stages)
    text = report.render(results, [make_sheet(stages + 1), make_sheet(2)], make_curves())
    page = Page(text)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:60])
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<script" not in text and "<b>sft" not in text and "<noise>" not in text and "<cpu>" not in text
    assert page.words.count(PROMPT) == 2 * 2 * 2  # two sheets, two rows, moving and frame by frame
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert [stage.name for stage in results.stages if stage.name not in page.words] == []


def test_page_says_what_the_votes_are_and_shows_counts_with_intervals() -> None:
    words = Page(report.render(make_results(3), [], [])).words
    vote = make_results(3).stages[2].gsb[0]
    assert "automatic GSB: votes by pixel verifiers, not people" in words
    assert f"Good {vote.good} Same {vote.same} Bad {vote.bad}" in words
    assert f"{report.signed(vote.net)} [{report.number(vote.low)}, {report.number(vote.high)}]" in words
    assert "another seed against base" in words and "Training targets" in words


def test_one_stage_alone_has_no_verdict_section() -> None:
    text = report.render(make_results(1), [], [])
    assert 'id="gsb"' not in text and 'id="training"' not in text and 'id="cost"' in text


def test_every_chart_has_its_numbers() -> None:
    page = Page(report.render(make_results(1), [], make_curves()))
    assert page.tags.count("svg") == 2
    assert page.words.count("Numbers step") == 2


def test_incompressible_clips_stay_below_five_megabytes(tmp_path: Path) -> None:
    contact = [make_sheet(7, rows=8), make_sheet(7, rows=4)]
    path = tmp_path / "report.html"
    size = report.write_report(make_results(6), contact, make_curves(), path)
    assert size == path.stat().st_size < 5_000_000
    assert 0 < path.read_text(encoding="utf-8").count('class="pixelated"') < 12  # the rest are strips alone


def test_unwritable_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        report.write_report(make_results(1), [], [], tmp_path / "missing" / "report.html")


def test_same_input_gives_the_same_page() -> None:
    pages = [report.render(make_results(2), [make_sheet(2, rows=1)], make_curves()) for _ in range(2)]
    assert pages[0] == pages[1]


def test_truth_and_whiskers_lie_inside_the_axis() -> None:
    text = report.render(make_results(6), [], [])
    positions = [float(value) for value in re.findall(r"left:([-\d.]+)%", text)]
    assert len(positions) > 30 and min(positions) >= 0 and max(positions) <= 100


@pytest.mark.parametrize(
    ("value", "shown"), [(0.042, "42 ms"), (12.34, "12.3 s"), (125.0, "2 min 5 s"), (4321.0, "1 h 12 min")]
)
def test_durations(value: float, shown: str) -> None:
    assert report.duration(value) == shown


def test_numbers_round_honestly() -> None:
    assert report.number(-0.001) == "0.00" and report.number(-1.5, 1) == "\u22121.5"
    assert report.signed(0.301) == "+0.30" and report.signed(-0.004) == "0.00"
    assert report.p_value(0.0004) == "p\u00a0<\u00a00.001"


def test_a_moving_row_keeps_the_columns_in_step_and_the_clips_duration() -> None:
    row = make_sheet(3, frames=17).rows[0]
    pictures, duration_ms = sheets.moving_row(row, fps=8.0)
    picture = Image.open(io.BytesIO(sheets.webp(pictures, True, duration_ms)))
    assert picture.n_frames == 17 and picture.size == (3 * 32 + 2, 32)
    assert 17 * duration_ms == pytest.approx(1000 * 17 / 8, abs=17)
    picture.seek(9)
    shown = np.asarray(picture.convert("RGB"))
    for i, clip in enumerate(row.clips):
        np.testing.assert_array_equal(shown[:, 33 * i : 33 * i + 32], clip[9])


def test_long_and_large_clips_are_thinned_and_reduced() -> None:
    clip = np.repeat(np.arange(81, dtype=np.uint8)[:, None, None, None], 3, axis=3)
    clip = np.broadcast_to(clip, (81, 480, 832, 3))
    pictures, duration_ms = sheets.moving_row(sheets.Row("x", 0, (clip,)), fps=16.0)
    assert len(pictures) == 20 and pictures[0].size == (166, 96)
    assert duration_ms * 20 == pytest.approx(1000 * 81 / 16, abs=10)
    strip = np.asarray(sheets.filmstrip(clip))
    assert strip.shape[:2] == (96, 6 * 167 - 1)
    assert [int(strip[0, 167 * i, 0]) for i in range(6)] == [0, 16, 32, 48, 64, 80]


def test_strip_magnifies_by_whole_pixels() -> None:
    clip = clips(0)
    strip = np.asarray(sheets.filmstrip(clip, frames=2))[..., :3]
    np.testing.assert_array_equal(strip[2::4, 2:128:4], clip[0])
    np.testing.assert_array_equal(strip[2::4, 131::4], clip[-1])


def test_contact_sheet_lays_stages_out_as_columns() -> None:
    sheet = make_sheet(3, rows=2)
    page = np.asarray(sheets.contact_sheet(sheet))
    strip = np.asarray(sheets.filmstrip(sheet.rows[1].clips[2]))[..., :3]
    height, width = strip.shape[:2]
    windows = [(top, left) for top in range(page.shape[0] - height + 1) for left in (2 * (width + 12),)]
    matches = [top for top, left in windows if (page[top : top + height, left : left + 128] == strip[:, :128]).all()]
    assert len(matches) == 1


def test_running_mean_is_the_mean_of_what_the_window_holds() -> None:
    values = np.random.default_rng(0).normal(size=30)
    brute = [values[max(0, i - 3) : i + 4].mean() for i in range(30)]
    np.testing.assert_allclose(charts.running_mean(values, 7), brute)
    assert charts.running_mean(values, 1) is values


def test_series_are_read_from_metrics_without_gaps_or_nans(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "val": 1.0}, {"loss": 9.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "lo', encoding="utf-8")
    found = charts.read_series(path, {"train": "loss", "held out": "val"})
    assert {label: (x.tolist(), y.tolist()) for label, (x, y) in found.items()} == {
        "train": ([1.0], [2.0]),
        "held out": ([3.0], [1.0]),
    }


def test_chart_follows_the_pages_colours() -> None:
    element = charts.svg(make_curves()[1])
    assert element.startswith("<svg") and "var(--series-1)" in element and "var(--muted)" in element
    assert not re.search(r"#0a0b", element) and "<metadata" not in element
    header = element[: element.index(">")]
    assert "viewBox" in header and " width=" not in header and " height=" not in header


def test_template_travels_with_the_package() -> None:
    assert (Path(report.__file__).parent / "report.html.j2").is_file()
