"""A gated residual add and the norm behind it: x' = x + gate * y, h = LN(x') * gain + shift.

The end of one branch and the start of the next, in one pass over the tokens. Rows of gate, gain and shift, and the
rounding, are those of ``norm_modulate``. Gate and gain may have different row counts (a gate a frame, an affine norm's
one row): programs walk rows of their least common multiple, each of which lies in one row of either.

Backward starts from the exact x', computed again. With g the gradient at it, from x' itself and through the norm:

    dx = g;  dy = gate g;  dgate = sum over the row's tokens of g y
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.norm_modulate import (
    DTYPES,
    layer_norm_row,
    modulate_row,
    norm_modulate_row_backward,
    norm_strides,
    per_frame,
)
from reelforge.kernels.tiling import (
    STAGES,
    cast_row,
    check_tokens,
    load_row,
    plan,
    row_strides,
    store_row,
    sum_terms,
    sum_to_batch,
    wide_row,
    zero_row,
)

_BACKWARD_COLUMNS = 24  # a thread holds of a token: three sums beside them leave room for no more


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float, *, round_residual: bool = False
) -> tuple[Tensor, Tensor]:
    """``x + gate * y`` and its modulated norm.

    Args:
        x: residual stream ``[B, L, E]``.
        y: the branch's output ``[B, L, E]``.
        gate: ``[B or 1, M, E]``; None adds ``y`` as it is.
        gain: ``[B or 1, M', E]`` of the next norm.
        shift: like ``gain``.
        eps: added to the variance.
        round_residual: normalise the rounded x' (diffusers' rounding point) instead of the exact one.

    Returns:
        x' and h, both ``[B, L, E]`` in ``x.dtype``.

    Raises:
        KernelError: a pinned implementation does not fit, or a layout it does not take.
    """
    query = dispatch.Query.of(x, y, gain, shift, *(() if gate is None else (gate,)))
    if dispatch.choose("gated_residual_norm", query) == dispatch.REFERENCE:
        return reference(x, y, gate, gain, shift, eps, round_residual=round_residual)
    return _op(x, y, gate, gain, shift, eps, round_residual)


def reference(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float, *, round_residual: bool = False
) -> tuple[Tensor, Tensor]:
    """The formula in torch, any floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide) + y.to(wide) if gate is None else per_frame(y.to(wide), gate.to(wide), x.to(wide))
    rounded = exact.to(x.dtype)
    normed = F.layer_norm(rounded.to(wide) if round_residual else exact, x.shape[-1:], eps=eps)
    return rounded, per_frame(normed, gain.to(wide), shift.to(wide)).to(x.dtype)


@triton.jit
def add_row(x, y):
    total = ()
    for i in tl.static_range(len(x)):
        total = total + (x[i] + y[i],)
    return total


@triton.jit
def _gate_row_backward(g, y, gate, dgate):
    """dy, and the sum ``dgate`` with the row's part added."""
    dy, new_dgate = (), ()
    for i in tl.static_range(len(g)):
        dy = dy + (g[i] * gate[i],)
        new_dgate = new_dgate + (dgate[i] + g[i] * y[i],)
    return dy, new_dgate


