"""Statistics against scipy and closed forms; ranges and the report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from reelforge.bench.toy.render import FlawRates, make_clip
from reelforge.engine.core import config as configuration
from reelforge.engine.data.filters import FilterConfig, Range, ScoreRange, Stats, first_fault, measure, write_report
from reelforge.engine.data.manifest import Reject, Sample
from reelforge.engine.io.video import VideoInfo

INFO = VideoInfo(width=96, height=64, fps=16.0, duration_s=1.5, codec="h264")
SAMPLE = Sample("a", Path("a.mp4"), ("a cat", "a cat sits on the wall"), {"dover": 0.5}, split="train")


def test_flat_grey() -> None:
    stats = measure(np.full((5, 16, 16, 3), 100, np.uint8), INFO)
    assert dataclasses.astuple(stats) == pytest.approx((1.5, 64, 96, 100, 0, 0, 0, 1, 0, 0), abs=1e-3)


def test_closed_forms() -> None:
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[:, :, 8:] = 255
    frames[2:] = 255 - frames[2:]
    stats = measure(frames, INFO)
    assert stats.brightness == pytest.approx(127.5, abs=0.01)
    assert stats.contrast == pytest.approx(127.5, abs=0.01)
    assert stats.static_share == pytest.approx(2 / 3, abs=1e-3)
    assert stats.saturation == 0


def test_sharpness_is_scipys_laplacian() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    luma = frames @ np.array([0.299, 0.587, 0.114])
    expected = np.stack([ndimage.laplace(image) for image in luma])[:, 1:-1, 1:-1].std()
    assert measure(frames, INFO).sharpness == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("contrast", [20, 200])
@pytest.mark.parametrize("speed", [1, 3])
@pytest.mark.parametrize("size", [32, 300])
def test_motion_is_the_speed_of_edges(contrast: int, speed: int, size: int) -> None:
    """A soft vertical edge that travels at a known speed, whatever its contrast and the picture's size."""
    x = np.arange(size)
    edges = [10 + contrast / (1 + np.exp(-(x - size / 3 - speed * k) / 3)) for k in range(4)]
    frames = np.broadcast_to(np.round(edges)[:, None, :, None], (4, size, size, 3)).astype(np.uint8)
    assert measure(frames, INFO).motion == pytest.approx(speed, rel=0.12)


def test_one_frame_and_tiny_frames() -> None:
    for shape in ((1, 16, 16, 3), (2, 3, 3, 3), (1, 8, 200, 3)):
        stats = measure(np.full(shape, 9, np.uint8), INFO)
        assert all(np.isfinite(dataclasses.astuple(stats)))


@pytest.mark.parametrize(
    ("flaw", "stat", "rises"),
    [
        ("haze", "background_deviation", True),
        ("washed", "saturation", False),
        ("slow_motion", "motion", False),
        ("blur", "sharpness", False),
    ],
)
def test_each_flaw_of_the_miniature_is_separable(flaw: str, stat: str, rises: bool) -> None:
    """One threshold on one statistic tells nearly all flawed clips from their clean twins."""
    struck = FlawRates(**{flaw: 1.0})
    clean = np.array([getattr(measure(make_clip(0, k).frames, INFO), stat) for k in range(48)])
    flawed = np.array([getattr(measure(make_clip(0, k, struck).frames, INFO), stat) for k in range(48)])
    sign = 1 if rises else -1
    thresholds = np.concatenate([clean, flawed])
    right = [((sign * flawed >= sign * t).mean() + (sign * clean < sign * t).mean()) / 2 for t in thresholds]
    assert max(right) >= 0.95, f"{flaw}: {max(right):.2f} of clips told apart by {stat}"


STATS = Stats(1.5, 64, 96, 100, 30, 80, 4, 0.1, 12, 3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FilterConfig(), None),
        (FilterConfig(motion=Range(min=4), brightness=Range(20, 180)), None),
        (FilterConfig(motion=Range(min=4.01)), "filter:motion"),
        (FilterConfig(height=Range(min=720)), "filter:height"),
        (FilterConfig(background_deviation=Range(max=2.9)), "filter:background_deviation"),
        (FilterConfig(caption_words=Range(min=6)), None),
        (FilterConfig(caption_words=Range(max=5)), "filter:caption_words"),
        (FilterConfig(scores=(ScoreRange("dover", min=0.5),)), None),
        (FilterConfig(scores=(ScoreRange("dover", min=0.6),)), "filter:dover"),
        (FilterConfig(scores=(ScoreRange("absent"),)), "filter:absent"),
        (FilterConfig(splits=("train",)), None),
        (FilterConfig(splits=("val",)), "filter:splits"),
    ],
)
def test_ranges(config: FilterConfig, reason: str | None) -> None:
    fault = first_fault(SAMPLE, STATS, config)
    assert (fault and fault[0]) == reason


def test_every_statistic_has_a_range() -> None:
    ranges = {field.name for field in dataclasses.fields(FilterConfig)}
    assert {field.name for field in dataclasses.fields(Stats)} <= ranges


def test_filters_from_toml(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('motion.min = 1\nsplits = ["train"]\n[[scores]]\nname = "dover"\nmin = 0.07\n')
    config = configuration.load(FilterConfig, recipe, ["brightness.max=180"])
    assert config == FilterConfig(
        motion=Range(min=1.0),
        brightness=Range(max=180.0),
        scores=(ScoreRange("dover", 0.07),),
        splits=("train",),
    )
    (tmp_path / "b.toml").write_text(configuration.dumps(config))
    assert configuration.load(FilterConfig, tmp_path / "b.toml") == config


def test_report(tmp_path: Path) -> None:
    rejects = [Reject("a", "a.mp4", "filter:motion", "motion 0"), Reject("b", "ü.mp4", "unreadable", "text")]
    rejects.append(Reject("c", "c.mp4", "unreadable", "empty"))
    line = write_report(tmp_path / "reject_report.json", 7, rejects)
    assert line == "10 clips: 7 kept, 3 rejected (unreadable 2, filter:motion 1)"
    report = json.loads((tmp_path / "reject_report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"unreadable": 2, "filter:motion": 1} and report["total"] == 10
    assert report["rejects"][1] == {"id": "b", "path": "ü.mp4", "reason": "unreadable", "detail": "text"}
    assert write_report(tmp_path / "reject_report.json", 7, []) == "7 clips: 7 kept, 0 rejected"
