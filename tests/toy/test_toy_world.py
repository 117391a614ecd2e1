"""The toy world: what it promises about splits, captions, motion and reproducible files."""

import itertools
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.bench.toy.render import (
    RADIUS,
    SLOW_MOTION_PACE,
    TOY_SPEC,
    WEB,
    FlawRates,
    coverage,
    make_clip,
    path,
    render,
    write_clean,
    write_flawed,
)
from reelforge.bench.toy.world import (
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    MOTIONS,
    SPEEDS,
    captions,
    misdescribe,
    parse_prompt,
    scenes,
)
from reelforge.engine.core import rng
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.io.video import read_video

EVERY = scenes("all")
TALL = VideoSpec(num_frames=9, height=64, width=48, fps=8.0)


def test_splits_part_the_world() -> None:
    train, held_out = set(scenes("train")), set(scenes("held_out"))
    assert len(EVERY) == 432 and len(train) == 360 and len(held_out) == 72
    assert not train & held_out and train | held_out == set(EVERY)


def test_held_out_captions_are_never_training_captions() -> None:
    train = {caption for scene in scenes("train") for caption in captions(scene)}
    held_out = {caption for scene in scenes("held_out") for caption in captions(scene)}
    assert not train & held_out
    assert len(train | held_out) > 1800


@pytest.mark.parametrize("first, second", list(itertools.combinations(FACTORS, 2)))
def test_training_shows_every_pair_of_values(first: str, second: str) -> None:
    seen = {(getattr(s, first), getattr(s, second)) for s in scenes("train")}
    assert seen == set(itertools.product(FACTORS[first], FACTORS[second]))


@given(st.sampled_from(EVERY), st.data())
def test_captions_tell_the_truth(scene, data) -> None:
    caption = data.draw(st.sampled_from(captions(scene)))
    named = parse_prompt(caption)
    assert named.items() <= asdict(scene).items()
    assert {"shape", "colour", "motion"} <= named.keys()


def test_short_caption_omits_and_long_ones_name_all() -> None:
    for scene in EVERY:
        short, *_, long = captions(scene)
        assert parse_prompt(short).keys() == {"shape", "colour", "motion"}
        assert parse_prompt(long) == asdict(scene)
        assert len(short) < len(long)


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("", {}),
        ("A RED thing, going UP!", {"colour": "red", "motion": "up"}),
        ("a red and blue circle", {"shape": "circle"}),
        ("a circle on gray", {"shape": "circle", "background": "grey"}),
        ("redder leftover circles", {}),
    ],
)
def test_parse_free_text(prompt: str, named: dict[str, str]) -> None:
    assert parse_prompt(prompt) == named


def test_palettes_keep_apart() -> None:
    for colour, background in itertools.product(COLOURS.values(), BACKGROUNDS.values()):
        assert max(abs(a - b) for a, b in zip(colour, background, strict=True)) >= 0.3 - 1e-9
    for palette in (COLOURS, BACKGROUNDS):
        for a, b in itertools.combinations(palette.values(), 2):
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) > 0.05


def test_misdescribing_never_reveals_a_held_out_scene() -> None:
    draw = rng.generator("test", 0)
    described = [misdescribe(scene, 0.5, draw) for scene in scenes("train") for _ in range(5)]
    assert not any(scene.held_out for scene in described)
    assert misdescribe(EVERY[0], 0.0, draw) == EVERY[0]
    wrong = misdescribe(scenes("held_out")[0], 1.0, draw)
    assert all(getattr(wrong, name) != getattr(scenes("held_out")[0], name) for name in FACTORS)


