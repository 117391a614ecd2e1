"""The flow-matching loss and its random draws.

L = w(sigma) mean |v_theta(x_sigma, 1000 sigma, c) - (noise - x0)|^2 with x_sigma = (1 - sigma) x0 + sigma noise
(Lipman et al. 2022; Liu et al. 2022), sigma = flow_shift applied to u. Interpolation and loss are fp32 whatever
precision the network runs in: bf16 sigmas move the early steps by up to a fifth of their length.

Every draw is named by (seed, step, slot), slot being the sample's place in the GLOBAL batch, so the loss does not
depend on how the batch is split into micro-batches or among ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.schedule import FlowSchedule


@dataclass(frozen=True)
class FlowLossConfig:
    """How noise levels and captions are drawn.

    Attributes:
        sampler: distribution of u before the shift; ``logit_normal`` is sigmoid(mean + std n) (Esser et al. 2024).
        mean: of the logit.
        std: of the logit.
        stratified: spread u over the global batch, u_i = (i + r_i) / B in random order. The same distribution, but the
            batch mean of a smooth function has 1/B^2 of the variance (one r for all, as often seen, gives 1/B).
        weight: ``none`` is 1; ``bell`` is DiffSynth-Studio's exp(-2 (sigma - 1/2)^2), from zero up, mean 1 on its grid.
        text_dropout: share of samples that see the empty caption, which is what guidance subtracts.
    """

    sampler: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    stratified: bool = True
    weight: Literal["none", "bell"] = "none"
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.text_dropout <= 1:
            raise ConfigError(f"text_dropout is {self.text_dropout}.", "It is a share in [0, 1].")
        if self.std <= 0:
            raise ConfigError(f"std is {self.std}.", "It must be above 0.")


def draw_sigmas(config: FlowLossConfig, schedule: FlowSchedule, seed: int, step: int, batch: int) -> Tensor:
    """Noise levels of one global batch, fp64 ``[batch]`` in [0, 1]."""
    u = rng.uniform(rng.key("sigma", seed, step), batch).double()
    if config.stratified:
        strata = rng.generator("sigma_order", seed, step).permutation(batch)
        u = (torch.from_numpy(strata) + u) / batch
    if config.sampler == "logit_normal":
        u = torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
    return schedule.shift(u)


def draw_text_dropout(config: FlowLossConfig, seed: int, step: int, batch: int) -> Tensor:
    """True where a sample of the global batch sees the empty caption, bool ``[batch]``."""
    return rng.uniform(rng.key("text_dropout", seed, step), batch) < config.text_dropout


def draw_noise(seed: int, step: int, slots: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Training noise of these slots of the global batch, fp32 ``[len(slots), *shape]``."""
    return rng.normal([rng.key("sft_noise", seed, step, slot) for slot in slots], shape, device)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise in fp32; sigma is ``[B]``."""
    s = sigma.float().view(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0.float() + s * noise


def flow_losses(model: nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Unweighted loss of each sample.

    Args:
        model: ``(latents, timestep, text) -> velocity``, in any precision.
        x0: latents ``[B,C,T,H,W]``.
        noise: fp32, like ``x0``.
        sigma: ``[B]`` in [0, 1].
        text: ``[B,S,E]``.

    Returns:
        fp32 ``[B]``, mean squared velocity error over C, T, H, W.
    """
    sigma = sigma.to(x0.device)
    velocity = model(interpolate(x0, noise, sigma), FlowSchedule.training_timestep(sigma), text)
    return (velocity.float() - (noise - x0.float())).square().flatten(1).mean(1)


def loss_weight(config: FlowLossConfig, schedule: FlowSchedule, sigma: Tensor) -> Tensor:
    """w(sigma), fp32, shaped like ``sigma``."""
    if config.weight == "none":
        return torch.ones_like(sigma, dtype=torch.float32)
    lowest, mean = _bell_moments(schedule)
    return ((_bell(sigma) - lowest) / mean).float()


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma.double() - 0.5) ** 2)


@cache
def _bell_moments(schedule: FlowSchedule) -> tuple[float, float]:
    """Minimum of the bell, and mean of the bell above it, on the shifted grid of 1000 steps."""
    grid = schedule.shift(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1])
    bell = _bell(grid)
    return float(bell.min()), float((bell - bell.min()).mean())
