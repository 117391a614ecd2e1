"""The velocity-space terms of a step's policy ratio, with the step's noise regenerated from its keys.

    replay   mean(e z_r), mean(e^2)      e = v_theta - v_old at the group's state; all a ratio needs besides lambda

Members of a group left the same state, so one velocity serves them all. Sums are fp64 in two stages of fixed order:
over a tile of elements, then over a row's tiles; so a member's terms do not depend, bit for bit, on the batch or on
how groups are packed into it. Backward, n elements a state, one pass over the state, noise regenerated once more:

    dv = (1/n) sum over the group's members of (g1_r z_r + 2 g2_r e)
"""

import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch, philox
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.sde_step import VELOCITY_DTYPES, check_groups, check_like, check_velocity, group_of, members_of


class Terms(NamedTuple):
    """``slope`` mean(e z) and ``power`` mean(e^2) of each member, float64 ``[R]``; power is equal within a group."""

    slope: Tensor
    power: Tensor


def mean_product(p: Tensor, q: Tensor) -> Tensor:
    """Mean of ``p q`` over all but the first dimension: float64 ``[B]``; a batch of 1 is shared by the other's rows.

    Reduced sample by sample: a batched reduction orders its sum by the batch's size.
    """
    pairs = zip(*torch.broadcast_tensors(p, q), strict=True)
    return torch.stack([(p_row * q_row).sum(dtype=torch.float64) for p_row, q_row in pairs]) / p[0].numel()


def velocity_terms(velocity: Tensor, velocity_old: Tensor, noise: Tensor) -> Terms:
    """``mean(e z)`` and ``mean(e^2)`` with e = velocity - velocity_old; differentiable in ``velocity``.

    Args:
        velocity, velocity_old: ``[B,...]``, or ``[1,...]`` when the group's samples share their state.
        noise: the step's z, ``[B,...]``.

    Returns:
        float64 ``[B]`` and ``[B]`` (``[1]`` for a shared state). Equal velocities give exactly 0.
    """
    return _terms(_difference(velocity, velocity_old), noise)


def _difference(velocity: Tensor, velocity_old: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(velocity.dtype, velocity_old.dtype), torch.float32)
    return velocity.to(wide) - velocity_old.to(wide)


def _terms(e: Tensor, noise: Tensor) -> Terms:
    return Terms(mean_product(e, noise.to(e.dtype)), mean_product(e, e))


def replay(velocity: Tensor, velocity_old: Tensor, keys: Tensor, offsets: Tensor | None = None) -> Terms:
    """:func:`velocity_terms` of every member, noise from its key.

    Args:
        velocity: ``[P,...]`` at the groups' states; the terms are differentiable in it alone.
        velocity_old: like ``velocity``: the one that :func:`reelforge.kernels.sde_step.fork` stepped with.
        keys: int64 ``[R]``, those of the fork.
        offsets: int32 ``[P + 1]``, those of the fork; None where each state had one member.

    Returns:
        float64 ``[R]`` each. Equal velocities give exactly 0.

    Raises:
        KernelError: operands that do not go together, or a layout the kernel does not take.
    """
    check_groups("sde_replay", velocity, keys, offsets)
    check_like("sde_replay", "velocity_old", velocity_old, velocity)
    if dispatch.choose("sde_replay", dispatch.Query.of(velocity)) == dispatch.REFERENCE:
        return reference(velocity, velocity_old, keys, offsets)
    return Terms(*_op(velocity, velocity_old.detach(), keys, offsets).unbind())


def reference(velocity: Tensor, velocity_old: Tensor, keys: Tensor, offsets: Tensor | None) -> Terms:
    """:func:`velocity_terms` of every member in torch, any floating dtype."""
    noise = philox.reference(keys, velocity.shape[1:].numel()).view(len(keys), *velocity.shape[1:])
    e = _difference(velocity, velocity_old.detach())
    if offsets is not None:
        # One by one: the gradient of a joint gather would sum its members in no fixed order.
        e = torch.cat([e.index_select(0, group) for group in group_of(offsets, len(keys)).split(1)])
    return _terms(e, noise)


