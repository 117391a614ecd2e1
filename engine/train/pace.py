"""A learning rate that follows how much of the gradient is signal.

A gradient is signal plus noise of its batch, g = s + n. Successive steps share s and not n, so the cosine of their
gradients estimates |s|^2 / (|s|^2 + |n|^2): by which factor the best step along a noisy gradient is shorter than along
a clean one. Adam divides that length away: where nothing is left but noise it walks on at full stride, and a policy
gradient is mostly noise. So the rate is scaled by the cosine, averaged over steps; where there is no signal at all
(shuffled rewards) the weights stay where they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class PaceConfig:
    """How the rate follows the cosine of successive gradients.

    Attributes:
        full_cosine: from which on the full rate is taken, below in proportion; 0 always takes the full rate.
        memory: share of the past in the running mean, per step.
    """

    full_cosine: float = 0.0
    memory: float = 0.8

    def __post_init__(self) -> None:
        for name in ("full_cosine", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"pace.{name} is {getattr(self, name)}.", "It must be in [0, 1).")


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
        self._means = torch.zeros(2, dtype=torch.float64, device=device)  # of g g' and of |g| |g'|
        self._cosines: list[Tensor] = []

    @property
    def carried(self) -> dict[str, Tensor]:
        """What a run's checkpoint must hold."""
        return {"pace_last": self._last, "pace_means": self._means}

    def __call__(self, gradients: Sequence[Tensor]) -> float:
        """By what to multiply the step's learning rate, in [0, 1]. A gradient of 0, or not finite, changes nothing."""
        now = torch.cat([gradient.detach().flatten()[:: self._stride].float() for gradient in gradients])
        there = now.isfinite().all() & now.any()
        now = torch.where(there, now, self._last)
        pair = torch.stack((now @ self._last, now.norm() * self._last.norm())).double() * there
        self._cosines.append(pair[0] / pair[1])
        self._means.lerp_(pair, (1 - self.config.memory) * (pair[1] > 0).double())
        self._last.copy_(now)
        if not self.config.full_cosine:
            return 1.0
        dot, norms = self._means.tolist()
        return min(1.0, max(0.0, dot / norms / self.config.full_cosine)) if norms > 0 else 0.0

    def read(self) -> float | None:
        """Mean cosine since the last reading; None when there was no pair of non-zero gradients."""
        cosines = [value for value in torch.stack(self._cosines).tolist() if value == value] if self._cosines else []
        self._cosines.clear()
        return sum(cosines) / len(cosines) if cosines else None
