"""FlashAttention 2 (Dao 2023), for Ampere and later: imported by ``kernels.attention`` when it may run.

It reads any strides whose last is 1, so views of a cache are not copied.
"""

import flash_attn  # type: ignore[import-not-found]
import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on ``[B, L, N, D]``, with gradients."""
    return flash_attn.flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
