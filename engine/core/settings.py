"""The one place that reads the environment."""

import os
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Settings:
    """What the process environment decides.

    Attributes:
        rank: this process among ``world_size`` (``RANK``, set by torchrun).
        world_size: number of processes (``WORLD_SIZE``).
        local_rank: this process on its machine (``LOCAL_RANK``).
        plain_output: no colours or live progress bars (``CI`` or ``NO_COLOR``).
        kernel_pins: (op, implementation) pairs to force (``REELFORGE_KERNELS``, e.g. ``attention=cudnn,gelu=torch``).
    """

    rank: int
    world_size: int
    local_rank: int
    plain_output: bool
    kernel_pins: tuple[tuple[str, str], ...]


@cache
def settings() -> Settings:
    """Read the environment once per process."""
    env = os.environ  # noqa: TID251  (this file is the rule's one exception)
    return Settings(
        rank=int(env.get("RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        plain_output=bool(env.get("CI") or env.get("NO_COLOR")),
        kernel_pins=_pairs(env.get("REELFORGE_KERNELS", "")),
    )


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``a=b,c=d`` as pairs; a part without ``=`` pairs with nothing and is refused where it is used."""
    parts = [part.partition("=") for part in text.split(",") if part]
    return tuple((name.strip(), value.strip()) for name, _, value in parts)
