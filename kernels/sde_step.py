"""The sampler's step, fused: guidance, update and noise in one pass, for one next state or for a whole group of them.

    guide   v  = v_u + w (v_c - v_u)           classifier-free guidance
    step    x' = a x + b v + std z             one formula for ODE, SDE and re-noising steps; a, b, std per sample
    fork    x'_r = a x + b v + std z_r         every member r of a group leaves the same state under noise of its own

Arithmetic is float32, or float64 where the state is, every operation rounded by itself; velocities may come in any
floating dtype. A member's state depends on its own state and key alone, bit for bit, and is the same from torch,
Triton and CUDA C++: noise is regenerated from 8 bytes wherever it is needed (:mod:`reelforge.kernels.philox`).
"""

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch, philox
from reelforge.kernels.backends import sm90
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError

VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sde_step(x: Tensor, velocity: Tensor, a: Tensor, b: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """``a x + b velocity + std noise``.

    Args:
        x: state ``[B,...]``, float32 or float64.
        velocity: ``[B,...]``, any floating dtype.
        a, b, std: ``[B]``, or ``[1]`` for all samples.
        noise: ``[B,...]``; None leaves the term out, which gives the step's mean.

    Returns:
        the next state, in the dtype of ``x``.
    """
    _check_state(x)
    mean = _rows(a, x) * x + _rows(b, x) * velocity.to(x.dtype)
    return mean if noise is None else mean + _rows(std, x) * noise.to(x.dtype)


def guide(v_uncond: Tensor, v_cond: Tensor, guidance_scale: float) -> Tensor:
    """``v_uncond + guidance_scale (v_cond - v_uncond)``, at least float32."""
    wide = torch.promote_types(v_cond.dtype, torch.float32)
    return v_uncond.to(wide) + guidance_scale * (v_cond.to(wide) - v_uncond.to(wide))


def _rows(coefficient: Tensor, x: Tensor) -> Tensor:
    """``[B]`` to ``[B,1,...]``, in the dtype and on the device of ``x``."""
    return coefficient.to(x).view(-1, *[1] * (x.ndim - 1))


class Fork(NamedTuple):
    """Next states ``[R,...]``, and the guided velocity ``[P,...]`` when it was asked for."""

    x: Tensor
    velocity: Tensor | None


def fork(
    x: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    keys: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    keep_velocity: bool = False,
) -> Fork:
    """One step of P states, each to the members of its group; a state and its velocity are read once.

    Nothing here waits for the device: R is the number of keys, and group sizes are read by the kernel.

    Args:
        x: states ``[P,...]``, float32 (float64 runs in torch).
        velocity: ``[P,...]``, float32 or 16 bit (float64 runs in torch); the conditional one under guidance.
        a, b, std: ``[P]``, each state's own step; std = 0 is the ODE.
        keys: of the noise, int64 ``[R]``; None takes every state to the step's mean.
        offsets: members ``offsets[p]`` up to ``offsets[p + 1]`` leave state p: int32 ``[P + 1]``, from 0 up to R,
            groups of any sizes. None: one member a state. Rows that no group covers stay unwritten.
        v_uncond: like ``velocity``; guides it by ``guidance_scale``.
        keep_velocity: return the guided velocity too, which training stores.

    Raises:
        KernelError: shapes, dtypes or devices that do not go together, or a layout the kernel does not take.
    """
    _check_state(x)
    _check_coefficients(x, a, b, std)
    check_groups("sde_step", x, keys, offsets)
    check_like("sde_step", "velocity", velocity, x)
    if v_uncond is not None:
        check_like("sde_step", "v_uncond", v_uncond, x)
    a, b, std = (coefficient.to(x.dtype).contiguous() for coefficient in (a, b, std))
    operands = [tensor for tensor in (x, velocity, v_uncond) if tensor is not None]
    implementation = dispatch.choose("sde_step", dispatch.Query.of(*operands))
    if implementation == dispatch.REFERENCE:
        v = velocity if v_uncond is None else guide(v_uncond, velocity, guidance_scale)
        return Fork(reference(x, v, a, b, std, keys, offsets), v if keep_velocity else None)
    keep = keep_velocity and v_uncond is not None
    out, guided = _op(implementation, x, velocity, v_uncond, guidance_scale, a, b, std, keys, offsets, keep)
    return Fork(out, (guided if keep else velocity) if keep_velocity else None)


def reference(
    x: Tensor, velocity: Tensor, a: Tensor, b: Tensor, std: Tensor, keys: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """:func:`sde_step` of every member, float32 or float64."""
    if keys is None:
        return sde_step(x, velocity, a, b, std, None)
    noise = philox.reference(keys, x.shape[1:].numel()).view(len(keys), *x.shape[1:])
    if offsets is None:
        return sde_step(x, velocity, a, b, std, noise)
    group = group_of(offsets, len(keys))
    return sde_step(x[group], velocity[group], a[group], b[group], std[group], noise)


def group_of(offsets: Tensor, members: int) -> Tensor:
    """The group of each member, int64 ``[R]``, without waiting for the device."""
    member = torch.arange(members, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets[1:], member, right=True)


def check_groups(op: str, x: Tensor, keys: Tensor | None, offsets: Tensor | None) -> None:
    """Keys and offsets that can number the members of ``x``'s groups, as far as their metadata tell.

    Raises:
        KernelError: they cannot.
    """
    if max(len(x), 0 if keys is None else len(keys)) > philox.MAX_DRAWS:
        raise KernelError(f"{op} got {len(x)} states or more.", f"A launch takes at most {philox.MAX_DRAWS}.")
    if x.shape[1:].numel() > philox.MAX_COUNT:
        raise KernelError(f"{op}: a state is {tuple(x.shape[1:])}.", f"A counter numbers {philox.MAX_COUNT} elements.")
    if keys is None:
        return
    philox.check_keys(op, keys, x.shape[1:].numel())
    if offsets is None and len(keys) != len(x):
        raise KernelError(f"{op}: {len(keys)} keys for {len(x)} states.", "Groups of several members need offsets.")
    shape = (len(x) + 1,)
    if offsets is not None and not (
        offsets.dtype == torch.int32 and offsets.shape == shape and offsets.is_contiguous()
    ):
        raise KernelError(f"{op}: offsets are {offsets.dtype} {tuple(offsets.shape)}.", f"They must be int32 {shape}.")
    if any(tensor.device != x.device for tensor in (keys, offsets) if tensor is not None):
        raise KernelError(f"{op}: keys or offsets are not on {x.device}.", "Upload them once, with all steps' keys.")


def check_like(op: str, name: str, operand: Tensor, like: Tensor) -> None:
    """An operand with the shape and device of another; torch would broadcast it.

    Raises:
        KernelError: it is anything else.
    """
    if operand.shape != like.shape or operand.device != like.device:
        raise KernelError(
            f"{op}: {name} is {tuple(operand.shape)} on {operand.device}.",
            f"It must be {tuple(like.shape)} on {like.device}.",
        )


def check_velocity(op: str, name: str, velocity: Tensor) -> None:
    """A velocity that the kernels read.

    Raises:
        KernelError: its dtype or layout is another.
    """
    if velocity.dtype not in VELOCITY_DTYPES:
        raise KernelError(f"{op}: {name} is {velocity.dtype}.", f"Choose of {VELOCITY_DTYPES}, or pin torch.")
    if not velocity.is_contiguous():
        raise KernelError(f"{op}: {name} has strides {velocity.stride()}.", "The kernel takes contiguous tensors.")


def _check_state(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"sde_step: the state is {x.dtype}.", "Keep it in float32 or float64.")


def _check_coefficients(x: Tensor, a: Tensor, b: Tensor, std: Tensor) -> None:
    for name, coefficient in (("a", a), ("b", b), ("std", std)):
        if coefficient.shape != (len(x),) or coefficient.device != x.device:
            raise KernelError(
                f"sde_step: {name} is {tuple(coefficient.shape)} on {coefficient.device}.",
                f"It must be [{len(x)}] on {x.device}.",
            )


@triton.jit
def members_of(offsets_ptr, group, members):
    """First member of a group and the one past its last; never past the members there are."""
    first = group
    end = group + 1
    if offsets_ptr is not None:
        first = tl.maximum(tl.load(offsets_ptr + group), 0)
        end = tl.minimum(tl.load(offsets_ptr + group + 1), members)
    return first, end


@triton.jit
def _kernel(
    x_ptr, velocity_ptr, uncond_ptr, a_ptr, b_ptr, std_ptr, keys_ptr, offsets_ptr, out_ptr, guided_ptr,
    guidance_scale, count, members, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    at = group.to(tl.int64) * count + element
    x = tl.load(x_ptr + at, inside, 0.0)
    velocity = tl.load(velocity_ptr + at, inside, 0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + at, inside, 0.0).to(tl.float32)
        velocity = uncond + guidance_scale * (velocity - uncond)
        if guided_ptr is not None:
            tl.store(guided_ptr + at, velocity, inside)
    mean = tl.load(a_ptr + group) * x + tl.load(b_ptr + group) * velocity
    if keys_ptr is None:
        tl.store(out_ptr + at, mean, inside)
    else:
        std = tl.load(std_ptr + group)
        first, end = members_of(offsets_ptr, group, members)
        next_ptr = out_ptr + first.to(tl.int64) * count + element
        for member in range(first, end):
            next_x = mean
            if std != 0.0:
                next_x = mean + std * philox.normals(tl.load(keys_ptr + member), tile, BLOCK)
            tl.store(next_ptr, next_x, inside)
            next_ptr += count


@kernel_op("sde_fork", fake=lambda _, x, v, u, w, a, b, std, keys, offsets, keep: _outputs(x, keys, keep))
def _op(
    implementation: str, x: Tensor, velocity: Tensor, v_uncond: Tensor | None, guidance_scale: float,
    a: Tensor, b: Tensor, std: Tensor, keys: Tensor | None, offsets: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Next states, and the guided velocity (empty unless kept)."""
    if not x.is_contiguous():
        raise KernelError(f"sde_step: x has strides {x.stride()}.", "The kernel takes contiguous tensors.")
    check_velocity("sde_step", "velocity", velocity)
    if v_uncond is not None:
        check_velocity("sde_step", "v_uncond", v_uncond)
    out, guided = _outputs(x, keys, keep)
    tensors = (x, velocity, v_uncond, a, b, std, keys, offsets, out, guided if keep else None)
    count, members = x.shape[1:].numel(), len(out)
    if implementation == "cuda":
        sm90.sde_fork(*tensors, guidance_scale, count, members)
    else:
        grid = (triton.cdiv(count, philox.BLOCK), len(x))
        _kernel[grid](
            *tensors, guidance_scale, count, members,
            BLOCK=philox.BLOCK, num_warps=philox.WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out, guided


def _outputs(x: Tensor, keys: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    members = len(x) if keys is None else len(keys)
    return x.new_empty(members, *x.shape[1:]), torch.empty_like(x) if keep else x.new_empty(0)


def _unfit(query: dispatch.Query) -> str | None:
    return "it records no gradient" if query.grad else dispatch.needs_triton(torch.float32)(query)


dispatch.register("sde_step", "cuda", sm90.unfit, sm90)
dispatch.register("sde_step", "triton", _unfit, sys.modules[__name__])
