"""Conforming clips, against PIL's box filter and arithmetic on known frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reelforge.engine.core.errors import DataError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data.clips import TooShort, cover, load_clip, to_pixels
from reelforge.engine.io.video import write_video


def grey_clip(path: Path, num_frames: int, fps: float, size: tuple[int, int] = (32, 32)) -> Path:
    """Frame k has level 4 k: further apart than 8-bit limited range can blur."""
    levels = (4 * np.arange(num_frames)).astype(np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (num_frames, *size, 3)), fps, crf=1)
    return path


def frames_of(clip: np.ndarray) -> list[int]:
    return np.round(clip.mean((1, 2, 3)) / 4).astype(int).tolist()


@pytest.mark.parametrize(
    ("source", "fps", "spec_fps", "span", "expected"),
    [
        (17, 16, 16, "centre", list(range(17))),
        (21, 16, 16, "centre", list(range(2, 19))),
        (20, 16, 16, "centre", list(range(1, 18))),  # starts between frames 1 and 2: frame 1 is on screen
        (21, 16, 16, "first", list(range(17))),
        (34, 32, 16, "centre", list(range(0, 34, 2))),
        (40, 32, 16, "centre", list(range(3, 37, 2))),
        (17, 8, 16, "centre", [4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12]),
        (60, 60, 24, "first", [int(k * 2.5) for k in range(17)]),
    ],
)
def test_span_and_rate(
    tmp_path: Path, source: int, fps: float, spec_fps: float, span: str, expected: list[int]
) -> None:
    path = grey_clip(tmp_path / "a.mp4", source, fps)
    clip, info = load_clip(path, VideoSpec(17, 32, 32, spec_fps), span)
    assert clip.shape == (17, 32, 32, 3) and clip.dtype == np.uint8
    assert frames_of(clip) == expected
    assert info.duration_s == pytest.approx(source / fps)


@pytest.mark.parametrize("source", [1, 8, 16])
def test_too_short(tmp_path: Path, source: int) -> None:
    path = grey_clip(tmp_path / "a.mp4", source, 16)
    with pytest.raises(TooShort if source < 16 else DataError):
        load_clip(path, VideoSpec(17, 32, 32, 16.0))


@settings(max_examples=60, deadline=None)
@given(*(st.integers(1, 70) for _ in range(4)))
def test_cover_has_the_size_and_keeps_flat_pictures(h: int, w: int, height: int, width: int) -> None:
    image = np.full((h, w, 3), (7, 99, 250), np.uint8)
    assert np.array_equal(cover(image, height, width), np.full((height, width, 3), (7, 99, 250), np.uint8))


def test_equal_size_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(cover(image, 20, 30), image)


@pytest.mark.parametrize(("h", "w"), [(64, 64), (60, 96), (123, 77)])
def test_shrinking_agrees_with_pil(h: int, w: int) -> None:
    """PIL's BILINEAR is the same area-averaging triangle; one level of rounding apart."""
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    scale = max(16 / h, 24 / w)
    size = max(16, round(h * scale)), max(24, round(w * scale))
    reference = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    top, left = (size[0] - 16) // 2, (size[1] - 24) // 2
    expected = reference[top : top + 16, left : left + 24].astype(int)
    assert np.abs(cover(image, 16, 24) - expected).max() <= 1


def test_crop_is_centred() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 40:60] = 255
    assert (cover(image, 40, 20) == 255).all()


def test_nothing_is_stretched() -> None:
    """A disc stays a disc: as many columns as rows."""
    y, x = np.mgrid[:120, :200]
    image = np.repeat((((y - 60) ** 2 + (x - 100) ** 2 < 50**2) * 255).astype(np.uint8)[..., None], 3, 2)
    small = cover(image, 30, 30)[..., 0] > 127
    assert abs(int(small.any(0).sum()) - int(small.any(1).sum())) <= 1


def test_to_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 2, 4, 6) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(((pixels + 1) * 127.5).round().numpy().transpose(1, 2, 3, 0), frames)
