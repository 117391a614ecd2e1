"""Samplers: from noise to x0 by a velocity, one network evaluation per step.

States are float32 (float64 when the noise is); no gradient is recorded. Cancel a run by raising from ``on_step``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.types import Velocity
from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import Grid
from reelforge.engine.flow.solver import SOLVERS, SolverName
from reelforge.kernels.sde_step import guide

OnStep = Callable[[int], None]  # told how many steps are done
ModelCall = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [B,C,T,H,W], timestep [B], text [B,S,E]) -> velocity


def _integrate(
    velocity: Velocity,
    noise: Tensor,
    grid: Grid,
    advance: Callable[[int, Tensor, Tensor], Tensor],
    on_step: OnStep | None,
    num_steps: int | None = None,
) -> Tensor:
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)).contiguous()  # a chunk's noise is a view
    for k in range(grid.num_steps if num_steps is None else num_steps):
        x = advance(k, x, velocity(x, timesteps(grid, k, x)))
        if on_step is not None:
            on_step(k + 1)
    return x


@torch.no_grad()
def sample_ode(
    velocity: Velocity, noise: Tensor, grid: Grid, solver: SolverName = "unipc", on_step: OnStep | None = None
) -> Tensor:
    """Integrate dx/dsigma = velocity from ``noise`` ``[B,C,T,H,W]`` to x0 of the same shape."""
    state = SOLVERS[solver](grid)
    return _integrate(velocity, noise, grid, lambda _, x, v: state.step(x, v), on_step)


@torch.no_grad()
def sample_few_step(
    velocity: Velocity,
    noise: Tensor,
    grid: Grid,
    renoise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """The distilled student's sampler: predict x0, mix fresh noise in to the next sigma, repeat.

    x0_hat = x - sigma v;  x' = (1 - sigma') x0_hat + sigma' renoise(k). The last x0_hat is the result.

    Args:
        velocity: the student.
        noise: ``[B,C,T,H,W]`` at ``grid.sigmas[0]``.
        grid: from :meth:`FlowSchedule.few_step`.
        renoise: standard normal noise ``[B,C,T,H,W]`` after step k, for k in [0, N-1).
    """

    last = grid.num_steps - 1
    x = few_step_state(velocity, noise, grid, renoise, last, on_step)
    x0 = predict_x0(x, velocity(x, timesteps(grid, last, x)), grid, last)
    if on_step is not None:
        on_step(grid.num_steps)
    return x0


@torch.no_grad()
def few_step_state(
    velocity: Velocity,
    noise: Tensor,
    grid: Grid,
    renoise: Callable[[int], Tensor],
    step: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """What :func:`sample_few_step` shows the student at step ``step``; a rollout under distillation leaves here."""

    def advance(k: int, x: Tensor, v: Tensor) -> Tensor:
        return sde.step(x, v, sde.step_table(grid, sde.RENOISE, x.dtype, x.device)[k : k + 1], renoise(k))

    return _integrate(velocity, noise, grid, advance, on_step, step)


def predict_x0(x: Tensor, velocity: Tensor, grid: Grid, step: int) -> Tensor:
    """x0_hat = x - sigma v at the sigma of step ``step``, in the state's dtype; differentiable."""
    return torch.sub(x, velocity.to(x.dtype), alpha=grid.steps[step][0])


def timesteps(grid: Grid, step: int, x: Tensor) -> Tensor:
    """What the network is told at step ``step``: float32 ``[B]`` beside ``x``."""
    return torch.full((len(x),), grid.steps[step][1], dtype=torch.float32, device=x.device)


def guided(call: ModelCall, text: Tensor, negative: Tensor, guidance_scale: float) -> Velocity:
    """A velocity under classifier-free guidance, v = v_u + w (v_c - v_u), in one forward of twice the batch.

    Args:
        call: the network.
        text, negative: ``[B,S,E]`` prompt and negative prompt.
        guidance_scale: w; at 1 the negative prompt has no effect and the forward is the conditional one alone.
    """
    if guidance_scale == 1.0:
        return lambda x, timestep: call(x, timestep, text)
    both = torch.cat((negative, text))

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        v_uncond, v_cond = call(torch.cat((x, x)), torch.cat((timestep, timestep)), both).chunk(2)
        return guide(v_uncond, v_cond, guidance_scale)

    return velocity


def initial_noise(
    seed: int,
    prompt_ids: Sequence[int],
    members: Sequence[int],
    shape: Sequence[int],
    iteration: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """x_T of a batch: float32 ``[B, *shape]``, row i named by (seed, iteration, prompt_ids[i], members[i]) alone.

    Args:
        prompt_ids, members: one number per sample; members tell the samples of one prompt apart.
        shape: of one latent, ``[C,T,H,W]``.
        iteration: of training; 0 outside it.
    """
    rows = zip(prompt_ids, members, strict=True)
    return rng.normal([rng.key("x_T", seed, iteration, *row) for row in rows], shape, device)


def step_keys(
    seed: int,
    prompt_ids: Sequence[int],
    members: Sequence[int],
    num_steps: int,
    iteration: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What :func:`rng.normal` draws each step's noise from (an SDE step's z, a few-step sampler's fresh noise).

    Args:
        num_steps: k runs from 0; the other arguments name rows as those of :func:`initial_noise` do.

    Returns:
        int64 ``[num_steps, B]`` on ``device``: uploaded once, before the first step.
    """
    rows = list(zip(prompt_ids, members, strict=True))
    keys = [[rng.key("step", seed, iteration, *row, k) for row in rows] for k in range(num_steps)]
    return torch.tensor(keys, dtype=torch.int64, device=device).view(num_steps, len(rows))
