"""Root-mean-square norm of queries and keys over the full width, then 3-D rotary positions per head.

    n = x / sqrt(mean_E(x^2) + eps) * weight                 over all heads together, before the split
    out[2i]   = n[2i] cos_i - n[2i+1] sin_i                  pairs are interleaved, as in RoFormer (Su et al. 2021)
    out[2i+1] = n[2i] sin_i + n[2i+1] cos_i

Arithmetic is fp32 (fp64 for fp64 inputs), rounded once to the input's dtype. Queries and keys share one launch, and
neighbouring programs take the same tokens of both, so that the second finds the angles in L2.
"""

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.rms_norm import DTYPES, check_weight, reference_wide
from reelforge.kernels.rms_rows import norm_tokens, norm_tokens_backward
from reelforge.kernels.tiling import check_tokens, plan, sum_terms, token_strides


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    num_heads: int,
    eps: float,
    *,
    round_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate q and k.

    Args:
        q: ``[B, L, E]``; ``k`` likewise. Tokens may lie apart, as in a slice of columns of one QKV product.
        q_weight: ``[E]``; ``k_weight`` likewise.
        rotation: (cos, sin), each ``[L, D / 2]`` with D = E / num_heads.
        num_heads: N.
        eps: added to the mean square.
        round_norm: round to the input's dtype between norm and rotation (diffusers' rounding point).

    Returns:
        q and k as ``[B, L, N, D]``.

    Raises:
        KernelError: a pinned implementation does not fit, or a layout it does not take.
    """
    if dispatch.choose("qk_norm_rope", dispatch.Query.of(q, k, q_weight, k_weight)) == dispatch.REFERENCE:
        return reference(q, k, q_weight, k_weight, rotation, num_heads, eps, round_norm=round_norm)
    outputs = _op(q, k, q_weight, k_weight, *rotation, num_heads, eps, round_norm)
    return tuple(out.unflatten(-1, (num_heads, -1)) for out in outputs)


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    num_heads: int,
    eps: float,
    *,
    round_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula in torch, any floating dtype."""
    return (
        norm_rope_wide(q, q_weight, rotation, num_heads, eps, round_norm).to(q.dtype),
        norm_rope_wide(k, k_weight, rotation, num_heads, eps, round_norm).to(k.dtype),
    )