@triton.jit(do_not_specialize=["tokens", "steps", "gate_share", "gain_share"])
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, gain_ptr, shift_ptr, residual_ptr, out_ptr, eps, tokens, steps,
    gate_share, gain_share, gate_batch, gate_row, gain_batch, gain_row, shift_batch, shift_row,
    E: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gain = wide_row(load_row(gain_ptr + batch * gain_batch + row // gain_share * gain_row, E, W))
    shift = wide_row(load_row(shift_ptr + batch * shift_batch + row // gain_share * shift_row, E, W))
    if GATED:
        gate = wide_row(load_row(gate_ptr + batch * gate_batch + row // gate_share * gate_row, E, W))
    start = (batch * tl.num_programs(0) + row) * tokens
    for token in tl.range(part * steps, tl.minimum((part + 1) * steps, tokens), num_stages=STAGES):
        at = (start + token) * E
        x = wide_row(load_row(x_ptr + at, E, W))
        y = wide_row(load_row(y_ptr + at, E, W))
        residual = modulate_row(y, gate, x) if GATED else add_row(x, y)
        store_row(residual_ptr + at, residual, E, W)
        if ROUND:
            residual = wide_row(cast_row(residual, residual_ptr.dtype.element_ty))
        normed, _ = layer_norm_row(residual, eps, E, W)
        store_row(out_ptr + at, modulate_row(normed, gain, shift), E, W)


@triton.jit(do_not_specialize=["tokens", "steps", "gate_share", "gain_share"])
def _backward_kernel(
    x_ptr, y_ptr, gate_ptr, gain_ptr, dresidual_ptr, dh_ptr, dx_ptr, dy_ptr, gate_sums_ptr, norm_sums_ptr, plane,
    eps, tokens, steps, gate_share, gain_share, gate_batch, gate_row, gain_batch, gain_row,
    E: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gain = wide_row(load_row(gain_ptr + batch * gain_batch + row // gain_share * gain_row, E, W))
    if GATED:
        gate = wide_row(load_row(gate_ptr + batch * gate_batch + row // gate_share * gate_row, E, W))
        dgate = zero_row(E, W)
    index = batch * tl.num_programs(0) + row
    start = index * tokens
    dgain, dshift = zero_row(E, W), zero_row(E, W)
    for token in tl.range(part * steps, tl.minimum((part + 1) * steps, tokens), num_stages=STAGES):
        at = (start + token) * E
        x = wide_row(load_row(x_ptr + at, E, W))
        y = wide_row(load_row(y_ptr + at, E, W))
        dresidual = wide_row(load_row(dresidual_ptr + at, E, W))
        dh = wide_row(load_row(dh_ptr + at, E, W))
        residual = modulate_row(y, gate, x) if GATED else add_row(x, y)
        through_norm, dgain, dshift = norm_modulate_row_backward(residual, gain, dh, dgain, dshift, eps, E, W)
        g = add_row(dresidual, through_norm)
        store_row(dx_ptr + at, g, E, W)
        if GATED:
            dy, dgate = _gate_row_backward(g, y, gate, dgate)
            store_row(dy_ptr + at, dy, E, W)
    at = (index * tl.num_programs(1) + part) * E
    store_row(norm_sums_ptr + at, dgain, E, W)
    store_row(norm_sums_ptr + plane + at, dshift, E, W)
    if GATED:
        store_row(gate_sums_ptr + at, dgate, E, W)


def gate_strides(gate: Tensor | None, like: Tensor) -> tuple[int, int]:
    return (0, 0) if gate is None else row_strides("gated_residual_norm", "gate", gate, like)


def rows_of(gate: Tensor | None, gain: Tensor) -> tuple[int, int, int]:
    """Rows that the programs walk, and how many of them share a row of the gate and of the gain."""
    norm_rows = gain.shape[1]
    gate_rows = norm_rows if gate is None else gate.shape[1]
    rows = math.lcm(gate_rows, norm_rows)
    return rows, rows // gate_rows, rows // norm_rows


@kernel_op("gated_residual_norm", fake=lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
def _op(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float, round_residual: bool
) -> tuple[Tensor, Tensor]:
    check_tokens("gated_residual_norm", "x", x, x)
    check_tokens("gated_residual_norm", "y", y, x)
    strides = *gate_strides(gate, x), *norm_strides("gated_residual_norm", gain, shift, x)
    rows, gate_share, gain_share = rows_of(gate, gain)
    walk = plan("gated_residual_norm", x, rows)
    residual, out = torch.empty_like(x), torch.empty_like(x)
    _forward_kernel[rows, walk.parts, x.shape[0]](
        x, y, gate, gain, shift, residual, out, eps, walk.tokens, walk.steps, gate_share, gain_share, *strides,
        E=x.shape[2], W=walk.chunk, GATED=gate is not None, ROUND=round_residual, num_warps=walk.warps,
    )  # fmt: skip
    return residual, out


def _gradients(x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, *_: Any) -> tuple[Tensor, ...]:
    norm = x.new_empty(2, x.shape[0], *gain.shape[1:], dtype=torch.float32)
    if gate is None:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0), norm
    return torch.empty_like(x), torch.empty_like(y), norm.new_empty(x.shape[0], *gate.shape[1:]), norm


@kernel_op("gated_residual_norm_backward", fake=_gradients)
def _backward_op(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, dresidual: Tensor, dh: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, and in fp32 dgate ``[B, M, E]`` and dgain and dshift ``[2, B, M', E]``; dy and dgate need a gate."""
    check_tokens("gated_residual_norm", "the gradient at x'", dresidual, x)
    check_tokens("gated_residual_norm", "the gradient at h", dh, x)
    batch, _, width = x.shape
    strides = *gate_strides(gate, x), *row_strides("gated_residual_norm", "gain", gain, x)
    rows, gate_share, gain_share = rows_of(gate, gain)
    walk = plan("gated_residual_norm", x, rows, backward=True, columns=_BACKWARD_COLUMNS)
    dx, dy = torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(y)
    norm_sums = x.new_empty(2, batch, rows, walk.parts, width, dtype=torch.float32)
    gate_sums = x.new_empty(0 if gate is None else batch, rows, walk.parts, width, dtype=torch.float32)
    _backward_kernel[rows, walk.parts, batch](
        x, y, gate, gain, dresidual, dh, dx, dy, gate_sums, norm_sums, norm_sums.stride(0), eps,
        walk.tokens, walk.steps, gate_share, gain_share, *strides,
        E=width, W=walk.chunk, GATED=gate is not None, num_warps=walk.warps,
    )  # fmt: skip
    norm = sum_terms(norm_sums.view(2, batch, gain.shape[1], -1, width))
    return dx, dy, x.new_empty(0) if gate is None else sum_terms(gate_sums.view(batch, gate.shape[1], -1, width)), norm


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, gain, shift, ctx.eps, _ = inputs
    ctx.save_for_backward(x, y, gate, gain)
    ctx.shift_like = (shift.shape[0], shift.dtype)


def _backward(ctx: Any, dresidual: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, y, gate, gain = ctx.saved_tensors
    dx, dy, dgate, (dgain, dshift) = _backward_op(x, y, gate, gain, dresidual.contiguous(), dh.contiguous(), ctx.eps)
    norm = sum_to_batch(dgain, gain.shape[0], gain.dtype), sum_to_batch(dshift, *ctx.shift_like)
    if gate is None:
        return dx, dx.to(y.dtype), None, *norm, None, None
    return dx, dy, sum_to_batch(dgate, gate.shape[0], gate.dtype), *norm, None, None


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("gated_residual_norm", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
