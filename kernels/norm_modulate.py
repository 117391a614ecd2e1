"""LayerNorm followed by a per-frame gain and shift: h = LN(x) * gain + shift.

LN has no parameters of its own: AdaLN passes ``gain = 1 + scale`` (Peebles & Xie 2023, DiT), an affine LayerNorm
passes its weight and bias. Gain and shift are ``[B or 1, M, E]``: M = 1 for one timestep a sample, M = T for one a
latent frame, and then token l belongs to row ``l // (L / M)``. Arithmetic is fp32 (fp64 for fp64 inputs) and the
result is rounded once, to ``x.dtype``.

Backward, with n = LN(x), r = 1 / sqrt(var + eps) and u = dh * gain:

    dx = r (u - mean(u) - n mean(u n));  dgain = sum over the row's tokens of dh n;  dshift = the same of dh
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.tiling import (
    STAGES,
    check_tokens,
    load_row,
    plan,
    row_strides,
    store_row,
    sum_row,
    sum_terms,
    sum_to_batch,
    wide_row,
    zero_row,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def norm_strides(op: str, gain: Tensor, shift: Tensor, like: Tensor) -> tuple[int, int, int, int]:
    """Batch and row strides of gain and of shift.

    Raises:
        KernelError: they do not spread evenly over the tokens of ``like``, or differ in their rows.
    """
    strides = *row_strides(op, "gain", gain, like), *row_strides(op, "shift", shift, like)
    if gain.shape[1] != shift.shape[1]:
        raise KernelError(f"{op}: gain has {gain.shape[1]} rows, shift {shift.shape[1]}.", "Give both the same.")
    return strides


@triton.jit
def layer_norm_row(x, eps, E: tl.constexpr, W: tl.constexpr):
    """The normed row and 1 / std of a row that is 0 beyond its E columns."""
    mean = sum_row(x) / E
    centred = ()
    squares = tl.zeros((W,), tl.float32)
    for i in tl.static_range(len(x)):
        difference = x[i] - mean
        if (i + 1) * W > E:
            difference = tl.where(tl.arange(0, W) < E - i * W, difference, 0.0)
        squares += difference * difference
        centred = centred + (difference,)
    scale = 1.0 / tl.sqrt(tl.sum(squares) / E + eps)
    normed = ()
    for i in tl.static_range(len(x)):
        normed = normed + (centred[i] * scale,)
    return normed, scale


@triton.jit
def modulate_row(normed, gain, shift):
    """``normed * gain + shift``."""
    out = ()
    for i in tl.static_range(len(normed)):
        out = out + (normed[i] * gain[i] + shift[i],)
    return out


@triton.jit
def norm_modulate_row_backward(x, gain, dh, dgain, dshift, eps, E: tl.constexpr, W: tl.constexpr):
    """Gradient at a row of the norm's input, and the sums ``dgain`` and ``dshift`` with the row's part added."""
    normed, scale = layer_norm_row(x, eps, E, W)
    new_dgain, new_dshift, u, un = (), (), (), ()
    for i in tl.static_range(len(x)):
        new_dgain = new_dgain + (dgain[i] + dh[i] * normed[i],)
        new_dshift = new_dshift + (dshift[i] + dh[i],)
        u = u + (dh[i] * gain[i],)
        un = un + (u[i] * normed[i],)
    mean_u, mean_un = sum_row(u) / E, sum_row(un) / E
    dx = ()
    for i in tl.static_range(len(x)):
        dx = dx + ((u[i] - mean_u - normed[i] * mean_un) * scale,)
    return dx, new_dgain, new_dshift


@triton.jit(do_not_specialize=["tokens", "steps"])
def _forward_kernel(
    x_ptr, gain_ptr, shift_ptr, out_ptr, eps, tokens, steps, gain_batch, gain_row, shift_batch, shift_row,
    E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gain = wide_row(load_row(gain_ptr + batch * gain_batch + row * gain_row, E, W))
    shift = wide_row(load_row(shift_ptr + batch * shift_batch + row * shift_row, E, W))
    start = (batch * tl.num_programs(0) + row) * tokens
    for token in tl.range(part * steps, tl.minimum((part + 1) * steps, tokens), num_stages=STAGES):
        at = (start + token) * E
        normed, _ = layer_norm_row(wide_row(load_row(x_ptr + at, E, W)), eps, E, W)
        store_row(out_ptr + at, modulate_row(normed, gain, shift), E, W)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _backward_kernel(
    x_ptr, gain_ptr, dh_ptr, dx_ptr, sums_ptr, plane, eps, tokens, steps, gain_batch, gain_row,
    E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gain = wide_row(load_row(gain_ptr + batch * gain_batch + row * gain_row, E, W))
    index = batch * tl.num_programs(0) + row
    start = index * tokens
    dgain, dshift = zero_row(E, W), zero_row(E, W)
    for token in tl.range(part * steps, tl.minimum((part + 1) * steps, tokens), num_stages=STAGES):
        at = (start + token) * E
        x = wide_row(load_row(x_ptr + at, E, W))
        dh = wide_row(load_row(dh_ptr + at, E, W))
        dx, dgain, dshift = norm_modulate_row_backward(x, gain, dh, dgain, dshift, eps, E, W)
        store_row(dx_ptr + at, dx, E, W)
    at = sums_ptr + (index * tl.num_programs(1) + part) * E
    store_row(at, dgain, E, W)
    store_row(at + plane, dshift, E, W)


@kernel_op("norm_modulate", fake=lambda x, *_: torch.empty_like(x))
def _op(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    check_tokens("norm_modulate", "x", x, x)
    strides = norm_strides("norm_modulate", gain, shift, x)
    batch, rows = x.shape[0], gain.shape[1]
    walk = plan("norm_modulate", x, rows)
    out = torch.empty_like(x)
    _forward_kernel[rows, walk.parts, batch](
        x, gain, shift, out, eps, walk.tokens, walk.steps, *strides,
        E=x.shape[2], W=walk.chunk, num_warps=walk.warps,
    )  # fmt: skip
    return out


@kernel_op(
    "norm_modulate_backward",
    fake=lambda x, gain, *_: (torch.empty_like(x), x.new_empty(2, x.shape[0], *gain.shape[1:], dtype=torch.float32)),
)
def _backward_op(x: Tensor, gain: Tensor, dh: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx, and the sums dgain and dshift as fp32 ``[2, B, M, E]``."""
    check_tokens("norm_modulate", "its gradient", dh, x)
    batch, rows, width = x.shape[0], gain.shape[1], x.shape[2]
    walk = plan("norm_modulate", x, rows, backward=True)
    dx = torch.empty_like(x)
    sums = x.new_empty(2, batch, rows, walk.parts, width, dtype=torch.float32)
    _backward_kernel[rows, walk.parts, batch](
        x, gain, dh, dx, sums, sums.stride(0), eps, walk.tokens, walk.steps,
        *row_strides("norm_modulate", "gain", gain, x), E=width, W=walk.chunk, num_warps=walk.warps,
    )  # fmt: skip
    return dx, sum_terms(sums)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, gain, shift, ctx.eps = inputs
    ctx.save_for_backward(x, gain)
    ctx.shift_like = (shift.shape[0], shift.dtype)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, gain = ctx.saved_tensors
    dx, (dgain, dshift) = _backward_op(x, gain, dh.contiguous(), ctx.eps)
    return dx, sum_to_batch(dgain, gain.shape[0], gain.dtype), sum_to_batch(dshift, *ctx.shift_like), None


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("norm_modulate", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
