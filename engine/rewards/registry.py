"""Scorers by name: what a recipe's ``rewards`` and ``held_out`` lists mean."""

import importlib
from collections.abc import Sequence

from reelforge.engine.core.config import nearest
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scorer

_KNOWN = {
    "toy": ("verifiers", "ToyVerifier"),
    "picture": ("picture", "PictureStatistics"),
}


def build_scorer(name: str, video: VideoSpec) -> Scorer:
    """A scorer for clips of this size.

    Args:
        name: a built-in one (``toy``: vq, mq and ta of the toy world; ``picture``: exposure, saturation, sharpness and
            motion), or ``package.module:Class`` of your own, called with ``video``: see
            :class:`~reelforge.engine.rewards.contract.Scorer`.

    Raises:
        ConfigError: there is no such scorer.
    """
    module, colon, attribute = name.partition(":")
    if name in _KNOWN:
        module, attribute = f"reelforge.engine.rewards.{_KNOWN[name][0]}", _KNOWN[name][1]
    elif not colon:
        raise ConfigError(f"There is no scorer {name!r}.", nearest(name, _KNOWN) + " Or write package.module:Class.")
    try:
        return getattr(importlib.import_module(module), attribute)(video)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"Scorer {name!r} cannot be made ({error}).", "Check the module, the class and its arguments."
        ) from error


def build_scorers(names: Sequence[str], video: VideoSpec) -> list[Scorer]:
    """:func:`build_scorer` of each."""
    return [build_scorer(name, video) for name in names]
