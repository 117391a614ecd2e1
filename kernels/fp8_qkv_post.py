"""What stands between the q, k, v projections and ``fp8_attention``: norm, rotation, e4m3, and the page of the cache.

q and k get RMSNorm over the full width and 3D RoPE as in ``qk_norm_rope``. Then, a head of D = 128 channels at a time,

    q8 = q / q_scale                   a scale a token and head
    k8 = (k - mean) / k_scale          a scale a 128 tokens and head, counted from the page's first
    v8 = v / value_scale               a scale a channel, transposed on its way into the page

Mean and value scale are those of :func:`statistics` on a stream's first chunk and stay for the life of its cache:
softmax does not see a vector that every key of a stream lacks, and a page need not be rescaled when the next arrives.
With ``hadamard`` q and k - mean are multiplied by the orthonormal Hadamard matrix of 128, which leaves their products
as they are and spreads a channel that stands out over all; its operand is rounded to the inputs' dtype.
"""

import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, GROUP, check_operands, e4m3_scale, quantise, round_e4m3, scale_of, to_e4m3
from reelforge.kernels.qk_norm_rope import check_rotation, norm_rope_wide
from reelforge.kernels.rms_norm import DTYPES, check_weight
from reelforge.kernels.tiling import STAGES, load_row, plan, sum_row, token_strides, wide_row

# A later value may be this much larger than the first chunk's largest; it costs the smallest values one bit.
HEADROOM = 2.0
_D, _GROUP = tl.constexpr(128), tl.constexpr(GROUP)
_HADAMARD_SCALE = tl.constexpr(1 / math.sqrt(128))
_WARPS = 8


