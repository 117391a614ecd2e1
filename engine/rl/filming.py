"""Videos of rewritten prompts, scored against the requests that they answer.

The generator is frozen. All takes of a request have the same noise, so their scores differ by the words alone; two
takes with the same words are the same video, and are made once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from reelforge.engine.model.generator import Generator, Job
from reelforge.engine.rewards.scoring import Scoring


@dataclass(frozen=True)
class Take:
    """A video to make: of ``prompt``, for who asked for ``request``, from the request's noise number ``noise``."""

    request: str
    prompt: str
    noise: int


class Filming:
    """Makes takes and asks for their rewards.

    Args:
        generator: how, and with which model.
        scoring: rewards; it decodes.

    Attributes:
        made: videos so far.
        seconds: spent sampling so far; scoring goes on beside it.
    """

    def __init__(self, generator: Generator, scoring: Scoring) -> None:
        self.generator, self.scoring = generator, scoring
        self.made, self.seconds = 0, 0.0

    def __call__(self, takes: Sequence[Take]) -> Tensor:
        """Rewards of each take, fp64 ``[R, N]``; NaN where a scorer had no answer or the latents are not finite."""
        once, size = list(dict.fromkeys(takes)), self.generator.config.batch_size
        pending = []
        for start in range(0, len(once), size):
            begin, batch = time.monotonic(), once[start : start + size]
            latents = self.generator.latents([Job(take.prompt, take.noise, take.request) for take in batch])
            sound = latents.isfinite().flatten(1).all(1)
            self.seconds += time.monotonic() - begin
            scores = self.scoring.submit(latents.where(sound[:, None, None, None, None], 0), [t.request for t in batch])
            pending.append((scores, sound.cpu()))
        self.made += len(once)
        found = torch.cat([self._values(scores.result(), sound) for scores, sound in pending], 1)
        place = {take: index for index, take in enumerate(once)}
        return found[:, [place[take] for take in takes]]

    def _values(self, scores: dict, sound: Tensor) -> Tensor:
        return torch.stack([scores[axis].values.double().where(sound, torch.nan) for axis in self.scoring.axes])


def rank_correlation(rewards: Tensor, others: Tensor) -> float:
    """Spearman's rho between two generators' rewards of the same takes, ``[R, N]`` each, mean over rewards.

    Takes that lack a score are left out; a reward that does not vary has no ranks and counts as 0.
    """
    found = []
    for here, there in zip(rewards.numpy(), others.numpy(), strict=True):
        both = np.isfinite(here) & np.isfinite(there)
        varied = both.any() and np.ptp(here[both]) > 0 and np.ptp(there[both]) > 0
        found.append(float(spearmanr(here[both], there[both]).statistic) if varied else 0.0)
    return float(np.mean(found))
