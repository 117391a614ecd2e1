"""What every reward is: a score per clip and axis, or missing. Missing is never a number.

A failed scorer that answers 0 or -1 injects a false gradient; here it answers NaN with ``valid`` false, and
whoever forgets the mask sees NaN instead of a plausible value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """One axis over a batch.

    Attributes:
        values: float32 ``[B]``, higher is better; NaN exactly where missing.
    """

    values: Tensor

    def __post_init__(self) -> None:
        assert self.values.ndim == 1 and self.values.dtype == torch.float32
        assert not self.values.isinf().any()

    @classmethod
    def of(cls, values: Tensor, valid: Tensor | None = None) -> "Scores":
        """From any float ``[B]``; what is not finite, or not ``valid`` (bool ``[B]``), is missing."""
        values = values.detach().to(torch.float32)
        present = values.isfinite() if valid is None else values.isfinite() & valid
        return cls(values.masked_fill(~present, torch.nan))

    @classmethod
    def missing(cls, count: int) -> "Scores":
        """A scorer that failed for the whole batch."""
        return cls(torch.full((count,), torch.nan))

    @property
    def valid(self) -> Tensor:
        """bool ``[B]``."""
        return ~self.values.isnan()

    def mean(self) -> float:
        """Over what is there; NaN when nothing is."""
        return self.values[self.valid].mean().item()


class Scorer(Protocol):
    """Scores finished clips; one scorer may serve several axes from one pass over the pixels.

    Scoring a clip alone or inside a batch agrees to rounding: a reward must not depend on its neighbours.
    """

    axes: tuple[str, ...]

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """Score uint8 ``[B, F, H, W, 3]`` against B prompts.

        Returns:
            one :class:`Scores` of length B per name in ``axes``.
        """
        ...
