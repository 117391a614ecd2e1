"""Attention's forward pass in Triton: online softmax over tiles of keys with an exact running maximum.

With c = log2(e) / sqrt(D), each tile of keys gives scores s = q k^T and updates (Dao et al. 2022, FlashAttention)

    m' = max(m, c max s);  p = 2^(c s - m');  l' = 2^(m - m') l + sum p;  a' = 2^(m - m') a + p v

from m = -inf, l = a = 0. At the end out = a / l and lse = ln(2) (m + log2 l), the log of the sum of exp(s / sqrt(D)).
Scores, exponentials and sums are fp32; p is rounded to v's dtype for its product and out once, to q's. fp32 operands
are multiplied in fp32, not tf32. The maximum is kept as rounded: its rounding then divides out of a / l. Finite while
|s| / sqrt(D) stays below 1e8.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
_needs_triton = dispatch.needs_triton(*DTYPES)


def unfit(query: dispatch.Query) -> str | None:
    """Why this kernel cannot serve a query."""
    if query.head_dim > MAX_HEAD_DIM:
        return f"head_dim {query.head_dim} is above {MAX_HEAD_DIM}"
    return "it has no backward pass" if query.grad else _needs_triton(query)


@dataclass(frozen=True)
class Tile:
    """Launch of a program: queries and keys of a tile, warps, tiles of keys in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """A tile that compiles for sm_90a without spills, on Triton 3.6 and 3.9, where D is a multiple of 16.

    Other D are correct but loaded element by element. bf16 at D = 128 takes 177 to 186 registers and 160 KiB; 128 keys
    in two stages would save a fifth of the loop's instructions a key, at 255 registers: a candidate for measurement.
    """
    if dtype == torch.float32:
        return Tile(32, 16, 8, 2)
    return Tile(128, 32, 8, 2) if head_dim > 128 else Tile(128, 64, 8, 3)


@triton.jit
def _accumulate(scores, v, acc, maximum, total, scale):
    """One tile of keys further: the output's numerator, the running maximum, the denominator."""
    highest = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    keep = tl.exp2(maximum - highest)
    p = tl.exp2(tl.fma(scores, scale, -highest[:, None]))
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, highest, total * keep + tl.sum(p, axis=1)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a head, whose keys and values they then find in L2.
    start, head, batch = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query, key, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (column < HEAD_DIM)[None, :]
    asked = (start + query < queries)[:, None] & inside
    q_ptr += batch * q_batch + start * tl.cast(q_row, tl.int64) + head * q_head
    q = tl.load(q_ptr + query[:, None] * q_row + column[None, :], asked, 0.0)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    k_at, v_at = key[:, None] * k_row + column[None, :], key[:, None] * v_row + column[None, :]
    k_row, v_row = tl.cast(k_row, tl.int64), tl.cast(v_row, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # The keys short of a tile come first. After the loop they make ptxas serialise every wgmma (C7515), the loop's too:
    # 24 waits a turn instead of 3.
    if TAIL:
        tail = keys % BLOCK_N
        present = (key < tail)[:, None] & inside
        scores = tl.dot(q, tl.trans(tl.load(k_ptr + k_at, present, 0.0)), input_precision="ieee")
        scores = tl.where((key < tail)[None, :], scores, -float("inf"))
        v = tl.load(v_ptr + v_at, present, 0.0)
        acc, maximum, total = _accumulate(scores, v, acc, maximum, total, scale)
        k_ptr += tail * k_row
        v_ptr += tail * v_row
    for _ in tl.range(0, keys // BLOCK_N):
        scores = tl.dot(q, tl.trans(tl.load(k_ptr + k_at, inside, 0.0)), input_precision="ieee")
        v = tl.load(v_ptr + v_at, inside, 0.0)
        acc, maximum, total = _accumulate(scores, v, acc, maximum, total, scale)
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    heads = tl.num_programs(1)
    out_ptr += ((batch * queries + start) * heads + head) * HEAD_DIM
    out = acc * (1.0 / total)[:, None]
    tl.store(out_ptr + query[:, None] * (heads * HEAD_DIM) + column[None, :], out.to(out_ptr.dtype.element_ty), asked)
    lse_ptr += (batch * heads + head) * queries + start
    tl.store(lse_ptr + query, (maximum + tl.log2(total)) * 0.6931471805599453, start + query < queries)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@kernel_op("attention_forward", fake=lambda q, *_: _results(q))
def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's output ``[B, Lq, N, D]`` and log-sum-exp ``[B, N, Lq]`` in fp32, which merges of split keys need."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1:
            raise KernelError(f"attention: {name} has strides {tensor.stride()}.", "Its D must be contiguous.")
    batch, queries, heads, head_dim = q.shape
    block = tile(head_dim, q.dtype)
    out, lse = _results(q)
    _forward_kernel[(triton.cdiv(queries, block.queries), heads, batch)](
        q, k, v, out, lse, math.log2(math.e) / math.sqrt(head_dim), queries, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_D=max(triton.next_power_of_2(head_dim), 16), BLOCK_M=block.queries,
        BLOCK_N=block.keys, TAIL=k.shape[1] % block.keys > 0, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return out, lse
