"""Operands of ``fp8_attention``: pages filled from plain q, k, v, and those q, k, v as their e4m3 has them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import parity
import torch
from torch import Tensor

from reelforge.kernels.fp8 import GROUP, dequantise, quantise, round_e4m3, scale_of

DIM = 128
E4M3_NAN = 0x7F


@dataclass(frozen=True)
class Operands:
    """What the op takes, in its order; ``lengths`` ``[B, S]`` as lists too."""

    q: Tensor
    q_scale: Tensor
    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor
    table: Tensor
    lengths: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def wide(self) -> tuple[Tensor, ...]:
        """The same with scales in fp64, in which the reference then computes."""
        scales = {name: getattr(self, name).double() for name in ("q_scale", "key_scale", "value_scale")}
        return replace(self, **scales).all()

    def but(self, **changes: Tensor) -> "Operands":
        return replace(self, **changes)


def plain(batch: int, queries: int, heads: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q ``[B, N, L, D]``, k and v ``[B, N, M, D]``, in which values follow their keys and share a vector."""
    q, k, v = (parity.randn(seed + i, batch, heads, n, DIM) for i, n in enumerate((queries, keys, keys)))
    turn, mean = parity.randn(seed + 3, DIM, DIM) / math.sqrt(DIM), parity.randn(seed + 4, heads, 1, DIM)
    return q, k, mean + k @ turn + v


def paged(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[Sequence[int]], size: int) -> Operands:
    """q, k, v cut into pages of ``size`` tokens by each sample's lengths; beyond them every byte is NaN."""
    batch, heads, queries, _ = q.shape
    seen = len(lengths[0])
    q8, q_scale = quantise(q)
    keys = torch.full((batch * seen, heads, size, DIM), E4M3_NAN, dtype=torch.uint8, device=q.device)
    values = torch.full((batch * seen, heads, DIM, size), E4M3_NAN, dtype=torch.uint8, device=q.device)
    key_scale = torch.full((batch * seen, heads, size // GROUP), torch.nan, device=q.device)
    value_scale = scale_of(v.abs().amax(2))
    # Neighbours in the table lie apart in memory.
    table = torch.arange(batch * seen, dtype=torch.int32, device=q.device).reshape(seen, batch).T.flip(1).contiguous()
    for sample, of_sample in enumerate(lengths):
        first = 0
        for place, length in enumerate(of_sample):
            page, span = table[sample, place], slice(first, first + length)
            for start in range(0, length, GROUP):
                some = slice(start, min(start + GROUP, length))
                block = k[sample, :, span][:, some]
                rounded, scale = quantise(block.flatten(1))
                keys[page, :, some] = rounded.view(torch.uint8).view(block.shape)
                key_scale[page, :, start // GROUP] = scale[:, 0]
            of_page = round_e4m3(v[sample, :, span] / value_scale[sample, :, None])
            values[page, :, :, :length] = of_page.view(torch.uint8).transpose(1, 2)
            first += length
    return Operands(
        q8.transpose(1, 2).contiguous(), q_scale[..., 0], keys.view(q8.dtype), key_scale, values.view(q8.dtype),
        value_scale, table, torch.tensor(lengths, dtype=torch.int32, device=q.device),
    )  # fmt: skip


def make(
    lengths: Sequence[Sequence[int]], queries: int = 5, heads: int = 1, size: int = 256, seed: int = 0
) -> Operands:
    return paged(*plain(len(lengths), queries, heads, max(1, *map(sum, lengths)), seed), lengths, size)


def exact(operands: Operands) -> Tensor:
    """Softmax attention in fp64 on the operands as rounded, ``[B, L, N, D]``."""
    out = []
    q = dequantise(operands.q.transpose(1, 2), operands.q_scale[..., None].double())
    for sample, (pages, lengths) in enumerate(zip(operands.table.tolist(), operands.lengths.tolist(), strict=True)):
        keys, values = [], []
        for page, length in zip(pages, lengths, strict=True):
            scale = operands.key_scale[page].double().repeat_interleave(GROUP, 1)[:, :length, None]
            keys.append(operands.keys[page, :, :length].double() * scale)
            values.append(operands.values[page, :, :, :length].double().transpose(1, 2))
        scores = q[sample] @ torch.cat(keys, 1).transpose(1, 2) / math.sqrt(DIM)
        attended = torch.softmax(scores, -1) @ torch.cat(values, 1)
        out.append(attended * operands.value_scale[sample, :, None].double())
    return torch.stack(out).transpose(1, 2)


def rel_l2(actual: Tensor, right: Tensor) -> float:
    return float((actual.double() - right.double()).norm() / right.double().norm())