def _mass(frames: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Object mass and centre of mass (x, y) per frame, straight from the pixels."""
    away = np.abs(frames - np.round(255 * np.array(BACKGROUNDS[background], np.float32))).sum(-1)
    mass = away.sum((1, 2))
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    return mass, np.stack([(away * x).sum((1, 2)), (away * y).sum((1, 2))], -1) / mass[:, None]


@pytest.mark.parametrize("spec", [TOY_SPEC, TALL], ids=["toy", "tall"])
def test_objects_move_as_told_and_stay_inside(spec: VideoSpec) -> None:
    for index, scene in enumerate(EVERY[::5]):
        frames = render(scene, spec, rng.generator("test", index))
        assert frames.shape == (spec.num_frames, spec.height, spec.width, 3) and frames.dtype == np.uint8
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert np.abs(border / 255 - np.array(BACKGROUNDS[scene.background])).max() < 0.01
        mass, centre = _mass(frames, scene.background)
        assert mass.std() / mass.mean() < 0.01
        side = min(spec.height, spec.width)
        travel = (centre[-1] - centre[0]) @ np.array(MOTIONS[scene.motion]) / side
        assert travel == pytest.approx(SPEEDS[scene.speed], rel=0.09)
        steps = np.diff(centre, axis=0)
        assert np.abs(steps - steps.mean(0)).max() < 0.06


@pytest.mark.parametrize("radius", [4.0, *RADIUS])
def test_coverage_matches_closed_form_areas(radius: float) -> None:
    x = torch.arange(-12, 12) + 0.3
    areas = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.886 * radius) ** 2,
        "triangle": 2 * (1.12 * radius) ** 2,
    }
    for shape, area in areas.items():
        cover = coverage(shape, x[None], x[:, None], radius, 2.0)
        assert cover.min() == 0 and cover.max() == 1
        assert cover.sum().item() == pytest.approx(area, rel=0.06)


def test_larger_spec_shows_the_same_clip() -> None:
    large = replace(TOY_SPEC, height=64, width=64)
    for index in range(12):
        small = make_clip(7, index).frames.astype(float)
        shrunk = make_clip(7, index, spec=large).frames.astype(float).reshape(17, 32, 2, 32, 2, 3).mean((2, 4))
        assert np.abs(small - shrunk).mean() < 1.0


def test_paths_ignore_flaws_but_for_pace() -> None:
    scene = EVERY[0]
    radius, centres = path(scene, TOY_SPEC, rng.generator("test", 1))
    slow_radius, slow = path(scene, TOY_SPEC, rng.generator("test", 1), SLOW_MOTION_PACE)
    assert radius == slow_radius
    assert torch.allclose((slow[-1] - slow[0]), (centres[-1] - centres[0]) * SLOW_MOTION_PACE, atol=1e-4)


def test_clips_are_functions_of_seed_and_index() -> None:
    again = [make_clip(3, index, WEB) for index in (5, 2)]
    for clip, index in zip(again, (5, 2), strict=True):
        other = make_clip(3, index, WEB)
        assert np.array_equal(clip.frames, other.frames) and clip.described == other.described
        assert make_clip(3, index).scene == clip.scene
    assert not np.array_equal(make_clip(4, 5).frames, make_clip(3, 5).frames)


def test_each_round_shows_every_scene_once() -> None:
    shown = Counter(make_clip(0, index, split="held_out").scene for index in range(2 * 72))
    assert set(shown) == set(scenes("held_out")) and set(shown.values()) == {2}


def test_flaws_strike_at_their_rates() -> None:
    count = 600
    clips = [make_clip(1, index, WEB) for index in range(count)]
    struck = Counter(flaw for clip in clips for flaw in clip.flaws)
    any_wrong_word = 1 - (1 - WEB.wrong_word) ** len(FACTORS)
    for name, rate in (asdict(WEB) | {"wrong_word": any_wrong_word}).items():
        assert abs(struck[name] - count * rate) < 4 * np.sqrt(count * rate * (1 - rate)), name
    assert not any(clip.flaws for clip in (make_clip(1, index) for index in range(20)))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["haze", "washed", "blur"]), st.integers(0, 10_000))
def test_every_flaw_is_visible(flaw: str, index: int) -> None:
    clean = make_clip(2, index).frames.astype(float)
    flawed = make_clip(2, index, FlawRates(**{flaw: 1.0})).frames
    assert np.abs(flawed - clean).mean() > 1.5


def test_written_files_read_back(tmp_path) -> None:
    files = write_flawed(tmp_path / "web", 12, seed=9)
    assert [file.name for file in files] == [f"{index:05d}.mp4" for index in range(12)]
    for index, file in enumerate(files):
        clip = make_clip(9, index, WEB)
        video = read_video(file)
        assert video.fps == TOY_SPEC.fps and video.frames.shape == clip.frames.shape
        assert np.sqrt(((video.frames.astype(float) - clip.frames) ** 2).mean()) < 12
        lines = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert tuple(lines) == captions(clip.described)


def test_clean_held_out_files(tmp_path) -> None:
    (file,) = write_clean(tmp_path, 1, seed=0, split="held_out")
    assert parse_prompt(file.with_suffix(".txt").read_text().splitlines()[-1]) == asdict(
        make_clip(0, 0, split="held_out").scene
    )
