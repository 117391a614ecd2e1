"""A linear in e4m3 that stands for another model's."""

import torch
from torch import Tensor, nn

from reelforge.engine.model.lora import LoraLinear
from reelforge.kernels.fp8 import quantise
from reelforge.kernels.fp8_groups import fp8_groups
from reelforge.kernels.fp8_linear import fp8_linear, quantise_weight

Rounded = tuple[Tensor, Tensor]  # e4m3 [..., K] and its scales, as the op in front left them


class Fp8Linear(nn.Module):
    """Rounds the weight once and its input at every call, unless the op in front has done so.

    Args:
        source: whose weight, adapter and bias it takes.
        grouped: share scales by 128 channels, not by rows.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear, grouped: bool) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple: it is another model's module
        self.grouped = grouped
        self.requantise()

    @torch.no_grad()
    def requantise(self) -> None:
        """From the source as it is now, its adapter merged."""
        (source,) = self._source
        linear = source.merged() if isinstance(source, LoraLinear) and source.active else source
        weight, scale = quantise_weight(linear.weight, self.grouped)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    @torch.no_grad()
    def forward(self, x: Tensor | Rounded) -> Tensor:
        """``[..., K]`` to ``[..., N]`` in the source's dtype, or autocast's, as any linear."""
        rounded, scale = self._round(x) if isinstance(x, Tensor) else x
        y = fp8_linear(rounded.flatten(0, -2), scale.flatten(0, -2), self.weight, self.scale, self.bias)
        device = rounded.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        return y.to(dtype).unflatten(0, rounded.shape[:-1])

    def _round(self, x: Tensor) -> Rounded:
        if not self.grouped:
            return quantise(x)
        values, scale = fp8_groups(x.flatten(0, -2).contiguous())
        return values.view(x.shape), scale
