"""The miniature's world in words: one flat shape moves over a plain background.

A scene is five factors, shape x colour x motion x speed x background: 432 scenes. Its captions name all five or
leave speed and background out, so a caption is a promise about the factors it names and about nothing else.
One sixth of the (colour, shape, motion) triples is held out: since every caption names all three, no caption
of a held-out scene is also a caption of a training scene, while every single value, and every pair of values
among colour, shape and motion, still appears in training.
"""

import itertools
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import numpy as np

Split = Literal["train", "held_out", "all"]

SHAPES = ("circle", "square", "triangle")
# RGB in [0, 1]. Every colour differs from every background by at least 0.3 in some channel.
COLOURS = {
    "red": (0.88, 0.14, 0.14),
    "green": (0.12, 0.68, 0.24),
    "blue": (0.14, 0.34, 0.96),
    "yellow": (0.98, 0.82, 0.12),
    "purple": (0.66, 0.20, 0.80),
    "cyan": (0.10, 0.80, 0.88),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down
SPEEDS = {"slow": 0.2, "fast": 0.4}  # travel over the whole clip, in shorter frame sides
# Dark ones: with white among them the same shape is bright on one and dark on the next, which a small model learns
# much more slowly.
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.04),
    "grey": (0.26, 0.26, 0.26),
    "navy": (0.06, 0.10, 0.34),
}
FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}

_HELD_OUT_EVERY = 6
_ADVERBS = {"slow": "slowly", "fast": "quickly"}
_TOWARDS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
_TEMPLATES = (
    "a {colour} {shape} moving {motion}",
    "a {colour} {shape} moving {motion} on a {background} background",
    "a {colour} {shape} moving {adverb} {towards}",
    "a {colour} {shape} moving {adverb} {towards} on a {background} background",
    "a {colour} {shape} glides {adverb} {towards} across a plain {background} background",
    "on a {background} background, a {colour} {shape} drifts {towards} at a {speed} pace",
    "a still camera watches a {colour} {shape} travel {adverb} {towards} over a clean {background} background",
)
# What people call a value, the captions' own name first; see requests.py.
NAMES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc", "dot"),
    "square": ("square", "box", "block", "tile"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "red": ("red", "scarlet", "crimson"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "azure", "cobalt"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "lilac"),
    "cyan": ("cyan", "turquoise", "teal"),
    "left": ("left", "leftwards", "west"),
    "right": ("right", "rightwards", "east"),
    "up": ("up", "upwards", "north"),
    "down": ("down", "downwards", "south"),
    "slow": ("slow", "calm", "lazy"),
    "fast": ("fast", "quick", "swift"),
    "black": ("black", "dark"),
    "grey": ("grey", "slate"),
    "navy": ("navy", "midnight"),
}
_SYNONYMS = {
    "slowly": "slow",
    "quickly": "fast",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "gray": "grey",
    **{name: value for value, names in NAMES.items() for name in names},
}
_FACTOR_OF = {value: factor for factor, values in FACTORS.items() for value in values}


@dataclass(frozen=True)
class Scene:
    """What is to be seen; values are keys of :data:`FACTORS`."""

    shape: str
    colour: str
    motion: str
    speed: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether no training may see this scene.

        The rule is a Latin square over (colour, shape, motion): any two of the three leave at most one
        held-out value of the third.
        """
        code = FACTORS["colour"].index(self.colour) + 2 * SHAPES.index(self.shape)
        return (code + FACTORS["motion"].index(self.motion)) % _HELD_OUT_EVERY == 0


@cache
def scenes(split: Split = "all") -> tuple[Scene, ...]:
    """The split's scenes in a fixed order: 360 to train on, 72 held out."""
    every = (Scene(*values) for values in itertools.product(*FACTORS.values()))
    return tuple(scene for scene in every if split == "all" or scene.held_out == (split == "held_out"))


def captions(scene: Scene) -> tuple[str, ...]:
    """All captions of a scene, short ones first; the first names shape, colour and motion only."""
    words = asdict(scene) | {"adverb": _ADVERBS[scene.speed], "towards": _TOWARDS[scene.motion]}
    return tuple(template.format(**words) for template in _TEMPLATES)


def parse_prompt(prompt: str) -> dict[str, str]:
    """The factors that a prompt names, e.g. ``{"shape": "circle", "colour": "red", "motion": "left"}``.

    Works on words, so any phrasing will do. A factor named with two different values is not a promise that a
    clip can keep or break, and is left out.
    """
    named: dict[str, set[str]] = {}
    for word in re.findall("[a-z]+", prompt.lower()):
        value = _SYNONYMS.get(word, word)
        if value in _FACTOR_OF:
            named.setdefault(_FACTOR_OF[value], set()).add(value)
    return {factor: values.pop() for factor, values in named.items() if len(values) == 1}


def misdescribe(scene: Scene, rate: float, rng: np.random.Generator) -> Scene:
    """The scene that a careless captioner saw: each factor wrong with probability ``rate``.

    Never turns a training scene into a held-out one, whose captions must stay unseen.
    """
    while True:
        wrong = {
            factor: str(rng.choice([v for v in values if v != getattr(scene, factor)]))
            for factor, values in FACTORS.items()
            if rng.random() < rate
        }
        described = Scene(**asdict(scene) | wrong)
        if scene.held_out or not described.held_out:
            return described
