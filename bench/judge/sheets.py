"""Contact sheets: the same prompts and seeds as rows, stages as columns, so that eyes compare like with like."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.uint8]  # [F, height, width, 3]

_SMALL, _LARGE = 64, 96  # frame heights in pixels: up to the first magnified to about 128, above the second reduced
_GAP = 4
_MAX_MOVING_FRAMES = 20


@dataclass(frozen=True)
class Row:
    """One prompt and seed; ``clips[i]`` belongs to column i."""

    prompt: str
    seed: int
    clips: tuple[Frames, ...]
    note: str = ""

    @property
    def pixelated(self) -> bool:
        """Frames are so small that single pixels are worth seeing."""
        return self.clips[0].shape[1] <= _SMALL


@dataclass(frozen=True)
class Sheet:
    """A comparison of ``columns`` (the truth first) on ``rows``; ``lead`` is a sentence for the reader."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    fps: float
    lead: str = ""


def filmstrip(clip: Frames, frames: int = 6) -> Image.Image:
    """Evenly spaced frames side by side, first and last included."""
    picked = _magnify(_shrink(_spread(clip, frames)))
    return _beside([Image.fromarray(frame) for frame in picked], gap=1)


def moving_row(row: Row, fps: float) -> tuple[list[Image.Image], int]:
    """All clips of a row side by side, so that the columns stay in step; and how long a picture stays, in ms.

    Small frames keep their size, for the page to magnify.
    """
    clips = [thumbnail(clip) for clip in row.clips]
    length = max(len(clip) for clip in clips)
    pictures = [_beside([Image.fromarray(c[min(i, len(c) - 1)]) for c in clips], gap=1) for i in range(length)]
    return pictures, round(1000 * max(len(clip) for clip in row.clips) / fps / length)


def thumbnail(clip: Frames) -> Frames:
    """As many and as large frames as a page moves."""
    return _shrink(_spread(clip, _MAX_MOVING_FRAMES))


def webp(pictures: Sequence[Image.Image], lossless: bool, duration_ms: int = 0) -> bytes:
    """One picture, or a loop of several."""
    stream = io.BytesIO()
    pictures[0].save(
        stream, "WEBP", save_all=True, append_images=pictures[1:], duration=duration_ms,
        loop=0, lossless=lossless, quality=70, method=2,
    )  # fmt: skip
    return stream.getvalue()


def contact_sheet(sheet: Sheet, frames: int = 6) -> Image.Image:
    """The whole sheet as one picture with names and prompts written on it."""
    strips = [[filmstrip(clip, frames) for clip in row.clips] for row in sheet.rows]
    width, height = strips[0][0].size
    line = 22
    size = ((width + 3 * _GAP) * len(sheet.columns), line + (height + line + _GAP) * len(sheet.rows))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, name in enumerate(sheet.columns):
        draw.text((i * (width + 3 * _GAP), 3), name, "black", font)
    for i, row in enumerate(sheet.rows):
        top = line + i * (height + line + _GAP)
        draw.text((0, top + 2), f"{row.prompt}  (seed {row.seed})  {row.note}", "#555555", font)
        for j, strip in enumerate(strips[i]):
            page.paste(strip, (j * (width + 3 * _GAP), top + line), strip)
    return page


def _spread(clip: Frames, count: int) -> Frames:
    return clip[np.unique(np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int))]


def _magnify(clip: Frames) -> Frames:
    """Small frames by a whole factor: pixels stay pixels."""
    height = clip.shape[1]
    factor = round(2 * _SMALL / height) if height <= _SMALL else 1
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def _shrink(clip: Frames) -> Frames:
    """Large frames by area."""
    _, height, width, _ = clip.shape
    if height <= _LARGE:
        return clip
    size = (round(width * _LARGE / height), _LARGE)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip])


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width, height = pictures[0].size
    strip = Image.new("RGBA", (len(pictures) * (width + gap) - gap, height), (0, 0, 0, 0))
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * (width + gap), 0))
    return strip
