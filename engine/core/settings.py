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
    """

    rank: int
    world_size: int
    local_rank: int
    plain_output: bool


@cache
def settings() -> Settings:
    """Read the environment once per process."""
    env = os.environ  # noqa: TID251  (this file is the rule's one exception)
    return Settings(
        rank=int(env.get("RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        plain_output=bool(env.get("CI") or env.get("NO_COLOR")),
    )
