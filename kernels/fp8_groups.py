"""e4m3 by groups of 128 channels of a token, with GELU (tanh form) in front where an FFN wants it.

The scales come as the GEMM reads them, tokens side by side: fp32 ``[K / 128, M]``, handed out as its transpose. The
GELU is not rounded in between.
"""

import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, GROUP, e4m3_scale, quantise, to_e4m3
from reelforge.kernels.gelu import sigmoid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP = tl.constexpr(GROUP)
_ROWS, _WARPS = 32, 4


def fp8_groups(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise.

    Args:
        x: ``[M, K]``, contiguous, K a multiple of 128.
        gelu: take the GELU of x.

    Returns:
        e4m3 ``[M, K]`` and scales ``[M, K / 128]``.

    Raises:
        KernelError: a gradient is asked for, or a shape or layout it does not take.
    """
    query = dispatch.Query.of(x)
    if query.grad or x.ndim != 2 or x.shape[1] % GROUP or not x.is_contiguous():
        raise KernelError(
            f"fp8_groups got {tuple(x.shape)} with strides {x.stride()}{', and has no gradient' * query.grad}.",
            f"It takes contiguous [M, K] with K a multiple of {GROUP}, under torch.no_grad().",
        )
    values, scale = (reference if dispatch.choose("fp8_groups", query) == dispatch.REFERENCE else _op)(x, gelu)
    return values, scale.T


def reference(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The formula in torch; scales ``[K / 128, M]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    values, scale = quantise(F.gelu(wide, approximate="tanh") if gelu else wide, GROUP)
    return values, scale.T.contiguous()


@triton.jit
def _kernel(x_ptr, out_ptr, scale_ptr, rows, columns, GELU: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, _GROUP)
    present = row < rows
    at = row.to(tl.int64)[:, None] * columns + tl.program_id(1) * _GROUP + column[None, :]
    x = tl.load(x_ptr + at, present[:, None], 0.0).to(tl.float32)
    if GELU:
        s, _ = sigmoid(x)
        x = x * s
    scale = e4m3_scale(tl.max(tl.abs(x), axis=1))
    tl.store(out_ptr + at, to_e4m3(x * (1.0 / scale)[:, None]), present[:, None])
    tl.store(scale_ptr + tl.program_id(1).to(tl.int64) * rows + row, scale, present)


@kernel_op("fp8_groups", fake=lambda x, gelu: _results(x))
def _op(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    out, scale = _results(x)
    rows, columns = x.shape
    grid = (triton.cdiv(rows, _ROWS), columns // GROUP)
    _kernel[grid](x, out, scale, rows, columns, GELU=gelu, ROWS=_ROWS, num_warps=_WARPS)
    return out, scale


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[1] // GROUP, x.shape[0], dtype=torch.float32)


dispatch.register("fp8_groups", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
