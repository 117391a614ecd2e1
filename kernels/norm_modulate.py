"""LayerNorm followed by a per-frame gain and shift: h = LN(x) * gain + shift.

LN has no parameters of its own: AdaLN passes ``gain = 1 + scale`` (Peebles & Xie 2023, DiT), an affine LayerNorm
passes its weight and bias. Gain and shift are ``[B or 1, M, E]``: M = 1 for one timestep a sample, M = T for one a
latent frame, and then token l belongs to row ``l // (L / M)``. Arithmetic is fp32 (fp64 for fp64 inputs) and the
result is rounded once, to ``x.dtype``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``LN(x) * gain + shift``.

    Args:
        x: ``[B, L, E]``.
        gain: ``[B or 1, M, E]`` with L divisible by M.
        shift: like ``gain``.
        eps: added to the variance.

    Returns:
        ``[B, L, E]`` in ``x.dtype``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return per_frame(normed, gain.to(wide), shift.to(wide)).to(x.dtype)


def per_frame(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """``x * gain + offset``, rows of gain (and of the offset, unless it has a row a token) spread over the tokens."""
    rows = gain.shape[1]
    spread = offset.unflatten(1, (rows, -1)) if offset.shape[1] == x.shape[1] else offset[:, :, None]
    return torch.addcmul(spread, x.unflatten(1, (rows, -1)), gain[:, :, None]).flatten(1, 2)
