"""Curation by declared ranges over cheap statistics, and the report of what was set aside and why.

Statistics are taken once per conformed clip and kept with its latents, so ranges can change without decoding again.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.engine.core.files import replace_file
from reelforge.engine.data.manifest import Reject, Sample
from reelforge.engine.io.video import VideoInfo

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_STILLS = 8
_RING = 8  # the outer eighth of the shorter side, on each edge


@dataclass(frozen=True)
class Range:
    """Inclusive bounds."""

    min: float = -math.inf
    max: float = math.inf


@dataclass(frozen=True)
class ScoreRange:
    """Bounds of a score that the manifest brings; a clip without it is set aside.

    Attributes:
        name: as in the manifest.
    """

    name: str
    min: float = -math.inf
    max: float = math.inf


@dataclass(frozen=True)
class Stats:
    """Cheap facts about a clip; levels are those of 8-bit RGB.

    Attributes:
        duration_s: of the file; 0 when it does not say, and then no filter looks at it.
        height: of the file, pixels as shown.
        width: of the file, pixels as shown.
        brightness: mean luma, 0 to 255.
        contrast: standard deviation of luma over a frame, mean over frames, levels.
        saturation: chroma (max - min of R, G, B) that one pixel in twenty exceeds, levels; low when washed out.
        motion: speed of edges, pixels per frame: sum of |dI/dt| over sum of |grad I| (normal flow; Horn and Schunck
            1981), so it does not depend on contrast.
        static_share: share of successive frames that differ by less than half a level.
        sharpness: standard deviation of the luma's 4-neighbour Laplacian, levels.
        background_deviation: standard deviation of the border ring of the temporal median, mean over R, G, B, levels;
            high for vignettes, haze and busy backgrounds.
    """

    duration_s: float
    height: float
    width: float
    brightness: float
    contrast: float
    saturation: float
    motion: float
    static_share: float
    sharpness: float
    background_deviation: float


@dataclass(frozen=True)
class FilterConfig:
    """Which clips to keep: a range per :class:`Stats` field, and of the captions and the manifest's scores.

    Attributes:
        caption_words: words of the longest caption.
        scores: each must be present and in range.
        splits: keep these splits only; empty keeps all.
    """

    duration_s: Range = Range()
    height: Range = Range()
    width: Range = Range()
    brightness: Range = Range()
    contrast: Range = Range()
    saturation: Range = Range()
    motion: Range = Range()
    static_share: Range = Range()
    sharpness: Range = Range()
    background_deviation: Range = Range()
    caption_words: Range = Range()
    scores: tuple[ScoreRange, ...] = ()
    splits: tuple[str, ...] = ()


def measure(frames: np.ndarray, info: VideoInfo) -> Stats:
    """Statistics of a conformed clip, uint8 ``[F,H,W,3]``; ``info`` is of its file.

    Large clips are sampled: every k-th pixel so that the shorter side keeps 128 or more, and 8 frames where time does
    not matter (0.3 s instead of 6 s for 81 frames of 480 x 832).
    """
    stride = max(1, min(frames.shape[1:3]) // 128)
    few = frames[np.linspace(0, len(frames) - 1, min(len(frames), _STILLS)).astype(int)]
    coarse, stills = frames[:, ::stride, ::stride], few[:, ::stride, ::stride]
    luma = stills @ _LUMA
    pairs = zip(coarse[1:].astype(np.int16), coarse, strict=False)
    steps = np.array([np.abs(later - earlier).mean() for later, earlier in pairs] or [0.0])
    values = (
        luma.mean(),
        luma.std((1, 2)).mean(),
        np.percentile(stills.max(-1) - stills.min(-1), 95),
        _motion(steps.mean(), stills) * stride,
        (steps < 0.5).mean(),
        _sharpness(few @ _LUMA),
        _background_deviation(stills),
    )
    return Stats(info.duration_s, float(info.height), float(info.width), *(round(float(v), 4) for v in values))


def _motion(change: float, stills: np.ndarray) -> float:
    """``change`` is the mean of |dI/dt| in levels; the gradient is that of the stills, in levels per pixel."""
    levels = stills.astype(np.float32)
    down = (levels[:, 2:, 1:-1] - levels[:, :-2, 1:-1]) / 2
    right = (levels[:, 1:-1, 2:] - levels[:, 1:-1, :-2]) / 2
    gradient = np.hypot(down, right).mean()
    return change / float(gradient) if gradient else 0.0


def _sharpness(luma: np.ndarray) -> float:
    neighbours = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return float((neighbours - 4 * luma[:, 1:-1, 1:-1]).std())


def _background_deviation(frames: np.ndarray) -> float:
    _, height, width, _ = frames.shape
    edge = max(1, min(height, width) // _RING)
    ring = np.ones((height, width), bool)
    ring[edge : height - edge, edge : width - edge] = False
    return float(np.median(frames[:, ring], axis=0).std(0).mean())


def first_fault(sample: Sample, stats: Stats, config: FilterConfig) -> tuple[str, str] | None:
    """(reason, detail) of the first filter that a clip fails, or None."""
    if config.splits and sample.split not in config.splits:
        return "filter:splits", f"split {sample.split!r} is not one of {', '.join(config.splits)}"
    values = dataclasses.asdict(stats)
    values["caption_words"] = max(len(caption.split()) for caption in sample.captions)
    if not stats.duration_s:  # Matroska with sound does not say; a file too short for the span is refused anyway
        del values["duration_s"]
    for name, value in values.items():
        bounds: Range = getattr(config, name)
        if not bounds.min <= value <= bounds.max:
            return f"filter:{name}", f"{name} {value:g} is outside [{bounds.min:g}, {bounds.max:g}]"
    for score in config.scores:
        value = sample.scores.get(score.name)
        if value is None or not score.min <= value <= score.max:
            return (
                f"filter:{score.name}",
                f"score {score.name} {value} is outside [{score.min:g}, {score.max:g}]",
            )
    return None


def write_report(path: Path, accepted: int, rejects: Sequence[Reject]) -> str:
    """Write ``reject_report.json`` and return its one-line summary.

    The file holds ``total``, ``accepted``, ``counts`` by reason, and ``rejects`` with id, path, reason and detail.
    """
    counts = dict(Counter(reject.reason for reject in rejects).most_common())
    total = accepted + len(rejects)
    body = {
        "total": total,
        "accepted": accepted,
        "counts": counts,
        "rejects": [dataclasses.asdict(r) for r in rejects],
    }
    replace_file(path, json.dumps(body, indent=1, ensure_ascii=False))
    summary = f"{total} clips: {accepted} kept, {len(rejects)} rejected"
    return summary + (f" ({', '.join(f'{reason} {count}' for reason, count in counts.items())})" if counts else "")
