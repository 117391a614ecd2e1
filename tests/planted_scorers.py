"""Scorers that behave, misbehave and are easily fooled: named by recipes in tests as ``planted_scorers:Class``."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scores


class Scorer:
    axes: tuple[str, ...] = ()

    def __init__(self, video: VideoSpec) -> None:
        self.video = video


class Bright(Scorer):
    """Mean level: a reward that is gamed by turning everything white."""

    axes = ("bright",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {"bright": Scores.of(videos.float().mean((1, 2, 3, 4)) / 255)}


class Dim(Scorer):
    """What brightness costs: it falls exactly as :class:`Bright` rises."""

    axes = ("dim",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {"dim": Scores.of(1 - videos.float().mean((1, 2, 3, 4)) / 255)}


class Even(Scorer):
    """The same for every clip."""

    axes = ("even",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {"even": Scores.of(torch.full((len(videos),), 0.1))}


class Choosy(Bright):
    """Has no score for a clip whose first pixel is odd."""

    axes = ("choosy",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        level = videos.float().mean((1, 2, 3, 4)) / 255
        return {"choosy": Scores.of(level, videos[:, 0, 0, 0, 0] % 2 == 0)}


class Raising(Bright):
    """Fails for every batch."""

    axes = ("raising",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        raise RuntimeError("the reward server is down")


class Failing(Bright):
    """Answers ``good`` batches, then fails."""

    axes = ("failing",)
    good = 3

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        type(self).good -= 1
        if self.good < 0:
            raise RuntimeError("the reward server is down")
        return {"failing": super().score(videos, prompts)["bright"]}


class Hanging(Bright):
    """Takes longer than anyone waits."""

    axes = ("hanging",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        time.sleep(5)
        return {"hanging": super().score(videos, prompts)["bright"]}
