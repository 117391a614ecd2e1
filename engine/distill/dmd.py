"""Distribution matching distillation (Yin et al. 2024): move samples to where the teacher finds them likelier.

With x a sample of the student, x_sigma = (1 - sigma) x + sigma noise, and both networks' predictions of x0 from it,

    g = (x0_critic - x0_teacher) / mean |x - x0_teacher|        per sample
    L = mean (x - stopgrad(x - g))^2 / 2,  so dL/dx = g / numel

The critic is trained on the student's samples by the flow loss, so x0_critic - x0_teacher = sigma (v_teacher -
v_critic) follows the difference of the two scores. Sigmas, states and g are fp32 whatever the networks run in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import Velocity
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.train.flow_loss import interpolate

_LEAST = 1e-5  # of the divisor: a sample on which the teacher changes nothing must not divide by 0


@dataclass(frozen=True)
class DmdConfig:
    """How student and teacher are compared.

    Attributes:
        teacher_guidance: w of v_uncond + w (v_cond - v_uncond). Self-Forcing's code computes
            v_cond + w (v_cond - v_uncond) instead, so its 3.0 is 4.0 here.
        sigma_range: noise levels of the comparison are clamped to it.
        critic_steps: optimizer steps of the critic before each one of the student.
    """

    teacher_guidance: float = 4.0
    sigma_range: tuple[float, float] = (0.02, 0.98)
    critic_steps: int = 5

    def __post_init__(self) -> None:
        if self.teacher_guidance < 1:
            raise ConfigError(
                f"teacher_guidance is {self.teacher_guidance}.",
                "It is w of v_uncond + w (v_cond - v_uncond): 1 is none, 3 to 6 are usual.",
            )
        low, high = self.sigma_range
        if not 0 < low < high <= 1:
            raise ConfigError(f"sigma_range is {list(self.sigma_range)}.", "It is a rising pair in (0, 1].")
        if self.critic_steps < 1:
            raise ConfigError(f"critic_steps is {self.critic_steps}.", "The critic needs at least 1; 5 is usual.")


def draw_sigmas(config: DmdConfig, schedule: FlowSchedule, seed: int, step: int, slots: range) -> Tensor:
    """One noise level per sample, the same for all of its frames: fp64 ``[slots]``, named by step and global slot."""
    u = torch.cat([rng.uniform(rng.key("dmd_sigma", seed, step, slot), 1) for slot in slots])
    return schedule.shift(u).clamp(*config.sigma_range)


@torch.no_grad()
def distribution_gradient(
    x: Tensor, teacher: Velocity, critic: Velocity, sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The direction away from the teacher's distribution.

    Args:
        x: samples of the student, fp32 ``[B,C,T,H,W]``.
        teacher: guided velocity of the frozen model.
        critic: velocity of the model that follows the student, without guidance.
        sigma: ``[B]``.
        noise: standard normal, like ``x``.

    Returns:
        g like ``x``, 0 for a sample whose g is not finite; and which samples are, bool ``[B]``.
    """
    sigma = sigma.to(x.device)
    x_t, timestep = interpolate(x, noise, sigma), FlowSchedule.training_timestep(sigma)
    s = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    x0_teacher, x0_critic = (x_t - s * network(x_t, timestep).to(x.dtype) for network in (teacher, critic))
    scale = (x - x0_teacher).abs().flatten(1).mean(1).clamp_min(_LEAST).view_as(s)
    g = (x0_critic - x0_teacher) / scale
    finite = g.isfinite().flatten(1).all(1)
    return torch.where(finite.view_as(s), g, 0.0), finite


def dmd_losses(x: Tensor, g: Tensor) -> Tensor:
    """``[B]``: each sample's mean over its elements, whose gradient with respect to ``x`` is g / numel."""
    return (x - (x - g).detach()).square().flatten(1).mean(1) / 2
