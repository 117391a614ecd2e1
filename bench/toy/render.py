"""The miniature's world in pixels: renders scenes, damages them, writes them as mp4 files with caption twins.

Lengths are in pixels of a 32-pixel frame and scale with the shorter side of the clip; the path covers the same
part of the frame whatever the number of frames.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reelforge.bench.toy.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SPEEDS,
    Scene,
    Split,
    captions,
    misdescribe,
    scenes,
)
from reelforge.engine.core import rng as random
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.progress import track
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.io.video import write_video

TOY_SPEC = VideoSpec(num_frames=17, height=32, width=32, fps=16.0)
REFERENCE_SIDE = 32
RADIUS = (5.6, 6.8)  # of the circle; the other shapes cover about the same area
SOFT_EDGE = 2.6  # width of the smooth rim: below it, sub-pixel motion twinkles and latents alias
_SQUARE_SIDE, _TRIANGLE_SIDE = 0.886, 1.12  # half sides per radius
_SPEED_JITTER = 0.07
_MARGIN = 2.0  # plain background left round a path where there is room: a border ring tells its colour
_CRF = 10
_WRITERS = 4  # writers wait for the disk as long as they compute


def scale_of(height: int, width: int) -> float:
    """Pixels per reference pixel."""
    return min(height, width) / REFERENCE_SIDE


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor | float, soft_edge: float) -> Tensor:
    """How much of each pixel a shape covers, by its signed distance.

    The rim is a quadratic spline, the edge seen through a tent filter: at two pixels wide it is blind to the pixel
    grid, so that the centre of mass moves evenly at any sub-pixel speed (a smoothstep wobbles by 0.05 px).

    Args:
        shape: circle, square, or triangle (isosceles, apex up, as high as wide).
        x: pixel minus centre, to the right.
        y: pixel minus centre, downwards; broadcasts with ``x``.
        radius: broadcasts too.
        soft_edge: pixels from 0 to 1.

    Returns:
        values in [0, 1] of the broadcast shape.
    """
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - _SQUARE_SIDE * radius
    else:
        half = _TRIANGLE_SIDE * radius
        box = torch.maximum(x.abs(), y.abs()) - half  # keeps the rim of the sharp corners short
        distance = torch.maximum((2 * x.abs() - y - half) / 5**0.5, box)
    depth = (-2 / soft_edge * distance).clamp(-1, 1)
    return 0.5 + depth * (1 - depth.abs() / 2)


def path(scene: Scene, spec: VideoSpec, rng: np.random.Generator, pace: float = 1.0) -> tuple[float, Tensor]:
    """Draw where the object goes; it stays inside the frame, rim included.

    Args:
        pace: factor on the scene's speed.

    Returns:
        the radius in pixels, and the centres (x, y), float32 ``[F, 2]``, of uniform straight motion.
    """
    scale = scale_of(spec.height, spec.width)
    radius = rng.uniform(*RADIUS) * scale
    reach = _TRIANGLE_SIDE * radius + SOFT_EDGE / 2 * scale
    travel = SPEEDS[scene.speed] * pace * rng.uniform(1 - _SPEED_JITTER, 1 + _SPEED_JITTER)
    steps = np.array(MOTIONS[scene.motion]) * travel * scale * REFERENCE_SIDE
    size = np.array([spec.width, spec.height])
    room = np.minimum(reach + np.abs(steps) / 2 + _MARGIN * scale, size / 2)
    middle = rng.uniform(room, size - room)
    times = np.linspace(-0.5, 0.5, spec.num_frames)[:, None]
    return radius, torch.from_numpy((middle + times * steps).astype(np.float32))


def render(scene: Scene, spec: VideoSpec, rng: np.random.Generator, pace: float = 1.0) -> np.ndarray:
    """One clean clip, uint8 ``[F, H, W, 3]``; size and path are drawn from ``rng``."""
    return _to_bytes(_draw(scene, spec, rng, pace))


def _draw(scene: Scene, spec: VideoSpec, rng: np.random.Generator, pace: float) -> Tensor:
    radius, centres = path(scene, spec, rng, pace)
    soft_edge = SOFT_EDGE * scale_of(spec.height, spec.width)
    x = (torch.arange(spec.width) + 0.5)[None, None, :] - centres[:, 0, None, None]
    y = (torch.arange(spec.height) + 0.5)[None, :, None] - centres[:, 1, None, None]
    cover = coverage(scene.shape, x, y, radius, soft_edge)[..., None]
    background = torch.tensor(BACKGROUNDS[scene.background])
    return background + cover * (torch.tensor(COLOURS[scene.colour]) - background)


def _to_bytes(frames: Tensor) -> np.ndarray:
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()


@dataclass(frozen=True)
class FlawRates:
    """Probabilities of a clip's flaws; they strike independently.

    Attributes:
        haze: a tinted veil, brighter to one side, over the whole frame.
        washed: colours bleached towards their grey.
        slow_motion: the object covers a quarter of its way.
        blur: a soft picture, as after heavy compression.
        wrong_word: per factor, the caption names another value.
    """

    haze: float = 0.0
    washed: float = 0.0
    slow_motion: float = 0.0
    blur: float = 0.0
    wrong_word: float = 0.0


CLEAN = FlawRates()
WEB = FlawRates(haze=0.35, washed=0.35, slow_motion=0.35, blur=0.15, wrong_word=0.08)
CAPTIONED = FlawRates(haze=0.35, washed=0.35, slow_motion=0.1, blur=0.15)  # described rightly, but no prettier
CURATED = FlawRates(haze=0.1, washed=0.1, slow_motion=0.1)
SLOW_MOTION_PACE = 0.25


def haze(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """A tinted veil of 45 to 65 % over float frames ``[F, H, W, 3]``, with a linear gradient."""
    _, height, width, _ = frames.shape
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.65)
    tint = torch.from_numpy(rng.uniform(0.3, 0.9, 3)).float()
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    ramp = 0.7 + 0.3 * (x * np.cos(angle) + y * np.sin(angle)) / 2**0.5
    return (1 - strength) * frames + strength * ramp[..., None] * tint


def washed(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Keep 25 to 40 % of the chroma of float frames ``[F, H, W, 3]``."""
    grey = frames.mean(-1, keepdim=True)
    return grey + rng.uniform(0.25, 0.4) * (frames - grey)


