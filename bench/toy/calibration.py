"""Clips whose quality is known, to ask the toy world's measures about: the truth, and one damage at a time.

A reward is only worth training on if damage moves its own axis and leaves the others; a held-out measure is only
worth reporting beside its truth row.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reelforge.bench.toy import render
from reelforge.bench.toy.held_out import Basis
from reelforge.bench.toy.render import CLEAN, TOY_SPEC, FlawRates, make_clip
from reelforge.bench.toy.world import captions
from reelforge.engine.core import rng
from reelforge.engine.core.types import VideoSpec

_LEVEL = 0.06  # amplitude of noise, checkerboards and pulsing: plainly visible, far from destroying the clip
_FLAWS = {
    "haze": FlawRates(haze=1.0),
    "washed": FlawRates(washed=1.0),
    "slow motion": FlawRates(slow_motion=1.0),
    "soft picture": FlawRates(blur=1.0),
    "wrong words": FlawRates(wrong_word=0.5),
    "web": render.WEB,
    "curated": render.CURATED,
    "all flaws": FlawRates(1.0, 1.0, 1.0, 1.0, 0.5),
}


def _clips(count: int, seed: int, rates: FlawRates, spec: VideoSpec) -> tuple[Tensor, list[str]]:
    clips = [make_clip(seed, index, rates, "all", spec) for index in range(count)]
    videos = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return videos, [captions(clip.described)[-1] for clip in clips]


def _add(videos: Tensor, pattern: Tensor) -> Tensor:
    return (videos + 255 * _LEVEL * pattern).round().clamp(0, 255).to(torch.uint8)


def _checkerboard(videos: Tensor, cell: int) -> Tensor:
    y, x = torch.arange(videos.shape[2]) // cell, torch.arange(videos.shape[3]) // cell
    return _add(videos, (1 - 2 * ((y[:, None] + x) % 2))[..., None])


def _noise(videos: Tensor) -> Tensor:
    return _add(videos, rng.normal([rng.key("toy-damage", i) for i in range(len(videos))], videos.shape[1:]))


def _pulse(videos: Tensor) -> Tensor:
    return _add(videos, (1 - 2 * (torch.arange(videos.shape[1]) % 2))[:, None, None, None])


def _jitter(videos: Tensor) -> Tensor:
    """Every other frame one pixel to the right."""
    shaken = videos.clone()
    shaken[:, 1::2] = videos[:, 1::2].roll(1, dims=3)
    return shaken


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": _noise,
    "frozen": lambda videos: videos[:, :1].expand_as(videos).contiguous(),
    "checkerboard 2 px": lambda videos: _checkerboard(videos, 2),
    "checkerboard 4 px": lambda videos: _checkerboard(videos, 4),
    "checkerboard 8 px": lambda videos: _checkerboard(videos, 8),
    "pulsing": _pulse,
    "jitter": _jitter,
}


def learn_basis(seed: int, count: int = 1024, spec: VideoSpec = TOY_SPEC) -> Basis:
    """The held-out measures' basis from ``count`` true clips of all scenes."""
    return Basis.of(_clips(count, seed, CLEAN, spec)[0], seed)


def known_clips(count: int, seed: int, spec: VideoSpec = TOY_SPEC) -> Iterator[tuple[str, Tensor, list[str]]]:
    """Clips of known quality: clean ones first, then the same scenes and paths with one damage at a time.

    Args:
        count: clips of each kind.
        seed: must differ from the basis' seed.

    Yields:
        the kind, uint8 ``[count, F, H, W, 3]``, and the prompts, which name all five factors.
    """
    clean, prompts = _clips(count, seed, CLEAN, spec)
    yield "clean", clean, prompts
    yield "shuffled captions", clean, prompts[1:] + prompts[:1]
    for name, rates in _FLAWS.items():
        yield name, *_clips(count, seed, rates, spec)
    for name, damage in DAMAGES.items():
        yield name, damage(clean), prompts
