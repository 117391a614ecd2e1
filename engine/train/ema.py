"""Exponential moving average of the trained weights, in fp32 and without host synchronisation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from reelforge.kernels.ema_lerp import ema_lerp


class Ema:
    """shadow <- d shadow + (1 - d) weight, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up is that of TensorFlow's ``ExponentialMovingAverage``: early averages forget the start quickly.

    Args:
        parameters: fp32 weights by name; the average starts as their copy.
        decay: in [0, 1); at 0 there is no average and no copy: the weights themselves are what it would be.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._live = dict(parameters) if decay else {}
        self.shadow = {name: p.detach().clone() for name, p in self._live.items()}
        self.decay = decay
        assert all(t.dtype == torch.float32 for t in self.shadow.values()), "the average is kept in fp32"
        device = next(iter(parameters.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Average the current weights in.

        Args:
            good: bool scalar on the weights' device; where false, average and count stay as they are, bit for bit.
        """
        decay = ((1 + self.updates) / (10 + self.updates)).clamp_max(self.decay)
        weight = ((1 - decay) * good).float()
        self.updates += good
        ema_lerp(list(self.shadow.values()), list(self._live.values()), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; storage is swapped, not copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._live.items():
            parameter.data, self.shadow[name].data = self.shadow[name].data, parameter.data
