"""Ways to run attention in e4m3, and how far each is from fp64 on the same inputs: arithmetic of the GPU, on a CPU.

A Hopper tensor core adds the 32 products of an fp8 instruction and its running sum at the exponent of the largest of
them, and cuts off what lies below 13 bits. ``one level`` keeps all keys in that sum; ``two levels`` starts anew with
every tile and adds tiles in fp32. Sums of q k are short (128 channels) and taken as exact.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelforge.bench.markdown import table
from reelforge.kernels.fp8 import GROUP, dequantise, quantise, round_e4m3
from reelforge.kernels.fp8_attention_triton import HEAD_DIM, TILE
from reelforge.kernels.fp8_qkv_post import hadamard_matrix

_KEPT_BITS = 13
_PRODUCTS = 32  # of one instruction
_LOG2_E = math.log2(math.e)
SEED = 20


@dataclass(frozen=True)
class Inputs:
    """A head's inputs in fp64.

    Attributes:
        name: of the table's column.
        q: ``[L, D]``.
        k: ``[M, D]``; ``v`` likewise.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Scheme:
    """How operands are rounded and products added up.

    Attributes:
        name: of the table's row.
        q: elements that share a scale: ``"token"``, ``"tensor"``; ``"cast"`` has none, ``"bf16"`` is not fp8.
        k: likewise, and ``"block"`` of 128 keys.
        v: likewise, and ``"channel"``.
        smooth: subtract the keys' mean.
        hadamard: rotate q and k.
        levels: of accumulation.
        stale: log2 by which scores may exceed the maximum in use before it is renewed.
        offset: log2 by which p is raised.
    """

    name: str
    q: str = "token"
    k: str = "block"
    v: str = "channel"
    smooth: bool = False
    hadamard: bool = False
    levels: int = 2
    stale: float = 0.0
    offset: float = 8.0


_OURS = Scheme("ours: K mean subtracted, K scale per 128 keys", smooth=True)
_TENSOR = Scheme("one scale a tensor, two levels", q="tensor", k="tensor", v="tensor")
_HADAMARD = replace(_OURS, name="ours with Hadamard", hadamard=True)
SCHEMES = {
    "bf16": Scheme("bf16 operands", q="bf16", k="bf16", v="bf16"),
    "cast": Scheme("unscaled casts, two levels", q="cast", k="cast", v="cast"),
    "tensor_one_level": replace(_TENSOR, name="one scale a tensor, one level", levels=1),
    "tensor": _TENSOR,
    "block": Scheme("q token, K 128 keys, V channel"),
    "ours": _OURS,
    "key_token": replace(_OURS, name="ours with a K scale per token", k="token"),
    "hadamard": _HADAMARD,
    "one_level": replace(_OURS, name="ours with one level", levels=1),
    "stale": replace(_OURS, name="ours with a maximum 4 stale, offset 8", stale=4.0),
    "stale_offset_4": replace(_OURS, name="ours with a maximum 4 stale, offset 4", stale=4.0, offset=4.0),
}


def inputs(name: str, keys: int, spread: float = 1.0, outliers: bool = False, queries: int = 64) -> Inputs:
    """Normal q and k whose logits have standard deviation ``spread``, and values that say something of their keys.

    A value is a vector that all share, a turn of its key, and noise, of one size each: an average of noise alone would
    be all rounding error, and no sum would grow.

    Args:
        name: of the column.
        keys: M.
        spread: 1 is a wide softmax, 3 a sharp one.
        outliers: every key gets one normal vector more, ten times as large in four channels.
        queries: L.
    """
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(n, HEAD_DIM, generator=generator).double() for n in (queries, keys, keys))
    turn, mean = (torch.randn(n, HEAD_DIM, generator=generator).double() for n in (HEAD_DIM, 1))
    v = mean + k @ turn / math.sqrt(HEAD_DIM) + v
    if outliers:
        shared = torch.randn(HEAD_DIM, generator=generator).double()
        shared[:4] *= 10
        k = k + shared
    return Inputs(name, q * spread, k, v)


def columns() -> Iterator[Inputs]:
    yield inputs("4,680 keys, wide", 4680)
    yield inputs("32,760, wide", 32760)
    yield inputs("32,760, wide, outliers", 32760, outliers=True)
    yield inputs("32,760, sharp, outliers", 32760, 3.0, outliers=True)


