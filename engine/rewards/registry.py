"""Scorers by name: what a recipe's ``rewards`` and held-out lists mean."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from reelforge.engine.core.config import nearest
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scorer

_OURS = "reelforge.engine.rewards."
_BUILT_IN = {
    "picture": _OURS + "picture:PictureStatistics",
    "clip": _OURS + "clip_score:ClipScore",
    "pick": _OURS + "clip_score:PickScore",
}


def build_scorer(name: str, video: VideoSpec) -> Scorer:
    """A scorer for clips of this size.

    Args:
        name: a built-in one, or ``package.module:Class`` of your own, see
            :class:`~reelforge.engine.rewards.contract.Scorer`. It is called with ``video``, and with what follows a
            ``=`` as a string: ``clip=models/clip-vit-large-patch14``. Built in are ``picture``
            (statistics of any video), ``clip=FOLDER`` and ``pick=FOLDER`` (CLIP and PickScore text alignment).

    Raises:
        ConfigError: there is no such scorer, or it does not take these arguments, or it is none.
    """
    which, equals, argument = name.partition("=")
    made = _find(which)
    arguments = (video, argument) if equals else (video,)
    try:
        inspect.signature(made).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"Scorer {name!r} cannot be made: {error}.", _usage(which, made)) from error
    scorer = made(*arguments)
    axes = getattr(scorer, "axes", None)
    if not (isinstance(axes, tuple) and all(isinstance(axis, str) for axis in axes)):
        raise ConfigError(f"Scorer {name!r} has axes = {axes!r}.", 'Give it a tuple of names: axes = ("mine",).')
    if not callable(getattr(scorer, "score", None)):
        raise ConfigError(f"Scorer {name!r} has no method score.", "Write score(self, videos, prompts).")
    return scorer


def build_scorers(names: Sequence[str], video: VideoSpec) -> list[Scorer]:
    """:func:`build_scorer` of each."""
    return [build_scorer(name, video) for name in names]


def _find(which: str) -> Callable[..., Any]:
    module, colon, attribute = _BUILT_IN.get(which, which).partition(":")
    if not colon:
        hint = f"{nearest(which, _BUILT_IN)} Your own is package.module:Class."
        raise ConfigError(f"There is no scorer {which!r}.", hint)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "Check the spelling; install its package, or put its folder on PYTHONPATH."
        raise ConfigError(f"Scorer {which!r} cannot be imported ({error}).", hint) from error
    if not callable(found):
        raise ConfigError(f"Scorer {which!r} is of type {type(found).__name__}.", "Name a class or a function.")
    return found


def _usage(which: str, made: Callable[..., Any]) -> str:
    """How a scorer is named, by its parameters after the video."""
    further = list(inspect.signature(made).parameters.values())[1:]
    if not further:
        return f"Write {which!r}, without '='."
    return f"Write '{which}={further[0].name.upper()}'."
