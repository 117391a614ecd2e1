"""FlashAttention 3 (Shah et al. 2024), for Hopper: imported by ``kernels.attention`` when it may run.

It reads any strides whose last is 1, so views of a cache are not copied.
"""

import flash_attn_interface  # type: ignore[import-not-found]
import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on ``[B, L, N, D]``, with gradients."""
    out = flash_attn_interface.flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    # Until 2025 it returned (out, log-sum-exp).
    return out[0] if isinstance(out, tuple) else out