@triton.jit
def _tile_sums_kernel(
    velocity_ptr, old_ptr, keys_ptr, offsets_ptr, sums_ptr, width, count, members, BLOCK: tl.constexpr
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    at = group.to(tl.int64) * count + element
    velocity = tl.load(velocity_ptr + at, element < count, 0.0).to(tl.float32)
    e = (velocity - tl.load(old_ptr + at, element < count, 0.0).to(tl.float32)).to(tl.float64)
    power = tl.sum(e * e, axis=0)
    first, end = members_of(offsets_ptr, group, members)
    for member in range(first, end):
        z = philox.normals(tl.load(keys_ptr + member), tile, BLOCK)
        tl.store(sums_ptr + member * width + tile, tl.sum(e * z.to(tl.float64), axis=0))
        tl.store(sums_ptr + (members + member) * width + tile, power)


@triton.jit
def _row_means_kernel(sums_ptr, means_ptr, width, count, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + row * width + tile, tile < width, 0.0)
    tl.store(means_ptr + row, tl.sum(total, axis=0) / count)


@triton.jit
def _backward_kernel(
    velocity_ptr, old_ptr, keys_ptr, offsets_ptr, dmeans_ptr, dvelocity_ptr, count, members, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    at = group.to(tl.int64) * count + element
    velocity = tl.load(velocity_ptr + at, inside, 0.0).to(tl.float32)
    e = velocity - tl.load(old_ptr + at, inside, 0.0).to(tl.float32)
    gradient = tl.zeros((BLOCK,), tl.float32)
    first, end = members_of(offsets_ptr, group, members)
    for member in range(first, end):
        z = philox.normals(tl.load(keys_ptr + member), tile, BLOCK)
        gradient += tl.load(dmeans_ptr + member) * z + 2.0 * tl.load(dmeans_ptr + members + member) * e
    tl.store(dvelocity_ptr + at, gradient.to(dvelocity_ptr.dtype.element_ty), inside)


@kernel_op(
    "sde_replay", fake=lambda velocity, velocity_old, keys, *_: velocity.new_empty(2, len(keys), dtype=torch.float64)
)
def _op(velocity: Tensor, velocity_old: Tensor, keys: Tensor, offsets: Tensor | None) -> Tensor:
    """Slopes and powers, ``[2, R]``."""
    _check(velocity, velocity_old)
    count, members = velocity.shape[1:].numel(), len(keys)
    tiles = triton.cdiv(count, philox.BLOCK)
    width = triton.cdiv(tiles, 16) * 16  # rows that start at a multiple of 16 load in full width
    sums = velocity.new_zeros(2, members, width, dtype=torch.float64)
    _tile_sums_kernel[(tiles, len(velocity))](
        velocity, velocity_old, keys, offsets, sums, width, count, members,
        BLOCK=philox.BLOCK, num_warps=philox.WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    means = velocity.new_empty(2, members, dtype=torch.float64)
    _row_means_kernel[(2 * members,)](sums, means, width, count, BLOCK=philox.BLOCK, num_warps=4)
    return means


@kernel_op("sde_replay_backward", fake=lambda velocity, *_: torch.empty_like(velocity))
def _backward_op(
    velocity: Tensor, velocity_old: Tensor, keys: Tensor, offsets: Tensor | None, dmeans: Tensor
) -> Tensor:
    """dv from the gradients of slopes and powers over n, float32 ``[2, R]``."""
    count = velocity.shape[1:].numel()
    dvelocity = torch.empty_like(velocity)
    _backward_kernel[(triton.cdiv(count, philox.BLOCK), len(velocity))](
        velocity, velocity_old, keys, offsets, dmeans, dvelocity, count, len(keys),
        BLOCK=philox.BLOCK, num_warps=philox.WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return dvelocity


def _check(velocity: Tensor, velocity_old: Tensor) -> None:
    check_velocity("sde_replay", "velocity", velocity)
    check_velocity("sde_replay", "velocity_old", velocity_old)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    dmeans = (gradient / ctx.saved_tensors[0].shape[1:].numel()).float().contiguous()
    return _backward_op(*ctx.saved_tensors, dmeans), None, None, None


_op.register_autograd(_backward, setup_context=_setup)
dispatch.register("sde_replay", "triton", dispatch.needs_triton(*VELOCITY_DTYPES), sys.modules[__name__])
