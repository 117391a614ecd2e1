"""Three ways to turn a bidirectional model causal before it meets its own past.

- ``ode``: regression from stored trajectories of the teacher (CausVid, Self-Forcing): under the chunk-causal mask,
  predict a trajectory's end from one of its states at a student's step.
- ``consistency``: causal consistency distillation (Causal-Forcing++, FastVideo): with the true past clean, the
  prediction from x_sigma must equal the averaged student's from the state that one guided Euler step of the teacher
  makes of it.
- ``teacher_forcing``: plain flow matching with the true past clean, every chunk at a noise level of its own; trains an
  autoregressive diffusion model, which ``consistency`` can take for its teacher.

The last two run [clean | noisy] as one sequence of twice the length, in dense rectangles: what a cached rollout with
ground-truth context computes, for all chunks at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.model.layout import Layout, chunk_causal, packed_teacher_forcing

Network = Callable[..., Tensor]  # (latents, timestep, text, layout=...) -> velocity
Method = Literal["ode", "consistency", "teacher_forcing"]
# (x_t [B,C,T,H,W], timestep [B,T]) -> velocity of the noisy half, its clean half being fixed
PackedVelocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CausalInitConfig:
    """How the causal student begins.

    Attributes:
        method: see the module.
        levels: noise levels of ``consistency``.
        teacher_guidance: w of v_uncond + w (v_cond - v_uncond) in the teacher's step.
    """

    method: Method = "ode"
    levels: int = 48
    teacher_guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ConfigError(f"causal_init.levels is {self.levels}.", "Consistency needs at least 2; 48 is usual.")
        if self.teacher_guidance < 1:
            raise ConfigError(
                f"causal_init.teacher_guidance is {self.teacher_guidance}.",
                "It is w of v_uncond + w (v_cond - v_uncond): 1 is none, 3 is usual.",
            )


def packed(model: Network, clean: Tensor, text: Tensor, pattern: Sequence[int]) -> PackedVelocity:
    """The teacher-forced forward: velocity of ``x_t`` when every chunk sees the clean chunks before it.

    Args:
        model: the network.
        clean: x0 ``[B,C,T,H,W]``.
        text: ``[B,S,E]``.
        pattern: latent frames of each chunk, T in all.
    """
    layout, frames = packed_teacher_forcing(pattern), clean.shape[2]

    def velocity(x_t: Tensor, timestep: Tensor) -> Tensor:
        both = torch.cat((clean.to(x_t.dtype), x_t), dim=2)
        told = torch.cat((torch.zeros_like(timestep), timestep), dim=1)
        return model(both, told, text, layout=layout)[:, :, frames:]

    return velocity


def per_chunk(values: Tensor, pattern: Sequence[int]) -> Tensor:
    """``[B, chunks]`` to ``[B, T]``: every frame of a chunk has the chunk's value."""
    return values.repeat_interleave(torch.tensor(pattern, device=values.device), dim=1)


def draw_levels(purpose: str, seed: int, step: int, slots: range, columns: int, count: int) -> Tensor:
    """Which of ``count`` levels each sample (and each of its chunks) takes, int64 ``[B, columns]``."""
    rows = [rng.uniform(rng.key(purpose, seed, step, slot), columns) for slot in slots]
    return (torch.stack(rows) * count).long().clamp_max(count - 1)


def regression_losses(
    model: Network, states: Tensor, x0: Tensor, levels: Tensor, grid: Grid, text: Tensor, pattern: Sequence[int]
) -> Tensor:
    """``ode``: ``[B]``, mean squared error of the predicted x0.

    Args:
        states: trajectories at the student's steps, ``[B,K,C,T,H,W]``.
        x0: their ends ``[B,C,T,H,W]``.
        levels: step taken of each trajectory, ``[B]``.
        grid: the student's steps.
        text: ``[B,S,E]``.
        pattern: latent frames of each chunk.
    """
    layout: Layout = chunk_causal(pattern)
    x = states[torch.arange(len(states)), levels].float()
    sigma, timestep = (table[levels.cpu()].to(x.device) for table in (grid.sigmas, grid.timesteps))
    velocity = model(x, timestep.float(), text, layout=layout)
    x0_hat = x - _wide(sigma, x) * velocity.float()
    return (x0_hat - x0.float()).square().flatten(1).mean(1)


def teacher_forcing_losses(
    model: Network, x0: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, pattern: Sequence[int]
) -> Tensor:
    """``teacher_forcing``: ``[B]``, mean squared velocity error; ``sigma`` is ``[B, chunks]``."""
    per_frame = per_chunk(sigma, pattern).to(x0.device)
    velocity = packed(model, x0, text, pattern)(_mix(x0, noise, per_frame), FlowSchedule.training_timestep(per_frame))
    return (velocity.float() - (noise - x0.float())).square().flatten(1).mean(1)


def consistency_losses(
    student: PackedVelocity,
    target: PackedVelocity,
    teacher: PackedVelocity,
    x0: Tensor,
    noise: Tensor,
    levels: Tensor,
    grid: Grid,
) -> Tensor:
    """``consistency``: ``[B]``, mean squared difference of two predictions of x0.

    Args:
        student: with gradient.
        target: its average.
        teacher: guided.
        x0, noise: ``[B,C,T,H,W]``.
        levels: level of every frame, ``[B, T]`` in [0, N).
        grid: of N levels.
    """
    sigma, following = (grid.sigmas[levels.cpu() + ahead].to(x0.device) for ahead in (0, 1))
    timestep, after = (FlowSchedule.training_timestep(s) for s in (sigma, following))
    x_t = _mix(x0, noise, sigma)
    with torch.no_grad():
        x_next = x_t + _wide(following - sigma, x_t) * teacher(x_t, timestep).float()
        goal = x_next - _wide(following, x_t) * target(x_next, after).float()
    return (x_t - _wide(sigma, x_t) * student(x_t, timestep).float() - goal).square().flatten(1).mean(1)


def _mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise in fp32 with a sigma for every frame, ``[B, T]``."""
    s = _wide(sigma, x0)
    return (1 - s) * x0.float() + s * noise


def _wide(sigma: Tensor, x: Tensor) -> Tensor:
    """``[B]`` or ``[B, T]`` to what multiplies ``[B,C,T,H,W]``, in fp32."""
    s = sigma.float()
    return s.view(-1, 1, 1, 1, 1) if s.ndim == 1 else s[:, None, :, None, None]
