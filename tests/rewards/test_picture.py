"""Picture statistics against brute force, and each planted drift on its own axis."""

import numpy as np
import pytest
import torch

from reelforge.bench.toy.render import TOY_SPEC, make_clip
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data import filters
from reelforge.engine.io.video import VideoInfo
from reelforge.engine.rewards.picture import PictureStatistics, grid_shares
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig

BIG = VideoSpec(num_frames=6, height=66, width=100, fps=8.0)
PERIODS = (2, 4, 8, 16)


def natural(spec: VideoSpec = BIG, seed: int = 0) -> torch.Tensor:
    """Clips ``[3, F, H, W, 3]`` with the 1/f spectrum of photographs, drifting one pixel a frame."""
    draw = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(spec.height)[:, None], np.fft.fftfreq(spec.width)[None]
    slope = 1 / np.maximum(np.hypot(fy, fx), 1 / spec.width)
    clips = []
    for _ in range(3):
        phases = np.fft.fft2(draw.normal(size=(3, spec.height, spec.width)))
        still = np.fft.ifft2(phases * slope).real
        still = (still - still.mean()) / still.std() * 40 + 120
        clips.append(np.stack([np.roll(still, step, -1) for step in range(spec.num_frames)]))
    return torch.from_numpy(np.stack(clips)).movedim(2, -1).round().clamp(0, 255).byte()


def checkerboard(cell: int, spec: VideoSpec = BIG) -> torch.Tensor:
    y, x = torch.arange(spec.height) // cell, torch.arange(spec.width) // cell
    return (1 - 2 * ((y[:, None] + x) % 2)).float()[..., None]