def statistics(
    k: Tensor, v: Tensor, k_weight: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Of a stream's first chunk ``[B, L, E]``: mean of its rotated keys, and value scales, both fp32 ``[B, N, D]``."""
    mean = norm_rope_wide(k, k_weight, rotation, num_heads, eps, False).mean(1)
    return mean, scale_of(v.unflatten(-1, (num_heads, -1)).abs().amax(1)) * HEADROOM


def fp8_qkv_post(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: tuple[Tensor, Tensor],
    num_heads: int, eps: float, key_mean: Tensor, value_scale: Tensor,
    keys: Tensor, key_scale: Tensor, values: Tensor, pages: Tensor, *, hadamard: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write a chunk's keys and values into a page of each sample and return its queries.

    Args:
        q: ``[B, L, E]``; ``k`` and ``v`` likewise. Tokens may lie apart.
        q_weight: ``[E]``; ``k_weight`` likewise.
        rotation: (cos, sin), each ``[L, D / 2]``.
        num_heads: N, with D = E / N = 128.
        eps: added to the mean square.
        key_mean: fp32 ``[B, N, D]``; ``value_scale`` likewise.
        keys: e4m3 ``[P, N, T, D]``, written from its first token on; T >= L.
        key_scale: fp32 ``[P, N, T / 128]``, written.
        values: e4m3 ``[P, N, D, T]``, written; up to the next multiple of 128 tokens with zeros.
        pages: int32 ``[B]``, each sample's own.
        hadamard: multiply queries and keys by the Hadamard matrix.

    Returns:
        e4m3 ``[B, L, N, D]`` and scales, fp32 ``[B, N, L]``, for ``fp8_attention``.

    Raises:
        KernelError: a gradient is asked for, or a shape, dtype or layout it does not take.
    """
    query = dispatch.Query.of(q, k, v, q_weight, k_weight)
    if query.grad:
        raise KernelError("fp8_qkv_post has no gradient.", "Call it under torch.no_grad().")
    _check(q, num_heads, key_mean, value_scale, keys, key_scale, values, pages)
    function = reference if dispatch.choose("fp8_qkv_post", query) == dispatch.REFERENCE else _op
    return function(
        q, k, v, q_weight, k_weight, *rotation, num_heads, eps, key_mean, value_scale, keys, key_scale, values, pages,
        hadamard,
    )  # fmt: skip


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, eps: float, key_mean: Tensor, value_scale: Tensor,
    keys: Tensor, key_scale: Tensor, values: Tensor, pages: Tensor, hadamard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in torch."""
    queries, new_keys = (
        norm_rope_wide(x, weight, (cos, sin), num_heads, eps, False).transpose(1, 2)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    new_keys = new_keys - key_mean[:, :, None]
    if hadamard:
        queries, new_keys = (x.to(q.dtype).to(x.dtype) @ hadamard_matrix(x) for x in (queries, new_keys))
    new_values = v.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1) / value_scale[..., None]
    tokens = q.shape[1]
    padding = -tokens % GROUP
    blocks = torch.nn.functional.pad(new_keys, (0, 0, 0, padding)).unflatten(2, (-1, GROUP)).flatten(-2)
    blocks, scale = quantise(blocks)
    page = pages.long()
    new_values = round_e4m3(torch.nn.functional.pad(new_values, (0, padding)))
    keys[page, :, :tokens] = blocks.unflatten(-1, (GROUP, -1)).flatten(2, 3)[:, :, :tokens].to(keys.dtype)
    key_scale[page, :, : blocks.shape[2]] = scale[..., 0].to(key_scale.dtype)
    values[page, :, :, : tokens + padding] = new_values.to(values.dtype)
    queries, q_scale = quantise(queries)
    return queries.transpose(1, 2).contiguous(), q_scale[..., 0]


def hadamard_matrix(like: Tensor) -> Tensor:
    """Orthonormal and symmetric, ``[128, 128]``: the sign of (i, j) is the parity of the ones in i & j."""
    index = torch.arange(128, device=like.device)
    ones = ((index[:, None] & index[None, :])[..., None] >> torch.arange(7, device=like.device) & 1).sum(-1)
    return (1 - 2 * (ones % 2)).to(like.dtype) / math.sqrt(128)


def _check(
    q: Tensor, num_heads: int, key_mean: Tensor, value_scale: Tensor,
    keys: Tensor, key_scale: Tensor, values: Tensor, pages: Tensor,
) -> None:  # fmt: skip
    batch, tokens, width = q.shape
    if width != num_heads * 128 or keys.ndim != 4 or keys.shape[2] < tokens or keys.shape[2] % GROUP:
        raise KernelError(
            f"fp8_qkv_post got {tokens} tokens of {num_heads} heads in {width} columns, and keys {tuple(keys.shape)}.",
            "It takes heads of 128 channels, and pages [P, N, T, 128] with T a multiple of 128 that holds all tokens.",
        )
    count, _, size, _ = keys.shape
    check_operands(
        "fp8_qkv_post", q.device,
        ("key_mean", key_mean, (batch, num_heads, 128), torch.float32),
        ("value_scale", value_scale, (batch, num_heads, 128), torch.float32),
        ("keys", keys, (count, num_heads, size, 128), E4M3),
        ("key_scale", key_scale, (count, num_heads, size // GROUP), torch.float32),
        ("values", values, (count, num_heads, 128, size), E4M3),
        ("pages", pages, (batch,), torch.int32),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "steps"])
def _rms_kernel(
    q_ptr, k_ptr, out_ptr, eps, tokens, steps, q_batch, q_row, k_batch, k_row, E: tl.constexpr, W: tl.constexpr
):
    """1 / root mean square of every token of q and k: ``[2, B, L]``."""
    first, batch = tl.program_id(0).to(tl.int64) * steps, tl.program_id(2).to(tl.int64)
    if tl.program_id(1) == 0:
        x_ptr, x_row = q_ptr + batch * q_batch, q_row
    else:
        x_ptr, x_row = k_ptr + batch * k_batch, k_row
    out_ptr += (tl.program_id(1) * tl.num_programs(2) + batch) * tokens
    for token in tl.range(first, tl.minimum(first + steps, tokens), num_stages=STAGES):
        row = wide_row(load_row(x_ptr + token * x_row, E, W))
        squares = ()
        for i in tl.static_range(len(row)):
            squares = squares + (row[i] * row[i],)
        tl.store(out_ptr + token, 1.0 / tl.sqrt(sum_row(squares) / E + eps))


@triton.jit
def _normed(x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, rms_ptr, token, present):
    """A head's tokens ``[128, D]``, normed and rotated; zero rows beyond the last."""
    channel, pair = tl.arange(0, _D), tl.arange(0, _D // 2)
    x = tl.load(x_ptr + token[:, None] * x_row + channel[None, :], present[:, None], 0.0).to(tl.float32)
    x *= tl.load(rms_ptr + token, present, 0.0)[:, None] * tl.load(weight_ptr + channel).to(tl.float32)[None, :]
    at = token[:, None] * (_D // 2) + pair[None, :]
    cos = tl.load(cos_ptr + at, present[:, None], 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, present[:, None], 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (_GROUP, _D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (_GROUP, _D))


@triton.jit
def _hadamard(x, dtype: tl.constexpr):
    index = tl.arange(0, _D)
    parity = index[:, None] & index[None, :]
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return tl.dot(x.to(dtype), (1.0 - 2.0 * parity).to(dtype), input_precision="ieee") * _HADAMARD_SCALE


@triton.jit
def _post_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rms_ptr, key_mean_ptr, value_scale_ptr,
    q_out_ptr, q_scale_ptr, keys_ptr, key_scale_ptr, values_ptr, pages_ptr, tokens, size,
    q_batch, q_row, k_batch, k_row, v_batch, v_row,
    HADAMARD: tl.constexpr,
):  # fmt: skip
    group, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), (tl.program_id(2) // 3).to(tl.int64)
    which, heads, batches = tl.program_id(2) % 3, tl.num_programs(1), tl.num_programs(2) // 3
    token, channel = group * _GROUP + tl.arange(0, _GROUP), tl.arange(0, _D)
    present = token < tokens
    of_head = (batch * heads + head) * _D + channel
    page = tl.load(pages_ptr + batch).to(tl.int64) * heads + head
    dtype = q_ptr.dtype.element_ty
    if which == 0:
        q_ptr, rms_ptr = q_ptr + batch * q_batch + head * _D, rms_ptr + batch * tokens
        q = _normed(q_ptr, q_row, q_weight_ptr + head * _D, cos_ptr, sin_ptr, rms_ptr, token, present)
        if HADAMARD:
            q = _hadamard(q, dtype)
        row_scale = e4m3_scale(tl.max(tl.abs(q), axis=1))
        q_at = (batch * tokens + token[:, None]) * (heads * _D) + head * _D + channel[None, :]
        tl.store(q_out_ptr + q_at, to_e4m3(q * (1.0 / row_scale)[:, None]), present[:, None])
        tl.store(q_scale_ptr + (batch * heads + head) * tokens + token, row_scale, present)
    elif which == 1:
        k_ptr, rms_ptr = k_ptr + batch * k_batch + head * _D, rms_ptr + (batches + batch) * tokens
        k = _normed(k_ptr, k_row, k_weight_ptr + head * _D, cos_ptr, sin_ptr, rms_ptr, token, present)
        k -= tl.load(key_mean_ptr + of_head)[None, :]
        if HADAMARD:
            k = _hadamard(k, dtype)
        k = tl.where(present[:, None], k, 0.0)
        group_scale = e4m3_scale(tl.max(tl.abs(k)))
        k_at = (page * size + token[:, None]) * _D + channel[None, :]
        tl.store(keys_ptr + k_at, to_e4m3(k * (1.0 / group_scale)), present[:, None])
        tl.store(key_scale_ptr + page * (size // _GROUP) + group, group_scale)
    else:
        v_at = batch * v_batch + token[:, None] * v_row + head * _D + channel[None, :]
        v = tl.load(v_ptr + v_at, present[:, None], 0.0).to(tl.float32)
        v = v * (1.0 / tl.load(value_scale_ptr + of_head))[None, :]
        tl.store(values_ptr + (page * _D + channel[:, None]) * size + token[None, :], tl.trans(to_e4m3(v)))


@kernel_op(
    "fp8_qkv_post",
    mutates=("keys", "key_scale", "values"),
    fake=lambda q, k, v, q_weight, k_weight, cos, sin, num_heads, *_: _results(q, num_heads),
)
def _op(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, eps: float, key_mean: Tensor, value_scale: Tensor,
    keys: Tensor, key_scale: Tensor, values: Tensor, pages: Tensor, hadamard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "fp8_qkv_post"
    strides = *token_strides(op, "q", q, q), *token_strides(op, "k", k, q)
    check_weight(op, "q_weight", q_weight, q)
    check_weight(op, "k_weight", k_weight, q)
    check_rotation(op, (cos, sin), num_heads, q)
    walk = plan(op, q)
    batch, tokens, width = q.shape
    rms = q.new_empty(2, batch, tokens, dtype=torch.float32)
    _rms_kernel[walk.parts, 2, batch](
        q, k, rms, eps, tokens, walk.steps, *strides, E=width, W=walk.chunk, num_warps=walk.warps
    )
    out, scale = _results(q, num_heads)
    _post_kernel[triton.cdiv(tokens, GROUP), num_heads, 3 * batch](
        q, k, v, q_weight, k_weight, cos, sin, rms, key_mean, value_scale, out, scale,
        keys, key_scale, values, pages, tokens, keys.shape[2], *strides, *token_strides(op, "v", v, q),
        HADAMARD=hadamard, num_warps=_WARPS,
    )  # fmt: skip
    return out, scale


def _results(q: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, num_heads, 128, dtype=E4M3)
    return out, q.new_empty(batch, num_heads, tokens, dtype=torch.float32)


dispatch.register("fp8_qkv_post", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
