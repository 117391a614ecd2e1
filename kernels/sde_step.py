"""The fused sampler step, and the velocity-space terms of its policy ratio.

    step    x' = a x + b v + std z             one formula for ODE, SDE and re-noising steps; a, b, std per sample
    guide   v  = v_u + w (v_c - v_u)           classifier-free guidance
    terms   mean(e z), mean(e^2) per sample    e = v_theta - v_old; all that a ratio needs besides lambda

Arithmetic is float32, or float64 where the state is; velocities may come in any floating dtype. A sample's result
depends on that sample alone, bit for bit, so a batch may be split in any way.
"""

import torch
from torch import Tensor


def _full(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(coefficient: Tensor, x: Tensor) -> Tensor:
    """``[B]`` to ``[B,1,...]``, in the dtype and on the device of ``x``."""
    return coefficient.to(x).view(-1, *[1] * (x.ndim - 1))


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
    mean = _rows(a, x) * x + _rows(b, x) * velocity.to(x.dtype)
    return mean if noise is None else mean + _rows(std, x) * noise.to(x.dtype)


def guide(v_uncond: Tensor, v_cond: Tensor, guidance_scale: float) -> Tensor:
    """``v_uncond + guidance_scale (v_cond - v_uncond)``, at least float32."""
    return _full(v_uncond) + guidance_scale * (_full(v_cond) - _full(v_uncond))


def mean_product(p: Tensor, q: Tensor) -> Tensor:
    """Mean of ``p q`` over all but the first dimension: float64 ``[B]``; a batch of 1 is shared by the other's rows.

    Reduced sample by sample: a batched reduction orders its sum by the batch's size.
    """
    pairs = zip(*torch.broadcast_tensors(p, q), strict=True)
    return torch.stack([(p_row * q_row).sum(dtype=torch.float64) for p_row, q_row in pairs]) / p[0].numel()


def velocity_terms(velocity: Tensor, velocity_old: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``mean(e z)`` and ``mean(e^2)`` with e = velocity - velocity_old; differentiable in ``velocity``.

    Args:
        velocity, velocity_old: ``[B,...]``, or ``[1,...]`` when the group's samples share their state.
        noise: the step's z, ``[B,...]``.

    Returns:
        float64 ``[B]`` and ``[B]`` (``[1]`` for a shared state). Equal velocities give exactly 0.
    """
    e = _full(velocity) - _full(velocity_old)
    return mean_product(e, noise.to(e.dtype)), mean_product(e, e)
