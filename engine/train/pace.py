"""A learning rate that follows how much of the gradient is signal.

A gradient is signal plus noise of its batch, g = s + n. Successive steps share s and not n, so the cosine of their
gradients estimates |s|^2 / (|s|^2 + |n|^2): by which factor the best step along a noisy gradient is shorter than along
a clean one. Adam divides that length away: where nothing is left but noise it walks on at full stride, and a policy
gradient is mostly noise. So the rate follows what is certain of the cosine, its mean over steps less some standard
errors: where there is no signal at all (shuffled rewards) the weights stay where they are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError

_FEWEST = 2.2  # three cosines; the faded weights of two never count as more than two, of three as 2.3 or more


@dataclass(frozen=True)
class PaceConfig:
    """How the rate follows the cosine of successive gradients.

    Attributes:
        full_cosine: a certain cosine from which on the full rate is taken, below in proportion; 0 always takes it.
        memory: share of the past in the running mean, per step.
        doubt: standard errors that are taken off the mean. Noise alone passes 3 now and then over a run, by little.
    """

    full_cosine: float = 0.0
    memory: float = 0.95
    doubt: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("full_cosine", 0.0), ("memory", 0.5)):
            if not least <= getattr(self, name) < 1:
                raise ConfigError(f"pace.{name} is {getattr(self, name)}.", f"It must be in [{least:g}, 1).")
        if not 0 <= self.doubt < math.inf:
            raise ConfigError(f"pace.doubt is {self.doubt}.", "It must be 0 or more.")


class Pace:
    """Compares each step's gradient with the one before.

    Args:
        config: the rule.
        parameters: those whose gradients it will be told, in their order.
        elements: how many entries are compared at most, spread evenly over all: memory, not accuracy, is the limit.
    """

    def __init__(self, config: PaceConfig, parameters: Iterable[Tensor], elements: int = 1 << 22) -> None:
        shapes = [(parameter.numel(), parameter.device) for parameter in parameters]
        self.config = config
        self._stride = max(1, sum(count for count, _ in shapes) // elements)
        size, device = sum(len(range(0, count, self._stride)) for count, _ in shapes), shapes[0][1]
        self._last = torch.zeros(size, device=device)
        # Running sums over pairs, older ones faded: of weights, their squares, cosines, their squares.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._cosines: list[Tensor] = []

    @property
    def carried(self) -> dict[str, Tensor]:
        """What a run's checkpoint must hold."""
        return {"pace_last": self._last, "pace_sums": self._sums}

    def __call__(self, gradients: Sequence[Tensor]) -> float:
        """By what to multiply the step's learning rate, in [0, 1]. A gradient of 0, or not finite, changes nothing."""
        now = torch.cat([gradient.detach().flatten()[:: self._stride].float() for gradient in gradients])
        there = now.isfinite().all() & now.any()
        now = torch.where(there, now, self._last)
        cosine = (now @ self._last).double() / (now.norm() * self._last.norm()).double()  # NaN beside a gradient of 0
        counted = there & cosine.isfinite()
        self._cosines.append(torch.where(counted, cosine, torch.nan))
        fade = self.config.memory
        faded = self._sums * self._sums.new_tensor((fade, fade**2, fade, fade))
        added = torch.stack((torch.ones_like(cosine), torch.ones_like(cosine), cosine, cosine.square()))
        self._sums.copy_(torch.where(counted, faded + added, self._sums))
        self._last.copy_(now)
        if not self.config.full_cosine:
            return 1.0
        return min(1.0, max(0.0, self._certain(*self._sums.tolist()) / self.config.full_cosine))

    def _certain(self, weights: float, squares: float, cosines: float, squared: float) -> float:
        """The mean less ``doubt`` standard errors of a weighted mean; 0 before there are three cosines."""
        pairs = weights * weights / squares if squares else 0.0  # as many equal ones would be as certain
        if pairs < _FEWEST:
            return 0.0
        mean = cosines / weights
        variance = max(0.0, squared / weights - mean * mean) / (pairs - 1)
        return mean - self.config.doubt * math.sqrt(variance)

    def read(self) -> float | None:
        """Mean cosine since the last reading; None when there was no pair of non-zero gradients."""
        cosines = [value for value in torch.stack(self._cosines).tolist() if value == value] if self._cosines else []
        self._cosines.clear()
        return sum(cosines) / len(cosines) if cosines else None
