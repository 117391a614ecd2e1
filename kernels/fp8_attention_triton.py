"""The Triton kernel of ``fp8_attention``: 128 queries of a head a program, a tile of 64 keys a turn.

Scores of e4m3 keys are at most 128 * 448^2 and exact to fp32's last bits; they are scaled inside the exponent, so a
tile costs one multiplication a query for its keys' scale. p v starts from zero and meets the sum before it in the
multiply-add that rescales that sum: promotion costs no instruction, only registers, which 128 keys a turn would spill.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.fp8 import E4M3, GROUP, e4m3_scale, to_e4m3

HEAD_DIM, TILE, KEY_GROUP = 128, 64, GROUP
_D, _TILE, _QUERIES = tl.constexpr(HEAD_DIM), tl.constexpr(TILE), tl.constexpr(128)
_GROUP, _TILES = tl.constexpr(KEY_GROUP), tl.constexpr(KEY_GROUP // TILE)
_OFFSET = tl.constexpr(8.0)
_LN_2 = tl.constexpr(math.log(2.0))
_WARPS, _STAGES = 8, 3
_needs_triton = dispatch.needs_triton(E4M3)


def unfit(query: dispatch.Query) -> str | None:
    """Why this kernel cannot serve a query."""
    if query.head_dim != HEAD_DIM:
        return f"head_dim {query.head_dim} is not {HEAD_DIM}"
    if (found := dispatch.hardware_class()) and float(found) < 8.9:
        return f"compute capability {found} is below 8.9, the first with e4m3"
    return "it has no backward pass" if query.grad else _needs_triton(query)


@triton.jit
def _accumulate(scores, values, acc, highest, total, row):
    """One tile of keys further: the output's numerator, the running maximum, the denominator."""
    before = highest
    highest = tl.maximum(before, tl.max(scores, axis=1) * row)
    keep = tl.exp2(before - highest)
    p = tl.exp2(tl.fma(scores, row[:, None], _OFFSET - highest[:, None]))
    acc = acc * keep[:, None] + tl.dot(p.to(values.dtype), values)
    return acc, highest, total * keep + tl.sum(p, axis=1)


@triton.jit
def _forward_kernel(
    q_ptr, q_scale_ptr, keys_ptr, key_scale_ptr, values_ptr, value_scale_ptr, table_ptr, lengths_ptr,
    out_ptr, out_scale_ptr, lse_ptr, scale, queries, size, seen,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a head, whose keys and values they then find in L2.
    start, head, batch = tl.program_id(0) * _QUERIES, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads, batches = tl.num_programs(1), tl.num_programs(2)
    query, key, channel = tl.arange(0, _QUERIES), tl.arange(0, _TILE), tl.arange(0, _D)
    asked = start + query < queries
    q_at = ((batch * queries + start) * heads + head) * _D + query[:, None] * (heads * _D) + channel[None, :]
    q = tl.load(q_ptr + q_at, asked[:, None], 0.0)
    row_at = (batch * heads + head) * queries + start + query
    factor = tl.load(q_scale_ptr + row_at, asked, 1.0) * scale
    key_at, value_at = key[:, None] * _D + channel[None, :], channel[:, None] * size + key[None, :]
    acc = tl.zeros((_QUERIES, _D), tl.float32)
    highest = tl.full((_QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((_QUERIES,), tl.float32)
    for place in range(seen):
        page = tl.load(table_ptr + batch * seen + place).to(tl.int64) * heads + head
        length = tl.load(lengths_ptr + batch * seen + place)
        k_ptr, v_ptr = keys_ptr + page * size * _D, values_ptr + page * size * _D
        s_ptr = key_scale_ptr + page * (size // _GROUP)
        full = length // _TILE
        if length > full * _TILE:
            first = full * _TILE
            present = first + key < length
            scores = tl.dot(q, tl.trans(tl.load(k_ptr + first * _D + key_at)))
            scores = tl.where(present[None, :], scores, -float("inf"))
            values = tl.load(v_ptr + first + value_at)  # whole: a mask along the keys would load byte by byte
            values = tl.where(present[None, :], values, tl.zeros_like(values))
            row = factor * tl.load(s_ptr + full // _TILES)
            acc, highest, total = _accumulate(scores, tl.trans(values), acc, highest, total, row)
        for tile in tl.range(0, full):
            scores = tl.dot(q, tl.trans(tl.load(k_ptr + tile * (_TILE * _D) + key_at)))
            values = tl.load(v_ptr + tile * _TILE + value_at)
            row = factor * tl.load(s_ptr + tile // _TILES)
            acc, highest, total = _accumulate(scores, tl.trans(values), acc, highest, total, row)
    value_scale = tl.load(value_scale_ptr + (batch * heads + head) * _D + channel)
    total = tl.where(total > 0, total, 1.0)  # of a sample that sees nothing: its sum is 0, its log -inf by the maximum
    out = acc * (1.0 / total)[:, None] * value_scale[None, :]
    if QUANTISED:
        out_scale = e4m3_scale(tl.max(tl.abs(out), axis=1))
        out = to_e4m3(out / out_scale[:, None])
        scale_at = (head * batches + batch) * queries + start + query
        tl.store(out_scale_ptr + scale_at, out_scale, asked)
    tl.store(out_ptr + q_at, out.to(out_ptr.dtype.element_ty), asked[:, None])
    tl.store(lse_ptr + row_at, (highest + tl.log2(total) - _OFFSET) * _LN_2, asked)


@kernel_op("fp8_attention", fake=lambda q, q_scale, *others: _results(q, q_scale, others[-1]))
def forward(
    q: Tensor, q_scale: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
    table: Tensor, lengths: Tensor, quantised: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output ``[B, L, N, D]``, its scales ``[N, B, L]`` (empty if not ``quantised``), log of the sums ``[B, N, L]``."""
    out, out_scale, lse = _results(q, q_scale, quantised)
    batch, queries, heads, _ = q.shape
    _forward_kernel[(triton.cdiv(queries, _QUERIES.value), heads, batch)](
        q, q_scale, keys, key_scale, values, value_scale, table, lengths, out, out_scale, lse,
        math.log2(math.e) / math.sqrt(HEAD_DIM), queries, keys.shape[2], table.shape[1],
        QUANTISED=quantised, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out, out_scale, lse


def _results(q: Tensor, q_scale: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    scales = (heads, batch, queries) if quantised else (0, 0, 0)
    out = torch.empty_like(q, dtype=E4M3 if quantised else torch.bfloat16)
    return out, q_scale.new_empty(scales), torch.empty_like(q_scale)