def exact(given: Inputs) -> Tensor:
    return torch.softmax(given.q @ given.k.T / math.sqrt(HEAD_DIM), -1) @ given.v


def error(scheme: Scheme, given: Inputs) -> float:
    """Relative L2 distance of the scheme's output from fp64's."""
    right = exact(given)
    return float((attend(scheme, given).double() - right).norm() / right.norm())


def floor(scheme: Scheme, given: Inputs) -> float:
    """The same for exact attention on the scheme's rounded operands: what no kernel can mend."""
    q, k, v = (operand.double() for operand in _operands(scheme, given))
    right = exact(given)
    return float((exact(Inputs("", q, k, v)) - right).norm() / right.norm())


def attend(scheme: Scheme, given: Inputs) -> Tensor:
    """The scheme's output, fp32 ``[L, D]``."""
    q, k, v = _operands(scheme, given)
    v, value_scale = quantise(v.T, v.shape[0]) if scheme.v == "channel" else (v.T, v.new_ones(HEAD_DIM, 1))
    v = v.float().T
    highest = q.new_full((len(q),), -math.inf)
    used, total, acc = highest.clone(), q.new_zeros(len(q)), q.new_zeros(len(q), HEAD_DIM)
    for keys, values in zip(k.split(TILE), v.split(TILE), strict=True):
        scores = q @ keys.T * (_LOG2_E / math.sqrt(HEAD_DIM))
        highest = torch.maximum(highest, scores.amax(1))
        new = torch.where(highest > used + scheme.stale, highest, used)
        keep = torch.exp2(used - new)
        used = new
        p = torch.exp2(scores - used[:, None] + scheme.offset)
        total = total * keep + p.sum(1)
        if scheme.v == "bf16":
            acc = acc * keep[:, None] + p.bfloat16().float() @ values
        elif scheme.levels == 1:
            acc = _tensor_core(acc * keep[:, None], round_e4m3(p).float(), values)
        else:
            acc = acc * keep[:, None] + _tensor_core(torch.zeros_like(acc), round_e4m3(p).float(), values)
    return acc / total[:, None] * value_scale.T


def _operands(scheme: Scheme, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded, in fp32 with their scales multiplied in."""
    q, k, v = (operand.float() for operand in (given.q, given.k, given.v))
    if scheme.smooth:
        k = k - k.mean(0)
    if scheme.hadamard:
        q, k = (operand @ hadamard_matrix(operand) for operand in (q, k))
    return _rounded(scheme.q, q), _rounded(scheme.k, k), _rounded(scheme.v, v)


def _rounded(shared: str, x: Tensor) -> Tensor:
    if shared == "bf16":
        return x.bfloat16().float()
    if shared == "cast":
        return round_e4m3(x).float()
    if shared == "channel":
        return _rounded("token", x.T).T
    if shared == "block":
        return torch.cat([_rounded("tensor", keys) for keys in x.split(GROUP)])
    flat = x.reshape(1, -1) if shared == "tensor" else x
    return dequantise(*quantise(flat)).view_as(x)


def _tensor_core(acc: Tensor, p: Tensor, values: Tensor) -> Tensor:
    """acc + p values as a running sum of 13 bits."""
    for few, rows in zip(p.split(_PRODUCTS, 1), values.split(_PRODUCTS), strict=True):
        products = few[:, :, None] * rows[None]
        largest = torch.maximum(products.abs().amax(1), acc.abs())
        last = torch.exp2(torch.frexp(largest)[1].float() - 1 - _KEPT_BITS)  # frexp's mantissa is below 1
        acc = ((products / last[:, None]).trunc().sum(1) + (acc / last).trunc()) * last
    return acc


def rows() -> list[list[str]]:
    given = list(columns())
    found = [[scheme.name, *(f"{error(scheme, each):.4f}" for each in given)] for scheme in SCHEMES.values()]
    return [*found, ["exact attention on our operands", *(f"{floor(_OURS, each):.4f}" for each in given)]]


def main(arguments: argparse.Namespace) -> int:
    head = ["relative L2 error against fp64", *(each.name for each in columns())]
    sys.stdout.write(table(head, rows()) + "\n")
    return 0
