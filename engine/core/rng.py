"""Counter-based random numbers: noise is a function of what it is for, not of when it was drawn.

A draw is named by a purpose and integers (seed, iteration, prompt, member, step). The name hashes to a
64-bit key, and Philox turns (key, element index) into bits and normals (:mod:`reelforge.kernels.philox`), the same
ones on every device. So a sample's noise does not depend on batch split, rank, world size, device, or on what was
drawn before it, and a fused kernel can regenerate it from 8 bytes.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reelforge.kernels import philox


def key(purpose: str, *counters: int) -> int:
    """Hash a draw's name to a non-negative 63-bit key.

    Args:
        purpose: what the draw is for, e.g. ``"x_T"`` or ``"sde"``; keeps equal counters apart.
        counters: seed, iteration, prompt, member, step: whichever name the draw; each fits int64.
    """
    payload = purpose.encode() + b"\0" + struct.pack(f"<{len(counters)}q", *counters)
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


def normal(keys: Sequence[int] | Tensor, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one independent draw per key.

    Args:
        keys: one key per sample, from :func:`key`; or int64 ``[R]`` where the noise is wanted: upload keys once.
        shape: shape of one sample.
        device: of the noise, for keys given as integers.

    Returns:
        float32 ``[len(keys), *shape]``; row i depends on ``keys[i]`` and ``shape`` alone.
    """
    if not isinstance(keys, Tensor):
        keys = torch.tensor(list(keys), dtype=torch.int64, device=device)
    return philox.normal(keys, math.prod(shape)).reshape(len(keys), *shape)


def uniform(draw_key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` float32 values in [0, 1)."""
    return uniforms([draw_key], count, device)[0]


def uniforms(keys: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """:func:`uniform` of every key, ``[len(keys), count]``."""
    words = philox.words(torch.tensor(list(keys), dtype=torch.int64, device=device), count)
    return philox.uniform(torch.stack(words, dim=-1).flatten(1)[:, :count])


def gumbel(keys: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, float32 ``[len(keys), count]``: argmax(logits + it) draws from softmax(logits).

    The uniforms are read from below, -log(-log1p(-u)): there they are 2^-31 apart, so large values keep their tail.
    """
    u = uniforms(keys, count, device).clamp(2.0**-32, 1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def generator(purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator for host-side choices (shuffles, renderings) under the same naming."""
    return np.random.Generator(np.random.Philox(key=key(purpose, *counters)))


def in_epochs(purpose: str, seed: int, size: int, places: Sequence[int]) -> list[int]:
    """Which of ``size`` items stand at these places of an endless list: all in random order, then all in another."""
    epochs = {place // size for place in places}
    orders = {epoch: generator(purpose, seed, epoch).permutation(size) for epoch in epochs}
    return [int(orders[place // size][place % size]) for place in places]
