"""Root-mean-square norm of queries and keys over the full width, then 3-D rotary positions per head.

    n = x / sqrt(mean_E(x^2) + eps) * weight                 over all heads together, before the split
    out[2i]   = n[2i] cos_i - n[2i+1] sin_i                  pairs are interleaved, as in RoFormer (Su et al. 2021)
    out[2i+1] = n[2i] sin_i + n[2i+1] cos_i

Arithmetic is fp32 (fp64 for fp64 inputs), rounded once to the input's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in ``x.dtype`` (fp32 inside); cross-attention uses it without positions."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _rms_norm_wide(x.to(wide), weight.to(wide), eps).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    num_heads: int,
    eps: float,
    *,
    round_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate q and k.

    Args:
        q: ``[B, L, E]``; ``k`` likewise.
        q_weight: ``[E]``; ``k_weight`` likewise.
        rotation: (cos, sin), each ``[L, D / 2]`` with D = E / num_heads.
        num_heads: N.
        eps: added to the mean square.
        round_norm: round to the input's dtype between norm and rotation (diffusers' rounding point).

    Returns:
        q and k as ``[B, L, N, D]``.
    """
    return (
        _norm_rope(q, q_weight, rotation, num_heads, eps, round_norm),
        _norm_rope(k, k_weight, rotation, num_heads, eps, round_norm),
    )


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs of ``[B, L, N, D]`` by (cos, sin) ``[L, D / 2]``."""
    cos, sin = (table[None, :, None].to(x.dtype) for table in rotation)
    # A pair times (cos + i sin), as one complex product.
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _rms_norm_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _norm_rope(
    x: Tensor, weight: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int, eps: float, round_norm: bool
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = _rms_norm_wide(x.to(wide), weight.to(wide), eps)
    if round_norm:
        normed = normed.to(x.dtype).to(wide)
    return rotate(normed.unflatten(-1, (num_heads, -1)), rotation).to(x.dtype)
