"""Attention on e4m3 operands over pages of a cache, with two-level accumulation.

The cache is pages of T tokens, T a multiple of 128. A page holds keys as rows, ``[N, T, D]``, and values transposed,
``[N, D, T]``, which is how the tensor core wants the second operand of p v. A sample sees the pages its row of the
table names, of each the first ``lengths`` tokens; both are read on the device, so that a captured graph serves every
fill of the cache. One page is a whole video or a chunk, a ring of pages a window, a page that stays a sink. Keys may
have had one vector a head subtracted, the same for all keys of a sample: softmax does not see it.

    s_j = (q8 . k8_j) q_scale k_scale / sqrt(D)            a scale a query and head, and one a 128 keys and head
    out = v_scale sum_j p8_j v8_j / sum_j p_j              a scale a channel, fixed for the life of a cache
    p_j = 2^8 exp(s_j - m), p8_j its e4m3                  m the largest s so far, exact: then p <= 256 < 448

Page by page, first the tile of fewer than 64 keys, then the full ones of 64: m, and with it the rounding of p, depends
on that order. The product p8 v8 of a tile starts from zero and is added to the fp32 sum of the tiles before: Hopper's
fp8 products keep about 13 bits of a running sum, too few for one over all keys (docs/fp8.md).
"""

import math

import torch
from torch import Tensor

from reelforge.kernels import dispatch, fp8_attention_triton
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, check_operands, quantise, round_e4m3
from reelforge.kernels.fp8_attention_triton import HEAD_DIM, KEY_GROUP, TILE

_OFFSET = 8.0  # of p's exponent
_LOG2_E = math.log2(math.e)


def fp8_attention(
    q: Tensor, q_scale: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
    table: Tensor, lengths: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend every query of a sample to the keys that it sees.

    Args:
        q: e4m3 ``[B, L, N, D]``, D = 128.
        q_scale: fp32 ``[B, N, L]``.
        keys: e4m3 ``[P, N, T, D]``.
        key_scale: fp32 ``[P, N, T / 128]``.
        values: e4m3 ``[P, N, D, T]``.
        value_scale: fp32 ``[B, N, D]``.
        table: int32 ``[B, S]``, pages in the order of attention.
        lengths: int32 ``[B, S]``, visible tokens of each, from 0 to T; a sample that sees none gets zeros.

    Returns:
        bf16 ``[B, L, N, D]``, and the log of the sum of exp(s), fp32 ``[B, N, L]``.

    Raises:
        KernelError: shapes, dtypes or devices that do not match, or a pinned implementation that does not fit.
    """
    operands = (q, q_scale, keys, key_scale, values, value_scale, table, lengths)
    out, _, lse = _run(operands, False)
    return out, lse


def fp8_attention_quantised(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fp8_attention` for an fp8 GEMM: e4m3 ``[B, L, N, D]``, scales ``[B, L, N]`` and the log of the sums.

    A head of 128 channels is one group of 128 along the width. The scales are a view of fp32 ``[N, B, L]``, tokens
    contiguous, as cuBLASLt reads the scales of 1 x 128 groups.
    """
    return _run(operands, True)


def _run(operands: tuple[Tensor, ...], quantised: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check(*operands)
    q = operands[0]
    name = dispatch.choose("fp8_attention", dispatch.Query.of(q, head_dim=q.shape[-1]))
    function = reference if name == dispatch.REFERENCE else fp8_attention_triton.forward
    out, scale, lse = function(*operands, quantised=quantised)
    return out, scale.permute(1, 2, 0), lse


def reference(*operands: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The formula tile by tile with the rounding of p, in fp32; scales ``[N, B, L]``, empty if not ``quantised``."""
    wide, lse = emulate(*operands)
    if not quantised:
        return wide.to(torch.bfloat16), wide.new_empty(0, 0, 0), lse
    out, scale = quantise(wide)
    return out, scale[..., 0].permute(2, 0, 1).contiguous(), lse


def emulate(
    q: Tensor, q_scale: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
    table: Tensor, lengths: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output before its rounding, and the log of the sums, in the dtype of ``q_scale``."""
    wide = q_scale.dtype
    queries = q.transpose(1, 2).to(wide)
    factor = q_scale * (_LOG2_E / math.sqrt(q.shape[-1]))
    acc = torch.zeros_like(queries)
    total = torch.zeros_like(factor)
    highest = torch.full_like(factor, -math.inf)
    for page, length in zip(table.long().unbind(1), lengths.unbind(1), strict=True):
        for sample, start, visible in _tiles(length.tolist()):
            one, span = slice(sample, sample + 1), slice(start, start + visible)
            of_page = page[one]
            scores = queries[one] @ keys[of_page, :, span].to(wide).transpose(-1, -2)
            row = factor[one] * key_scale[of_page, :, start // KEY_GROUP, None]
            new = torch.maximum(highest[one], scores.amax(-1) * row)
            p = torch.exp2(scores * row[..., None] - new[..., None] + _OFFSET)
            keep = torch.exp2(highest[one] - new)
            product = round_e4m3(p).to(wide) @ values[of_page, :, :, span].to(wide).transpose(-1, -2)
            acc[one] = acc[one] * keep[..., None] + product
            total[one] = total[one] * keep + p.sum(-1)
            highest[one] = new
    out = torch.where(total[..., None] > 0, acc / total[..., None], 0) * value_scale[:, :, None]
    return out.transpose(1, 2), (highest + total.log2() - _OFFSET) / _LOG2_E


def _tiles(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(sample, first key, keys) of a page's tiles in their order."""
    tiles = []
    for sample, length in enumerate(lengths):
        full = length // TILE * TILE
        tiles += [(sample, full, length - full)] if length > full else []
        tiles += [(sample, start, TILE) for start in range(0, full, TILE)]
    return tiles


def _check(
    q: Tensor, q_scale: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
    table: Tensor, lengths: Tensor,
) -> None:  # fmt: skip
    if q.ndim != 4 or q.shape[-1] != HEAD_DIM or keys.ndim != 4 or keys.shape[2] % KEY_GROUP or table.ndim != 2:
        raise KernelError(
            f"fp8_attention got q {tuple(q.shape)}, keys {tuple(keys.shape)} and table {tuple(table.shape)}.",
            f"It takes q [B, L, N, {HEAD_DIM}], keys [P, N, T, {HEAD_DIM}] with {KEY_GROUP} dividing T, table [B, S].",
        )
    (batch, tokens, heads, head_dim), (pages, _, size, _) = q.shape, keys.shape
    seen = (batch, table.shape[1])
    check_operands(
        "fp8_attention", q.device,
        ("q", q, (batch, tokens, heads, head_dim), E4M3),
        ("q_scale", q_scale, (batch, heads, tokens), torch.float32),
        ("keys", keys, (pages, heads, size, head_dim), E4M3),
        ("key_scale", key_scale, (pages, heads, size // KEY_GROUP), torch.float32),
        ("values", values, (pages, heads, head_dim, size), E4M3),
        ("value_scale", value_scale, (batch, heads, head_dim), torch.float32),
        ("table", table, seen, torch.int32),
        ("lengths", lengths, seen, torch.int32),
    )  # fmt: skip


dispatch.register("fp8_attention", "triton", fp8_attention_triton.unfit, fp8_attention_triton)
