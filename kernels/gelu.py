"""GELU, tanh form (Hendrycks & Gimpel 2016), of a tensor and of a tensor plus a bias that the GEMM could not add.

    y = 0.5 z (1 + tanh u) = z s,    z = x + bias,    u = sqrt(2 / pi) (z + 0.044715 z^3),    s = sigmoid(2 u)

Backward:

    dx = dy (s + 2 z u' s (1 - s)),    u' = sqrt(2 / pi) (1 + 3 * 0.044715 z^2);    dbias = sum of dx over the rows

The kernels take e = exp(-2 |u|), which is at most 1: with r = 1 / (1 + e), s is r or e r and s (1 - s) is e r^2.
Nothing overflows and 1 + tanh does not cancel. Arithmetic is fp32; the result is rounded once, to ``x.dtype``.
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
from reelforge.kernels.errors import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUBIC = tl.constexpr(0.044715)
_SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))  # of 2 u at 0
_LOG2_E = tl.constexpr(math.log2(math.e))
_FLAT, _WITH_BIAS = (1, 4096), (16, 256)  # rows and columns of a tile; 16 elements a thread
_WARPS = 8
_BACKWARD_STEPS = 8  # tiles a program sums dbias over


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``GELU(x + bias)``.

    Args:
        x: any shape ``[..., E]``.
        bias: ``[E]``, added in fp32.

    Returns:
        the shape and dtype of ``x``.

    Raises:
        KernelError: a bias of another size, a pinned implementation that does not fit, or a layout it does not take.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise KernelError(f"gelu: bias is {tuple(bias.shape)}.", f"It must be {tuple(x.shape[-1:])}.")
    query = dispatch.Query.of(x) if bias is None else dispatch.Query.of(x, bias)
    if dispatch.choose("gelu", query) == dispatch.REFERENCE:
        return reference(x, bias)
    return _op(x, bias)


def reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in torch, any floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x if bias is None else x.to(wide) + bias.to(wide)
    return F.gelu(z, approximate="tanh").to(x.dtype)


@triton.jit
def sigmoid(z):
    """s and s (1 - s)."""
    e = tl.exp2(-tl.abs(z) * (_SLOPE * _LOG2_E + (_SLOPE * _LOG2_E * _CUBIC) * (z * z)))
    r = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * r, r), e * r * r


@triton.jit
def _tile(row, column, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of a tile; 64-bit where its corner lies, 32-bit inside."""
    down, along = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (down < rows - row) & (along < columns - column)
    return row * columns + column + (down * columns + along), mask


@triton.jit
def _forward_kernel(x_ptr, bias_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    parts = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    at, mask = _tile(row, column, rows, columns, ROWS, BLOCK)
    z = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        along = tl.arange(0, BLOCK)
        z += tl.load(bias_ptr + column + along, along < columns - column, 0.0).to(tl.float32)[None, :]
    s, _ = sigmoid(z)
    tl.store(out_ptr + at, (z * s).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, dbias_ptr, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(columns, BLOCK)
    part = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    along = tl.arange(0, BLOCK)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column + along, along < columns - column, 0.0).to(tl.float32)[None, :]
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        at, mask = _tile((part * STEPS + step) * ROWS, column, rows, columns, ROWS, BLOCK)
        z = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        if bias_ptr is not None:
            z += bias
        s, product = sigmoid(z)
        # Where s has reached 0 or 1, z^3 may be infinite.
        bend = tl.where(product > 0, z * (_SLOPE + (3.0 * _SLOPE * _CUBIC) * (z * z)) * product, 0.0)
        dz = dy * (s + bend)
        tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask)
        if bias_ptr is not None:
            dbias += dz
    if bias_ptr is not None:
        tl.store(dbias_ptr + part * columns + column + along, tl.sum(dbias, axis=0), along < columns - column)


def _rows(x: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Rows and columns to walk: the bias's rows, or all elements in one.

    Raises:
        KernelError: a layout the kernels do not take.
    """
    if not x.is_contiguous():
        raise KernelError(f"gelu: x has strides {x.stride()}.", "Its kernel takes contiguous tensors.")
    if bias is None:
        return 1, x.numel()
    if bias.shape != x.shape[-1:] or bias.device != x.device or not bias.is_contiguous():
        raise KernelError(
            f"gelu: bias is {tuple(bias.shape)} with strides {bias.stride()} on {bias.device}.",
            f"It must be contiguous {tuple(x.shape[-1:])} on {x.device}.",
        )
    return x.numel() // max(1, len(bias)), len(bias)


@kernel_op("gelu", fake=lambda x, bias: torch.empty_like(x))
def _op(x: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = _rows(x, bias)
    height, width = _FLAT if bias is None else _WITH_BIAS
    out = torch.empty_like(x)
    grid = (triton.cdiv(rows, height) * triton.cdiv(columns, width),)
    _forward_kernel[grid](x, bias, out, rows, columns, ROWS=height, BLOCK=width, num_warps=_WARPS)
    return out


@kernel_op(
    "gelu_backward",
    fake=lambda x, bias, dy: (torch.empty_like(x), x.new_empty(0 if bias is None else len(bias), dtype=torch.float32)),
)
def _backward_op(x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and dbias in fp32, which is empty without a bias."""
    rows, columns = _rows(x, bias)
    (height, width), steps = (_FLAT, 1) if bias is None else (_WITH_BIAS, _BACKWARD_STEPS)
    parts = triton.cdiv(rows, height * steps)
    dx = torch.empty_like(x)
    dbias = x.new_empty((0, 0) if bias is None else (parts, columns), dtype=torch.float32)
    _backward_kernel[(parts * triton.cdiv(columns, width),)](
        x, bias, dy, dx, dbias, rows, columns, ROWS=height, BLOCK=width, STEPS=steps, num_warps=_WARPS
    )
    return dx, dbias.sum(0)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = _backward_op(x, bias, dy.contiguous())
    return dx, None if bias is None else dbias.to(bias.dtype)


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("gelu", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
