"""Requests as people make them, for judging rewriters: held-out phrasings of held-out scenes, and templates to beat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.bench.evaluation import REWARDS, Judge, evaluate, held_out_prompts
from reelforge.bench.toy.requests import Phrasings, request
from reelforge.bench.toy.world import Scene, parse_prompt, scenes
from reelforge.engine.core import rng
from reelforge.engine.enhance.rewriter import load_rewriter
from reelforge.engine.model.folder import ModelFolder

Rewrite = Callable[[Sequence[str]], list[str]]  # requests to prompts

# What a team without a rewriter would do: the same words around every request.
TEMPLATES = (
    "{}, high quality, sharp and clean",
    "a video of {} on a plain grey background",
    "a still camera watches {} over a clean black background",
    "{} moving slowly on a navy background",
    "on a grey background, {} drifts at a slow pace",
)


@dataclass(frozen=True)
class Kept:
    """What rewrites do to their requests.

    Attributes:
        preserved: share that still names every factor that the request names, and as it names it.
        copied: share that is the request itself.
        distinct: different rewrites over different requests.
        words: mean length.
    """

    preserved: float
    copied: float
    distinct: float
    words: float


def held_out_requests(count: int) -> list[str]:
    """A request of a held-out phrasing for each of ``count`` held-out scenes, in the captions' order; all differ."""
    return _different([scene for scene, _ in held_out_prompts(count)], "held_out", "held_out_request_1")


def training_requests(count: int, seed: int = 0) -> list[str]:
    """One request for each of ``count`` training scenes, in training phrasings."""
    order = rng.generator("training_scenes", seed).permutation(len(scenes("train")))[:count]
    return _different([scenes("train")[place] for place in order], "train", f"training_request_{seed}")


def _different(wanted: Sequence[Scene], phrasings: Phrasings, purpose: str) -> list[str]:
    """One request a scene; two scenes must not share one, which would make them one prompt with one noise."""
    found: dict[str, None] = {}
    for place, scene in enumerate(wanted):
        drawn = rng.generator(purpose, place)
        while (text := request(scene, phrasings, drawn)) in found:
            pass
        found[text] = None
    return list(found)


def template(number: int) -> Rewrite:
    """Puts every request into a template."""
    return lambda requests: [TEMPLATES[number].format(request) for request in requests]


def trained(folder: Path) -> Rewrite:
    """A rewriter's folder as a function of requests."""
    rewriter = load_rewriter(folder)
    return lambda requests: [made.prompt for made in rewriter(requests)]


def best_template(folder: ModelFolder, judge: Judge, requests: Sequence[str], batch_size: int, seed: int) -> int:
    """The template whose clips of these requests earn most, a clip each, rewards in standard deviations.

    The requests must be training ones: what is judged must not choose.
    """
    tables = []
    for number in range(len(TEMPLATES)):
        label = f"template {number + 1} of {len(TEMPLATES)}"
        found = evaluate(folder, judge, requests, 1, seed, batch_size, label, written=template(number)(requests))
        tables.append(np.stack([found.measured.scores[reward.name] for reward in REWARDS]))
    scores = np.stack(tables)  # [templates, rewards, requests]
    spread = np.nanstd(scores, axis=(0, 2))
    return int(np.argmax((np.nanmean(scores, axis=2) / spread).mean(1)))


def kept(requests: Sequence[str], rewrites: Sequence[str]) -> Kept:
    """Facts on rewrites of these requests."""
    named = [(parse_prompt(asked), parse_prompt(text)) for asked, text in zip(requests, rewrites, strict=True)]
    return Kept(
        preserved=float(np.mean([asked.items() <= text.items() for asked, text in named])),
        copied=float(np.mean([asked == text for asked, text in zip(requests, rewrites, strict=True)])),
        distinct=len(set(rewrites)) / len(set(requests)),
        words=float(np.mean([len(text.split()) for text in rewrites])),
    )
