"""Root-mean-square norm over the last axis: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

Cross-attention norms its queries and keys so, over all heads together and without positions. Arithmetic is fp32 (fp64
for fp64 inputs), rounded once to ``x.dtype``.
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
from reelforge.kernels.rms_rows import norm_tokens, norm_tokens_backward
from reelforge.kernels.tiling import check_tokens, plan, sum_terms, token_strides

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each token.

    Args:
        x: ``[B, L, E]``; tokens may lie apart, as in a slice of columns.
        weight: ``[E]``.
        eps: added to the mean square.

    Returns:
        ``[B, L, E]`` in ``x.dtype``.

    Raises:
        KernelError: a pinned implementation does not fit, or a layout it does not take.
    """
    if dispatch.choose("rms_norm", dispatch.Query.of(x, weight)) == dispatch.REFERENCE:
        return reference(x, weight, eps)
    return _op(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in torch, any floating dtype."""
    return reference_wide(x, weight, eps).to(x.dtype)


def reference_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same before it is rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)


def check_weight(op: str, name: str, weight: Tensor, like: Tensor) -> None:
    """A contiguous ``[E]`` beside tokens ``[B, L, E]``.

    Raises:
        KernelError: it is anything else.
    """
    if weight.shape != like.shape[2:] or weight.device != like.device or not weight.is_contiguous():
        raise KernelError(
            f"{op}: {name} is {tuple(weight.shape)} on {weight.device} with strides {weight.stride()}.",
            f"It must be [{like.shape[2]}] on {like.device}, contiguous.",
        )


@triton.jit(do_not_specialize=["tokens", "steps"])
def _forward_kernel(
    x_ptr, weight_ptr, out_ptr, eps, tokens, steps, x_batch, x_row, E: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    first, batch = tl.program_id(0).to(tl.int64) * steps, tl.program_id(1).to(tl.int64)
    norm_tokens(
        x_ptr + batch * x_batch, x_row, weight_ptr, None, None, out_ptr + batch * tokens * E,
        eps, first, tl.minimum(first + steps, tokens), E, 0, W, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "steps"])
def _backward_kernel(
    x_ptr, weight_ptr, dout_ptr, dx_ptr, sums_ptr, eps, tokens, steps, x_batch, x_row, E: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    first, batch = tl.program_id(0).to(tl.int64) * steps, tl.program_id(1).to(tl.int64)
    sums = sums_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * E
    norm_tokens_backward(
        x_ptr + batch * x_batch, x_row, weight_ptr, None, None,
        dout_ptr + batch * tokens * E, dx_ptr + batch * tokens * E, sums,
        eps, first, tl.minimum(first + steps, tokens), E, 0, W,
    )  # fmt: skip


@kernel_op("rms_norm", fake=lambda x, *_: x.new_empty(x.shape))
def _op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    strides = token_strides("rms_norm", "x", x, x)
    check_weight("rms_norm", "weight", weight, x)
    walk = plan("rms_norm", x)
    out = x.new_empty(x.shape)
    _forward_kernel[walk.parts, x.shape[0]](
        x, weight, out, eps, walk.tokens, walk.steps, *strides, E=x.shape[2], W=walk.chunk, num_warps=walk.warps
    )
    return out


@kernel_op(
    "rms_norm_backward",
    fake=lambda x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)),
)
def _backward_op(x: Tensor, weight: Tensor, dout: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx, and dweight in fp32."""
    check_tokens("rms_norm", "its gradient", dout, x)
    batch, _, width = x.shape
    walk = plan("rms_norm", x, backward=True)
    dx = x.new_empty(x.shape)
    sums = x.new_empty(batch * walk.parts, width, dtype=torch.float32)
    _backward_kernel[walk.parts, batch](
        x, weight, dout, dx, sums, eps, walk.tokens, walk.steps, *token_strides("rms_norm", "x", x, x),
        E=width, W=walk.chunk, num_warps=walk.warps,
    )  # fmt: skip
    return dx, sum_terms(sums)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _backward_op(x, weight, dout.contiguous(), ctx.eps)
    return dx, dweight.to(weight.dtype), None


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("rms_norm", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
