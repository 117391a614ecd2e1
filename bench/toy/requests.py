"""How people ask for a toy-world clip: short, in their own words, naming some of its factors.

A caption names factors in the ten words that the miniature was trained on; a request may call the circle a ball and the
left the west, leave speed and background open, and put it in any order. Some phrasings are kept for judging: no
rewriter sees them in training.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

import numpy as np

from reelforge.bench.toy.world import NAMES, Scene, captions, parse_prompt

Phrasings = Literal["train", "held_out"]

# A request is an opening, a core and a closing; the held-out ones share no core with training, and no
# opening but none at all.
_OPENINGS: Mapping[Phrasings, tuple[str, ...]] = {
    "train": ("", "", "", "show me ", "i want ", "make ", "give me ", "please draw "),
    "held_out": ("", "can you do ", "a clip of ", "i would like "),
}
_CORES: Mapping[Phrasings, tuple[str, ...]] = {
    "train": (
        "{colour} {shape}, {motion}",
        "a {colour} {shape} going {motion}",
        "a {colour} {shape} that goes {motion}",
        "{motion} moving {colour} {shape}",
        "a {shape}, {colour}, heading {motion}",
        "{speed} {colour} {shape} heading {motion}",
        "a {colour} {shape} go {motion}, {speed}",
        "{shape} {colour} {motion}",
        "{colour} {shape} on {background}, {motion}",
        "{background} background, {speed} {colour} {shape}, {motion}",
        "{shape} {colour} {motion} {speed} {background}",
        "{motion}: {colour} {shape}",
        "{speed} {motion}, {colour} {shape}",
        "something {colour}, a {shape}, {motion} on {background}",
    ),
    "held_out": (
        "a {colour} {shape} heading {motion} on {background}",
        "{shape} in {colour} that moves {motion}, {speed}",
        "{motion}, a {colour} {shape}",
        "the {speed} {colour} {shape} moving {motion}",
        "a {shape} of {colour} going {motion}",
    ),
}
_CLOSINGS = ("", "", "", " please", "?", "!")


def request(scene: Scene, phrasings: Phrasings, rng: np.random.Generator) -> str:
    """One way to ask for a scene; names its shape, colour and motion, and speed or background now and then."""
    words = {factor: str(rng.choice(NAMES[value])) for factor, value in asdict(scene).items()}
    parts = (_OPENINGS[phrasings], _CORES[phrasings], _CLOSINGS)
    return "".join(str(rng.choice(part)) for part in parts).format(**words)


def pair(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """A request of a training phrasing, what it names in the captions' words, and a caption that says it in full.

    Truthful by construction: all describe the scene, and the caption settles what the request leaves open.
    """
    asked = request(scene, "train", rng)
    thought = " ".join(parse_prompt(asked).values())
    return {"request": asked, "thought": thought, "caption": str(rng.choice(captions(scene)[3:]))}