def add(videos: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    return (videos.float() + pattern).round().clamp(0, 255).byte()


def score(videos: torch.Tensor, spec: VideoSpec = BIG) -> dict[str, torch.Tensor]:
    found = PictureStatistics(spec).score(videos, [""] * len(videos))
    return {axis: scores.values for axis, scores in found.items()}


@pytest.mark.parametrize("period", [2, 4, 8])
def test_grid_shares_equal_brute_force(period: int) -> None:
    frames = np.random.default_rng(1).normal(size=(2, 3, 18, 25)).cumsum(-1)
    energy = common = half = 0.0
    for plane in (plane for frame in frames for plane in frame):
        corners = [(y, x) for y in range(0, 18 - period + 1, period) for x in range(0, 25 - period + 1, period)]
        tiles = [plane[y : y + period, x : x + period] for y, x in corners]
        tiles = [tile - tile.mean() for tile in tiles]
        energy += np.mean([np.square(tile).mean() for tile in tiles])
        average = sum(tiles) / len(tiles)
        common += np.square(average).mean()
        step = period // 2
        folded = [sum(average[y::step, x::step].flat) / 4 for y in range(step) for x in range(step)]
        half += np.square(folded).mean()
    found = grid_shares(torch.from_numpy(frames), (period,))
    assert found.item() == pytest.approx((common - half) / energy, rel=1e-9)


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_a_checkerboard_shows_at_its_own_period(cell: int) -> None:
    """8 levels on a picture whose own deviation is 40."""
    videos = natural()
    before, after = score(videos), score(add(videos, 8 * checkerboard(cell)))
    for period in PERIODS:
        axis = f"grid_{period}"
        if period == 2 * cell:
            assert (after[axis] > before[axis] + 0.02).all()
        else:
            torch.testing.assert_close(after[axis], before[axis], rtol=0.1, atol=2e-4)
    torch.testing.assert_close(after["brightness"], before["brightness"], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_a_pure_checkerboard_is_all_grid_at_any_contrast(cell: int) -> None:
    board = checkerboard(cell, VideoSpec(1, 70, 100, 8.0)).movedim(-1, 0)[None]
    for frames in (board, 100 + 0.1 * board):
        shares = grid_shares(frames, PERIODS).tolist()
        for period, share in zip(PERIODS, shares, strict=True):
            if period >= 2 * cell:
                assert share == pytest.approx(float(period == 2 * cell), abs=1e-4)


def test_detail_that_ignores_the_lattice_has_the_stated_share() -> None:
    noise = torch.randn(200, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for period, share in zip(PERIODS, grid_shares(noise, PERIODS).tolist(), strict=True):
        expected = 0.75 * period**2 / (64 * 96) / (1 - period**-2)  # white noise: the tiles' means take 1 / p^2 of it
        assert share == pytest.approx(expected, rel=0.1)


def test_a_flat_clip_has_no_grid_and_a_small_one_fewer_axes() -> None:
    flat = torch.full((1, 6, 66, 100, 3), 77, dtype=torch.uint8)
    found = score(flat)
    assert all(found[f"grid_{period}"].isnan().all() for period in PERIODS)
    assert found["brightness"].item() == pytest.approx(77, abs=0.01) and found["static_share"].item() == 1
    small = PictureStatistics(VideoSpec(4, 16, 24, 8.0))
    assert [axis for axis in small.axes if axis.startswith("grid")] == ["grid_2", "grid_4", "grid_8"]
    assert small.score(torch.zeros(2, 4, 16, 24, 3, dtype=torch.uint8), ["", ""]).keys() == set(small.axes)


NOISE = 30 * torch.randn(3, 6, 66, 100, 3, generator=torch.Generator().manual_seed(0))
DRIFTS = {
    "exposure": (lambda v: add(v, 90), {"brightness": 1.3, "over_exposed": 5}),
    "darkness": (lambda v: add(v, -110), {"brightness": 0.5, "under_exposed": 5}),
    "gloss": (lambda v: add(2 * v.float(), -v.float().mean(-1, keepdim=True)), {"saturation": 1.5}),
    "blur": (lambda v: blurred(v), {"sharpness": 0.7}),
    "noise": (
        lambda v: add(v, 30 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))),
        {"sharpness": 1.5},
    ),
    "frozen": (lambda v: v[:, :1].expand_as(v).contiguous(), {"motion": 0.0}),
}


def blurred(videos: torch.Tensor) -> torch.Tensor:
    planes = videos.flatten(0, 1).movedim(-1, 1).float()
    return torch.nn.functional.avg_pool2d(planes, 3, 1, 1).round().byte().movedim(1, -1).view_as(videos)


@pytest.mark.parametrize("drift", DRIFTS)
def test_each_drift_moves_its_axis(drift: str) -> None:
    damage, factors = DRIFTS[drift]
    videos = natural()
    before, after = score(videos), score(damage(videos))
    for axis, factor in factors.items():
        ratio = (after[axis] + 1e-3) / (before[axis] + 1e-3)
        assert (ratio >= factor).all() if factor > 1 else (ratio <= factor + 0.01).all(), (axis, ratio)
    if drift == "frozen":
        assert (after["static_share"] == 1).all() and (before["static_share"] == 0).all()


def test_exposure_counts_pixels() -> None:
    videos = torch.full((1, 4, 66, 100, 3), 128, dtype=torch.uint8)
    videos[:, :, :33, :25] = 250
    videos[:, :, 33:, :10] = 5
    found = score(videos)
    assert found["over_exposed"].item() == pytest.approx(0.125) and found["under_exposed"].item() == pytest.approx(0.05)


def test_shared_axes_are_the_data_filters() -> None:
    clip = make_clip(3, 0, split="all").frames
    found = score(torch.from_numpy(clip)[None], TOY_SPEC)
    stats = filters.measure(clip, VideoInfo(32, 32, 16.0, 0.0, ""))
    for axis in ("brightness", "contrast", "saturation", "sharpness", "motion", "static_share", "background_deviation"):
        assert found[axis].item() == pytest.approx(getattr(stats, axis), rel=1e-6)


def test_it_keeps_the_contract_under_scoring() -> None:
    """Alone and in a batch alike, or the run would stop."""
    videos = natural()
    scoring = Scoring([PictureStatistics(BIG)], lambda latents: videos, ScoringConfig())
    scores = scoring.submit(torch.zeros(3), ["", "", ""]).result()
    assert tuple(scores) == PictureStatistics(BIG).axes and all(values.valid.all() for values in scores.values())
