"""``qk_norm_rope`` for cached decoding: rotated keys and the values go straight into their slots of the KV cache.

The formulas and the rounding are those of ``qk_norm_rope``; keys and values are rounded once, to the slots' dtype.
Cached decoding is inference, so there is no gradient.
"""

import sys

import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError
from reelforge.kernels.qk_norm_rope import check_rotation, norm_rope_wide
from reelforge.kernels.rms_norm import DTYPES, check_weight
from reelforge.kernels.rms_rows import norm_tokens
from reelforge.kernels.tiling import STAGES, load_row, plan, store_row, token_strides


def qk_norm_rope_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    num_heads: int,
    eps: float,
    key_slot: Tensor,
    value_slot: Tensor,
    *,
    round_norm: bool = False,
) -> Tensor:
    """Norm and rotate q and k, return q and store k and v.

    Args:
        q: ``[B, L, E]``; ``k`` and ``v`` likewise. Tokens may lie apart, as in a slice of columns.
        q_weight: ``[E]``; ``k_weight`` likewise.
        rotation: (cos, sin), each ``[L, D / 2]`` with D = E / num_heads.
        num_heads: N.
        eps: added to the mean square.
        key_slot: ``[B, L, N, D]``, written; samples may lie apart, a sample's tokens are contiguous.
        value_slot: likewise.
        round_norm: round to the input's dtype between norm and rotation (diffusers' rounding point).

    Returns:
        q as ``[B, L, N, D]``.

    Raises:
        KernelError: a gradient is asked for, a pinned implementation does not fit, or a layout it does not take.
    """
    query = dispatch.Query.of(q, k, v, q_weight, k_weight)
    if query.grad:
        raise KernelError("qk_norm_rope_into has no gradient.", "Call it under torch.no_grad(), or use qk_norm_rope.")
    function = reference if dispatch.choose("qk_norm_rope_into", query) == dispatch.REFERENCE else _triton
    return function(q, k, v, q_weight, k_weight, rotation, num_heads, eps, key_slot, value_slot, round_norm=round_norm)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: tuple[Tensor, Tensor],
    num_heads: int,
    eps: float,
    key_slot: Tensor,
    value_slot: Tensor,
    *,
    round_norm: bool = False,
) -> Tensor:
    """The formula in torch, any floating dtype."""
    key_slot.copy_(norm_rope_wide(k, k_weight, rotation, num_heads, eps, round_norm))
    value_slot.copy_(v.unflatten(-1, (num_heads, -1)))
    return norm_rope_wide(q, q_weight, rotation, num_heads, eps, round_norm).to(q.dtype)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, key_slot_ptr, value_slot_ptr,
    eps, tokens, steps, q_batch, q_row, k_batch, k_row, v_batch, v_row, key_slot_batch, value_slot_batch,
    E: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(1).to(tl.int64) * steps, tl.program_id(2).to(tl.int64)
    end = tl.minimum(first + steps, tokens)
    if tl.program_id(0) == 0:
        norm_tokens(
            q_ptr + batch * q_batch, q_row, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr + batch * tokens * E,
            eps, first, end, E, D, W, ROUND,
        )  # fmt: skip
    elif tl.program_id(0) == 1:
        norm_tokens(
            k_ptr + batch * k_batch, k_row, k_weight_ptr, cos_ptr, sin_ptr, key_slot_ptr + batch * key_slot_batch,
            eps, first, end, E, D, W, ROUND,
        )  # fmt: skip
    else:
        for token in tl.range(first, end, num_stages=STAGES):
            value = load_row(v_ptr + batch * v_batch + token * v_row, E, W)
            store_row(value_slot_ptr + batch * value_slot_batch + token * E, value, E, W)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: tuple[Tensor, Tensor],
    num_heads: int, eps: float, key_slot: Tensor, value_slot: Tensor, *, round_norm: bool,
) -> Tensor:  # fmt: skip
    out = _op(q, k, v, q_weight, k_weight, *rotation, num_heads, eps, key_slot, value_slot, round_norm)
    return out.unflatten(-1, (num_heads, -1))


@kernel_op("qk_norm_rope_into", mutates=("key_slot", "value_slot"), fake=lambda q, *_: q.new_empty(q.shape))
def _op(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, eps: float, key_slot: Tensor, value_slot: Tensor, round_norm: bool,
) -> Tensor:  # fmt: skip
    op = "qk_norm_rope_into"
    strides = *token_strides(op, "q", q, q), *token_strides(op, "k", k, q), *token_strides(op, "v", v, q)
    check_weight(op, "q_weight", q_weight, q)
    check_weight(op, "k_weight", k_weight, q)
    head_dim = check_rotation(op, (cos, sin), num_heads, q)
    slots = [_slot_stride(name, slot, q, num_heads) for name, slot in (("key", key_slot), ("value", value_slot))]
    walk = plan(op, q)
    q_out = q.new_empty(q.shape)
    _kernel[3, walk.parts, q.shape[0]](
        q, k, v, q_weight, k_weight, cos, sin, q_out, key_slot, value_slot, eps, walk.tokens, walk.steps,
        *strides, *slots, E=q.shape[2], D=head_dim, W=walk.chunk, ROUND=round_norm, num_warps=walk.warps,
    )  # fmt: skip
    return q_out


def _slot_stride(name: str, slot: Tensor, like: Tensor, num_heads: int) -> int:
    batch, tokens, width = like.shape
    shape = (batch, tokens, num_heads, width // num_heads)
    if slot.shape != shape or slot.device != like.device or slot.dtype not in DTYPES or not slot[0].is_contiguous():
        raise KernelError(
            f"qk_norm_rope_into: the {name} slot is {slot.dtype} {tuple(slot.shape)} on {slot.device} with strides "
            f"{slot.stride()}.",
            f"It must be {shape} on {like.device} in one of {', '.join(map(str, DTYPES))}, each sample contiguous.",
        )
    return slot.stride(0)


dispatch.register("qk_norm_rope_into", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
