"""Who attends to whom, as dense rectangles of latent frames.

A layout lists, for each group of query frames, the spans of key frames it sees. The model runs one unmasked
attention call per rectangle, so the same weights serve bidirectional, chunk-causal and packed teacher-forcing
forwards, with the FLOPs of the visible part alone (57 % of full attention for 7 chunks).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reelforge.engine.core.errors import ConfigError

Span = tuple[int, int]  # half-open range of frames


@dataclass(frozen=True)
class Rectangle:
    """Query frames ``queries`` see the key frames of every span in ``keys``."""

    queries: Span
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class Layout:
    """Temporal positions of the frames in the sequence, and the rectangles that cover them."""

    frame_index: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]


def chunk_pattern(num_latent_frames: int, chunk_frames: int, first_chunk_frames: int | None = None) -> tuple[int, ...]:
    """Chunk sizes that cover T latent frames: ``(3, 3, ...)``, or ``(1, 3, 3, ...)`` with a first chunk of its own.

    Raises:
        ConfigError: T does not split that way; names the nearest lengths that do.
    """
    first = chunk_frames if first_chunk_frames is None else first_chunk_frames
    rest = num_latent_frames - first
    if rest < 0 or rest % chunk_frames:
        below = first + max(rest, 0) // chunk_frames * chunk_frames
        raise ConfigError(
            f"{num_latent_frames} latent frames do not split into chunks of {first}, then {chunk_frames} each.",
            f"Use {below} or {below + chunk_frames} latent frames, or another chunk size.",
        )
    return (first, *[chunk_frames] * (rest // chunk_frames))


def _chunk_spans(pattern: Sequence[int]) -> list[Span]:
    ends = [sum(pattern[: i + 1]) for i in range(len(pattern))]
    return [(end - size, end) for end, size in zip(ends, pattern, strict=True)]


def bidirectional(num_latent_frames: int) -> Layout:
    """Every frame sees every frame."""
    whole = (0, num_latent_frames)
    return Layout(tuple(range(num_latent_frames)), (Rectangle(whole, (whole,)),))


def chunk_causal(pattern: Sequence[int]) -> Layout:
    """Frames of chunk b see chunks 0 to b."""
    spans = _chunk_spans(pattern)
    return Layout(tuple(range(sum(pattern))), tuple(Rectangle(span, ((0, span[1]),)) for span in spans))


def packed_teacher_forcing(pattern: Sequence[int]) -> Layout:
    """A sequence [clean | noisy] of twice the length, with equal positions in both halves.

    Clean chunk b sees clean chunks 0 to b. Noisy chunk b sees the clean chunks before it and itself, which is what
    a cached rollout with ground-truth context sees.
    """
    spans, total = _chunk_spans(pattern), sum(pattern)
    clean = [Rectangle(span, ((0, span[1]),)) for span in spans]
    noisy = []
    for start, end in spans:
        own = (total + start, total + end)
        noisy.append(Rectangle(own, ((0, start), own) if start else (own,)))
    return Layout(tuple(range(total)) * 2, (*clean, *noisy))