def blur(frames: Tensor, radius: int = 2) -> Tensor:
    """Two box blurs of ``2 radius + 1`` pixels on float frames ``[F, H, W, 3]``."""
    picture = frames.movedim(-1, 1)
    for _ in range(2):
        padded = functional.pad(picture, (radius,) * 4, mode="replicate")
        picture = functional.avg_pool2d(padded, 2 * radius + 1, 1)
    return picture.movedim(1, -1)


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``.
        scene: what it shows.
        described: what its captions say.
        flaws: names of the :class:`FlawRates` that struck.
    """

    frames: np.ndarray
    scene: Scene
    described: Scene
    flaws: tuple[str, ...]


def make_clip(
    seed: int, index: int, rates: FlawRates = CLEAN, split: Split = "train", spec: VideoSpec = TOY_SPEC
) -> Clip:
    """Clip ``index`` of the endless set (seed, split); the scene and its path do not depend on ``rates``.

    Scenes come in shuffled rounds, so any ``len(scenes(split))`` successive clips of a round show each once.
    """
    choice = scenes(split)
    order = random.generator("toy-order", seed, index // len(choice)).permutation(len(choice))
    scene = choice[order[index % len(choice)]]
    fate = random.generator("toy-flaws", seed, index)
    names = ("haze", "washed", "slow_motion", "blur")
    flaws = tuple(name for name, draw in zip(names, fate.random(4), strict=True) if draw < getattr(rates, name))
    described = misdescribe(scene, rates.wrong_word, fate)
    pace = SLOW_MOTION_PACE if "slow_motion" in flaws else 1.0
    frames = _draw(scene, spec, random.generator("toy", seed, index), pace)
    if "washed" in flaws:
        frames = washed(frames, fate)
    if "haze" in flaws:
        frames = haze(frames, fate)
    if "blur" in flaws:
        frames = blur(frames)
    return Clip(_to_bytes(frames), scene, described, flaws + (("wrong_word",) if described != scene else ()))


def write_clean(folder: Path, count: int, seed: int, split: Split = "train", spec: VideoSpec = TOY_SPEC) -> list[Path]:
    """:func:`write_flawed` without flaws."""
    return write_flawed(folder, count, seed, split, CLEAN, spec)


def write_flawed(
    folder: Path,
    count: int,
    seed: int,
    split: Split = "train",
    rates: FlawRates = WEB,
    spec: VideoSpec = TOY_SPEC,
) -> list[Path]:
    """Write ``count`` clips as ``00000.mp4`` and ``00000.txt`` (one caption per line, short ones first).

    Returns:
        the paths of the mp4 files, in order.
    """

    def write(index: int) -> Path:
        clip, file = make_clip(seed, index, rates, split, spec), folder / f"{index:05d}.mp4"
        write_video(file, clip.frames, spec.fps, crf=_CRF)
        replace_file(file.with_suffix(".txt"), "\n".join(captions(clip.described)) + "\n")
        return file

    with ThreadPoolExecutor(_WRITERS) as pool:
        return list(track(pool.map(write, range(count)), f"rendering {folder.name}", total=count))
