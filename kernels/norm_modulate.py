"""LayerNorm followed by a per-frame gain and shift: h = LN(x) * gain + shift.

LN has no parameters of its own: AdaLN passes ``gain = 1 + scale`` (Peebles & Xie 2023, DiT), an affine LayerNorm
passes its weight and bias. Gain and shift are ``[B or 1, M, E]``: M = 1 for one timestep a sample, M = T for one a
latent frame, and then token l belongs to row ``l // (L / M)``. Arithmetic is fp32 (fp64 for fp64 inputs) and the
result is rounded once, to ``x.dtype``.

Backward, with n = LN(x), r = 1 / sqrt(var + eps) and u = dh * gain:

    dx = r (u - mean(u) - n mean(u n));  dgain = sum over the row's tokens of dh n;  dshift = the same of dh
"""

import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.tiling import check_tokens, row_strides, row_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEPS, _BACKWARD_STEPS = 2, 8  # tiles a program walks


def norm_modulate(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``LN(x) * gain + shift``.

    Args:
        x: ``[B, L, E]``.
        gain: ``[B or 1, M, E]`` with L divisible by M.
        shift: like ``gain``.
        eps: added to the variance.

    Returns:
        ``[B, L, E]`` in ``x.dtype``.

    Raises:
        KernelError: a pinned implementation does not fit, or a layout it does not take.
    """
    if dispatch.choose("norm_modulate", dispatch.Query.of(x, gain, shift)) == dispatch.REFERENCE:
        return reference(x, gain, shift, eps)
    return _op(x, gain, shift, eps)


def reference(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The formula in torch, any floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return per_frame(normed, gain.to(wide), shift.to(wide)).to(x.dtype)


def per_frame(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """``x * gain + offset``, rows of gain (and of the offset, unless it has a row a token) spread over the tokens."""
    rows = gain.shape[1]
    spread = offset.unflatten(1, (rows, -1)) if offset.shape[1] == x.shape[1] else offset[:, :, None]
    return torch.addcmul(spread, x.unflatten(1, (rows, -1)), gain[:, :, None]).flatten(1, 2)


@triton.jit
def layer_norm_rows(x, inside, E, eps):
    """Normed rows and 1 / std of a ``[ROWS, BLOCK]`` tile whose columns outside the row are 0."""
    mean = tl.sum(x, axis=1) / E
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / E + eps)
    return centred * scale[:, None], scale


@triton.jit
def layer_norm_rows_backward(du, normed, scale, E):
    """Gradient at the rows' input from the gradient ``du`` at the normed rows."""
    mean_u = tl.sum(du, axis=1) / E
    mean_un = tl.sum(du * normed, axis=1) / E
    return (du - mean_u[:, None] - normed * mean_un[:, None]) * scale[:, None]


@triton.jit
def _forward_kernel(
    x_ptr, gain_ptr, shift_ptr, out_ptr, eps, E, tokens, gain_batch, gain_row, shift_batch, shift_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    part, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, BLOCK)
    inside = (column < E)[None, :]
    gain = tl.load(gain_ptr + batch * gain_batch + frame * gain_row + column, column < E, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + frame * shift_row + column, column < E, 0.0).to(tl.float32)
    base = (batch * tl.num_programs(1) + frame).to(tl.int64) * tokens * E
    for step in range(STEPS):
        token = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = base + token[:, None] * E + column[None, :]
        mask = (token < tokens)[:, None] & inside
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        normed, _ = layer_norm_rows(x, inside, E, eps)
        h = normed * gain[None, :] + shift[None, :]
        tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x_ptr, gain_ptr, dh_ptr, dx_ptr, dgain_ptr, dshift_ptr, eps, E, tokens, gain_batch, gain_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    part, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, BLOCK)
    inside = (column < E)[None, :]
    gain = tl.load(gain_ptr + batch * gain_batch + frame * gain_row + column, column < E, 0.0).to(tl.float32)
    row = (batch * tl.num_programs(1) + frame).to(tl.int64)
    dgain = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        token = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = row * tokens * E + token[:, None] * E + column[None, :]
        mask = (token < tokens)[:, None] & inside
        normed, scale = layer_norm_rows(tl.load(x_ptr + at, mask, 0.0).to(tl.float32), inside, E, eps)
        dh = tl.load(dh_ptr + at, mask, 0.0).to(tl.float32)
        dx = layer_norm_rows_backward(dh * gain[None, :], normed, scale, E)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
        dgain += dh * normed
        dshift += dh
    partial = (row * tl.num_programs(0) + part) * E + column
    tl.store(dgain_ptr + partial, tl.sum(dgain, axis=0), column < E)
    tl.store(dshift_ptr + partial, tl.sum(dshift, axis=0), column < E)


@torch.library.custom_op("reelforge::norm_modulate", mutates_args=())
def _op(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    check_tokens("norm_modulate", "x", x, x)
    gain_batch, gain_row, tokens = row_strides("norm_modulate", "gain", gain, x)
    shift_batch, shift_row, _ = row_strides("norm_modulate", "shift", shift, x)
    batch, _, width = x.shape
    tile = row_tile("norm_modulate", width)
    out = torch.empty_like(x)
    grid = (triton.cdiv(tokens, tile.rows * _STEPS), gain.shape[1], batch)
    _forward_kernel[grid](
        x, gain, shift, out, eps, width, tokens, gain_batch, gain_row, shift_batch, shift_row,
        ROWS=tile.rows, BLOCK=tile.block, STEPS=_STEPS, num_warps=tile.warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("reelforge::norm_modulate_backward", mutates_args=())
def _backward_op(x: Tensor, gain: Tensor, dh: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the sums dgain and dshift ``[B, M, E]`` in fp32."""
    check_tokens("norm_modulate", "its gradient", dh, x)
    gain_batch, gain_row, tokens = row_strides("norm_modulate", "gain", gain, x)
    batch, _, width = x.shape
    tile = row_tile("norm_modulate", width)
    parts = triton.cdiv(tokens, tile.rows * _BACKWARD_STEPS)
    dx = torch.empty_like(x)
    dgain, dshift = x.new_empty(2, batch, gain.shape[1], parts, width, dtype=torch.float32)
    _backward_kernel[(parts, gain.shape[1], batch)](
        x, gain, dh, dx, dgain, dshift, eps, width, tokens, gain_batch, gain_row,
        ROWS=tile.rows, BLOCK=tile.block, STEPS=_BACKWARD_STEPS, num_warps=tile.warps,
    )  # fmt: skip
    return dx, dgain.sum(2), dshift.sum(2)


@_op.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@_backward_op.register_fake
def _(x: Tensor, gain: Tensor, dh: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[0], *gain.shape[1:], dtype=torch.float32)
    return torch.empty_like(x), rows, torch.empty_like(rows)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, gain, shift, ctx.eps = inputs
    ctx.save_for_backward(x, gain)
    ctx.shift_like = (shift.shape[0], shift.dtype)


def _backward(ctx: torch.autograd.function.FunctionCtx, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, gain = ctx.saved_tensors
    dx, dgain, dshift = _backward_op(x, gain, dh.contiguous(), ctx.eps)
    return dx, sum_to(dgain, gain.shape[0], gain.dtype), sum_to(dshift, *ctx.shift_like), None


def sum_to(rows: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Sum ``[B, M, E]`` over the batch where the operand had one row for all samples."""
    return (rows if rows.shape[0] == batch else rows.sum(0, keepdim=True)).to(dtype)


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("norm_modulate", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
