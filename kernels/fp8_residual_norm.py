"""``gated_residual_norm`` for linears that take e4m3: h leaves with one scale a token, and never visits memory wide.

Formulas and rounding of x' are those of ``gated_residual_norm``; h is rounded once, to e4m3. There is no gradient.
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch, gated_residual_norm
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, e4m3_scale, quantise, to_e4m3
from reelforge.kernels.gated_residual_norm import add_row, gate_strides, rows_of
from reelforge.kernels.norm_modulate import DTYPES, layer_norm_row, modulate_row, norm_strides
from reelforge.kernels.tiling import STAGES, check_tokens, load_row, plan, store_row, wide_row


def fp8_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + gate * y`` and its modulated norm in e4m3; arguments as of ``gated_residual_norm``.

    Returns:
        x' ``[B, L, E]`` in ``x.dtype``, h e4m3 ``[B, L, E]``, and its scales, fp32 ``[B, L, 1]``.

    Raises:
        KernelError: a gradient is asked for, a pinned implementation does not fit, or a layout it does not take.
    """
    query = dispatch.Query.of(x, y, gain, shift, *(() if gate is None else (gate,)))
    if query.grad:
        raise KernelError("fp8_residual_norm has no gradient.", "Call it under torch.no_grad().")
    function = reference if dispatch.choose("fp8_residual_norm", query) == dispatch.REFERENCE else _op
    return function(x, y, gate, gain, shift, eps)


def reference(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    residual, h = gated_residual_norm.reference(x.to(wide), y, gate, gain, shift, eps)
    return residual.to(x.dtype), *quantise(h)


@triton.jit(do_not_specialize=["tokens", "steps", "gate_share", "gain_share"])
def _kernel(
    x_ptr, y_ptr, gate_ptr, gain_ptr, shift_ptr, residual_ptr, out_ptr, scale_ptr, eps, tokens, steps,
    gate_share, gain_share, gate_batch, gate_row, gain_batch, gain_row, shift_batch, shift_row,
    E: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gain = wide_row(load_row(gain_ptr + batch * gain_batch + row // gain_share * gain_row, E, W))
    shift = wide_row(load_row(shift_ptr + batch * shift_batch + row // gain_share * shift_row, E, W))
    if GATED:
        gate = wide_row(load_row(gate_ptr + batch * gate_batch + row // gate_share * gate_row, E, W))
    start = (batch * tl.num_programs(0) + row) * tokens
    for token in tl.range(part * steps, tl.minimum((part + 1) * steps, tokens), num_stages=STAGES):
        at = (start + token) * E
        x, y = wide_row(load_row(x_ptr + at, E, W)), wide_row(load_row(y_ptr + at, E, W))
        residual = modulate_row(y, gate, x) if GATED else add_row(x, y)
        store_row(residual_ptr + at, residual, E, W)
        normed, _ = layer_norm_row(residual, eps, E, W)
        h = modulate_row(normed, gain, shift)
        largest = tl.abs(h[0])
        for i in tl.static_range(1, len(h)):
            largest = tl.maximum(largest, tl.abs(h[i]))
        scale = e4m3_scale(tl.max(largest))
        rounded, inverse = (), 1.0 / scale
        for i in tl.static_range(len(h)):
            rounded = rounded + (to_e4m3(h[i] * inverse),)
        store_row(out_ptr + at, rounded, E, W)
        tl.store(scale_ptr + start + token, scale)


@kernel_op("fp8_residual_norm", fake=lambda x, *_: _results(x))
def _op(
    x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = "fp8_residual_norm"
    check_tokens(op, "x", x, x)
    check_tokens(op, "y", y, x)
    strides = *gate_strides(gate, x), *norm_strides(op, gain, shift, x)
    rows, gate_share, gain_share = rows_of(gate, gain)
    walk = plan(op, x, rows)
    residual, out, scale = _results(x)
    _kernel[rows, walk.parts, x.shape[0]](
        x, y, gate, gain, shift, residual, out, scale, eps, walk.tokens, walk.steps, gate_share, gain_share, *strides,
        E=x.shape[2], W=walk.chunk, GATED=gate is not None, num_warps=walk.warps,
    )  # fmt: skip
    return residual, out, scale


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=E4M3), x.new_empty(*x.shape[:2], 1, dtype=torch.float32)


dispatch.register("fp8_residual_norm", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