def norm_rope_wide(
    x: Tensor, weight: Tensor, rotation: tuple[Tensor, Tensor], num_heads: int, eps: float, round_norm: bool
) -> Tensor:
    """One of the two as ``[B, L, N, D]``, before it is rounded."""
    normed = reference_wide(x, weight, eps)
    if round_norm:
        normed = normed.to(x.dtype).to(normed.dtype)
    return rotate(normed.unflatten(-1, (num_heads, -1)), rotation)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs of ``[B, L, N, D]`` by (cos, sin) ``[L, D / 2]``."""
    cos, sin = (table[None, :, None].to(x.dtype) for table in rotation)
    # A pair times (cos + i sin), as one complex product.
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def check_rotation(op: str, rotation: tuple[Tensor, Tensor], num_heads: int, like: Tensor) -> int:
    """The head dimension D, where the angles are contiguous ``[L, D / 2]`` beside tokens ``[B, L, E]``.

    Raises:
        KernelError: they are anything else, or D is odd.
    """
    _, tokens, width = like.shape
    if width % (2 * num_heads):
        raise KernelError(f"{op}: {width} columns in {num_heads} heads.", "A head needs an even number of them.")
    wanted = (tokens, width // num_heads // 2)
    for name, table in zip(("cos", "sin"), rotation, strict=True):
        if table.shape != wanted or table.device != like.device or not table.is_contiguous():
            raise KernelError(
                f"{op}: {name} is {tuple(table.shape)} on {table.device} with strides {table.stride()}.",
                f"It must be {wanted} on {like.device}, contiguous.",
            )
    return width // num_heads


@triton.jit(do_not_specialize=["tokens", "steps"])
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, eps, tokens, steps,
    q_batch, q_row, k_batch, k_row,
    E: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(1).to(tl.int64) * steps, tl.program_id(2).to(tl.int64)
    if tl.program_id(0) == 0:
        x_ptr, x_row, weight_ptr, out_ptr = q_ptr + batch * q_batch, q_row, q_weight_ptr, q_out_ptr
    else:
        x_ptr, x_row, weight_ptr, out_ptr = k_ptr + batch * k_batch, k_row, k_weight_ptr, k_out_ptr
    norm_tokens(
        x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, out_ptr + batch * tokens * E,
        eps, first, tl.minimum(first + steps, tokens), E, D, W, ROUND,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "steps"])
def _backward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr, dq_ptr, dk_ptr, sums_ptr,
    eps, tokens, steps, q_batch, q_row, k_batch, k_row, E: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(1).to(tl.int64) * steps, tl.program_id(2).to(tl.int64)
    if tl.program_id(0) == 0:
        x_ptr, x_row, weight_ptr, dout_ptr, dx_ptr = q_ptr + batch * q_batch, q_row, q_weight_ptr, dq_out_ptr, dq_ptr
    else:
        x_ptr, x_row, weight_ptr, dout_ptr, dx_ptr = k_ptr + batch * k_batch, k_row, k_weight_ptr, dk_out_ptr, dk_ptr
    sample = batch * tokens * E
    part = (tl.program_id(0) * tl.num_programs(2) + batch) * tl.num_programs(1) + tl.program_id(1)
    norm_tokens_backward(
        x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, dout_ptr + sample, dx_ptr + sample, sums_ptr + part * E,
        eps, first, tl.minimum(first + steps, tokens), E, D, W,
    )  # fmt: skip


@kernel_op("qk_norm_rope", fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)))
def _op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, eps: float, round_norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    strides = *token_strides("qk_norm_rope", "q", q, q), *token_strides("qk_norm_rope", "k", k, q)
    check_weight("qk_norm_rope", "q_weight", q_weight, q)
    check_weight("qk_norm_rope", "k_weight", k_weight, q)
    if k.dtype != q.dtype or k_weight.dtype != q_weight.dtype:
        dtypes = f"{q.dtype} and {k.dtype}, weights {q_weight.dtype} and {k_weight.dtype}"
        raise KernelError(f"qk_norm_rope: q and k are {dtypes}.", "One launch serves both: give them the same.")
    head_dim = check_rotation("qk_norm_rope", (cos, sin), num_heads, q)
    walk = plan("qk_norm_rope", q)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _forward_kernel[2, walk.parts, q.shape[0]](
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps, walk.tokens, walk.steps, *strides,
        E=q.shape[2], D=head_dim, W=walk.chunk, ROUND=round_norm, num_warps=walk.warps,
    )  # fmt: skip
    return q_out, k_out


@kernel_op(
    "qk_norm_rope_backward",
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(2, q.shape[2], dtype=torch.float32)),
)
def _backward_op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    dq_out: Tensor, dk_out: Tensor, num_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, and the weights' gradients as fp32 ``[2, E]``."""
    check_tokens("qk_norm_rope", "the gradient at q", dq_out, q)
    check_tokens("qk_norm_rope", "the gradient at k", dk_out, k)
    batch, _, width = q.shape
    walk = plan("qk_norm_rope", q, backward=True)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    sums = q.new_empty(2, batch * walk.parts, width, dtype=torch.float32)
    strides = *token_strides("qk_norm_rope", "q", q, q), *token_strides("qk_norm_rope", "k", k, q)
    _backward_kernel[2, walk.parts, batch](
        q, k, q_weight, k_weight, cos, sin, dq_out, dk_out, dq, dk, sums, eps, walk.tokens, walk.steps, *strides,
        E=width, D=width // num_heads, W=walk.chunk, num_warps=walk.warps,
    )  # fmt: skip
    return dq, dk, sum_terms(sums)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one reading
    _, _, q_weight, k_weight, *_ = saved
    gradients = dq_out.contiguous(), dk_out.contiguous()
    dq, dk, (dq_weight, dk_weight) = _backward_op(*saved, *gradients, ctx.num_heads, ctx.eps)
    return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("qk_norm_rope", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
