"""Counter-based random numbers: noise is a function of what it is for, not of when it was drawn.

A draw is named by a purpose and integers (seed, iteration, prompt, member, step). The name hashes to a
64-bit key, and Philox4x32-10 (Salmon et al. 2011) turns (key, element index) into bits. So a sample's noise
does not depend on batch split, rank, world size, device, or on what was drawn before it, and a fused kernel
can regenerate it from 8 bytes. Bits and the Box-Muller pairing are those of ``triton.language.randn4x``.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_UNIT = 4.6566127342e-10  # 31 random bits to [0, 1), as Triton's uint_to_uniform_float


def key(purpose: str, *counters: int) -> int:
    """Hash a draw's name to a non-negative 63-bit key.

    Args:
        purpose: what the draw is for, e.g. ``"x_T"`` or ``"sde"``; keeps equal counters apart.
        counters: seed, iteration, prompt, member, step: whichever name the draw; each fits int64.
    """
    payload = purpose.encode() + b"\0" + struct.pack(f"<{len(counters)}q", *counters)
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


def philox(counter: Sequence[Tensor], key_lo: Tensor, key_hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with 10 rounds on int64 tensors that hold unsigned 32-bit values."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # A 32x32 product wraps in int64 but keeps its 64 bits; the arithmetic shift is masked clean.
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = ((product_b >> 32) & _MASK32) ^ c1 ^ key_lo
        c2 = ((product_a >> 32) & _MASK32) ^ c3 ^ key_hi
        c1, c3 = product_b & _MASK32, product_a & _MASK32
        key_lo = (key_lo + _WEYL_A) & _MASK32
        key_hi = (key_hi + _WEYL_B) & _MASK32
    return c0, c1, c2, c3


def _uniform(bits: Tensor) -> Tensor:
    """Unsigned 32-bit values to float32 in [0, 1)."""
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIT


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1e-7)))
    angle = 6.283185307179586 * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _bits(keys: Sequence[int], count: int, device: torch.device | str) -> Tensor:
    """``[len(keys), >= count]`` unsigned 32-bit values (int64); element i is word i % 4 of counter i // 4."""
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)[None]
    key_64 = torch.tensor(list(keys), dtype=torch.int64, device=device)[:, None]
    zero = torch.zeros_like(counters)
    words = philox((counters, zero, zero, zero), key_64 & _MASK32, (key_64 >> 32) & _MASK32)
    return torch.stack(words, dim=-1).flatten(1)


def normal(keys: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one independent draw per key.

    Args:
        keys: one key per sample, from :func:`key`.
        shape: shape of one sample.

    Returns:
        float32 ``[len(keys), *shape]``; row i depends on ``keys[i]`` and ``shape`` alone.
    """
    count = int(np.prod(shape))
    u = _uniform(_bits(keys, count, device)).view(len(keys), -1, 4)
    n0, n1 = _box_muller(u[..., 0], u[..., 1])
    n2, n3 = _box_muller(u[..., 2], u[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).flatten(1)[:, :count].reshape(len(keys), *shape)


def uniform(draw_key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` float32 values in [0, 1)."""
    return _uniform(_bits([draw_key], count, device))[0, :count]


def generator(purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator for host-side choices (shuffles, renderings) under the same naming."""
    return np.random.Generator(np.random.Philox(key=key(purpose, *counters)))
