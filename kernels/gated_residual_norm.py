"""A gated residual add and the norm behind it: x' = x + gate * y, h = LN(x') * gain + shift.

The end of one branch and the start of the next, in one pass over the tokens. Rows of gate, gain and shift, and the
rounding, are those of ``norm_modulate``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.kernels.norm_modulate import per_frame


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float, *, round_residual: bool = False
) -> tuple[Tensor, Tensor]:
    """``x + gate * y`` and its modulated norm.

    Args:
        x: residual stream ``[B, L, E]``.
        y: the branch's output ``[B, L, E]``.
        gate: ``[B or 1, M, E]``; None adds ``y`` as it is.
        gain: ``[B or 1, M', E]`` of the next norm.
        shift: like ``gain``.
        eps: added to the variance.
        round_residual: normalise the rounded x' (diffusers' rounding point) instead of the exact one.

    Returns:
        x' and h, both ``[B, L, E]`` in ``x.dtype``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide) + y.to(wide) if gate is None else per_frame(y.to(wide), gate.to(wide), x.to(wide))
    rounded = exact.to(x.dtype)
    normed = F.layer_norm(rounded.to(wide) if round_residual else exact, x.shape[-1:], eps=eps)
    return rounded, per_frame(normed, gain.to(wide), shift.to(wide)).to(x.dtype)
