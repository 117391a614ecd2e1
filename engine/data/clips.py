"""The stated policy that brings any clip to a :class:`VideoSpec`.

Time: sampled at the spec's rate from the timestamps (the frame on screen at each time), one span of ``num_frames``,
centred or first; never looped or padded: a shorter clip is refused. Space: scaled to cover, then cropped to the
centre; nothing is stretched.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from reelforge.engine.core.errors import DataError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.io.video import VideoInfo, frames_at, probe

Span = Literal["centre", "first"]


class TooShort(DataError):
    """A clip with fewer frames than the spec asks for."""


def load_clip(path: Path, spec: VideoSpec, span: Span = "centre") -> tuple[np.ndarray, VideoInfo]:
    """One span of a clip, conformed.

    Returns:
        uint8 ``[num_frames, height, width, 3]`` RGB, and what the file said of itself.

    Raises:
        TooShort: it ends before the span does.
        DataError: it cannot be read.
    """
    info = probe(path)
    length_s = spec.num_frames / spec.fps
    if 0 < info.duration_s < length_s - 1 / spec.fps:
        raise TooShort(f"{path} lasts {info.duration_s:.2f} s of {length_s:.2f} s.", "Use a longer clip.")
    # A stream that does not tell its length (0) is read from the start.
    start_s = max(0.0, (info.duration_s - length_s) / 2) if span == "centre" else 0.0
    frames = []
    previous = None
    for image in frames_at(path, spec.fps, start_s, spec.num_frames):
        frames.append(frames[-1] if image is previous else cover(image, spec.height, spec.width))
        previous = image
    return np.stack(frames), info


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale so that the target is just covered, then crop its centre.

    Shrinking averages over the area that becomes a pixel (triangle filter as wide as the scale); enlarging is bilinear.

    Args:
        image: uint8 ``[H,W,3]``.

    Returns:
        uint8 ``[height,width,3]``.
    """
    old_height, old_width, _ = image.shape
    scale = max(height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if size != (old_height, old_width):
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        resized = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        image = resized[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[top : top + height, left : left + width]


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 ``[F,H,W,3]`` to float32 ``[3,F,H,W]`` in [-1, 1], as a codec takes it."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
