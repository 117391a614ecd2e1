"""One stochastic step: every published noise rate, as coefficients of x' = a x + b v + std z.

The reverse SDE with the ODE's marginals, dx = (v - s^2/2 score) dsigma + s dW with
score = -(x + (1 - sigma) v) / sigma, discretised by Euler-Maruyama with delta = sigma - sigma' > 0:

    a = 1 - s^2 delta / (2 sigma)    b = -delta (1 + s^2 (1 - sigma) / (2 sigma))    std = s sqrt(delta)

A noise rate is a choice of s; s = 0 is the Euler step of the ODE. ``cps`` has coefficients of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.schedule import Grid
from reelforge.kernels.group_loss import LogRatio, RatioForm, log_ratio
from reelforge.kernels.sde_replay import mean_product, velocity_terms
from reelforge.kernels.sde_step import sde_step


@dataclass(frozen=True)
class NoiseRate:
    """How much noise a step injects.

    Attributes:
        kind: ``flow`` s = eta sqrt(sigma / (1 - sigma)) (Flow-GRPO, eta 0.7);
            ``dance`` s = eta (DanceGRPO, eta 0.3; MixGRPO, eta 0.7 within a window);
            ``wan`` s = eta sigma_1 sigma (Flow-GRPO's Wan patch, eta 1);
            ``trunc`` the flow rate with std at most ``cap`` (LongCat-Video, eta 1);
            ``cps`` std = sigma' sin(eta pi / 2) (Flow-CPS): it keeps x0 + noise consistent, yet narrows the
            distribution when every step uses it, however many there are.
        eta: strength; 0 is the ODE for every kind.
        cap: largest std of ``trunc``.

    Raises:
        ConfigError: a negative eta, a cps eta above 1, or a cap that is not positive.
    """

    kind: Literal["flow", "dance", "wan", "trunc", "cps"] = "trunc"
    eta: float = 1.0
    cap: float = 0.45

    def __post_init__(self) -> None:
        most = 1.0 if self.kind == "cps" else math.inf
        if not 0.0 <= self.eta <= most:
            raise ConfigError(f"eta of noise rate {self.kind!r} is {self.eta}.", f"Choose it in [0, {most}].")
        if not self.cap > 0.0:
            raise ConfigError(f"cap is {self.cap}.", "It is a standard deviation: choose it above 0.")


ODE = NoiseRate("dance", eta=0.0)
RENOISE = NoiseRate("cps", eta=1.0)  # x' = (1 - sigma') x0_hat + sigma' z: the few-step sampler's step


@dataclass(frozen=True, eq=False)
class Coefficients:
    """x' = a x + b v + std z; float64 ``[B]`` each. ``s`` is the noise rate, std / sqrt(delta)."""

    a: Tensor
    b: Tensor
    std: Tensor
    s: Tensor

    @property
    def lambda_(self) -> Tensor:
        """Sensitivity |b| / std: a velocity change e moves the mean by -lambda std e. Infinite for the ODE."""
        return self.b.abs() / self.std

    def __getitem__(self, samples: slice | Tensor) -> "Coefficients":
        """Some of the samples'; a slice is a view."""
        return Coefficients(*(value[samples] for value in (self.a, self.b, self.std, self.s)))


def coefficients(grid: Grid, steps: Sequence[int], rate: NoiseRate) -> Coefficients:
    """The step's coefficients from the live schedule.

    Args:
        grid: the sampler's grid; sigmas never come from truncated timesteps.
        steps: one step index in [0, N) per sample.
        rate: the noise.
    """
    index = torch.tensor(list(steps))
    sigma, following = grid.sigmas[index], grid.sigmas[index + 1]
    delta = sigma - following
    if rate.kind == "cps":
        std = following * math.sin(rate.eta * math.pi / 2)
        kept = following * math.cos(rate.eta * math.pi / 2)
        b = (1 - sigma) * kept - sigma * (1 - following)
        return Coefficients((1 - following) + kept, b, std, std / delta.sqrt())
    s = _rate(grid, sigma, delta, rate)
    drift = s * s / (2 * sigma)
    return Coefficients(1 - drift * delta, -delta * (1 + drift * (1 - sigma)), s * delta.sqrt(), s)


@lru_cache(maxsize=16)
def step_table(grid: Grid, rate: NoiseRate, dtype: torch.dtype, device: torch.device) -> Coefficients:
    """The coefficients of all N steps, uploaded once: a step then takes a slice and copies nothing."""
    every = coefficients(grid, range(grid.num_steps), rate)
    return Coefficients(*(value.to(device, dtype) for value in (every.a, every.b, every.std, every.s)))


def _rate(grid: Grid, sigma: Tensor, delta: Tensor, rate: NoiseRate) -> Tensor:
    if rate.kind == "dance":
        return torch.full_like(sigma, rate.eta)
    if rate.kind == "wan":
        return rate.eta * grid.sigmas[1] * sigma
    # sigma_0 is 1 or just below it, where the rate explodes (s = 38 and a = -11.7 on unipc_flow, 20 steps, shift 3).
    s = rate.eta * (sigma / (1 - sigma.minimum(grid.sigmas[1]))).sqrt()
    return s.minimum(rate.cap / delta.sqrt()) if rate.kind == "trunc" else s


def sde_lambda(grid: Grid, steps: Sequence[int], rate: NoiseRate) -> Tensor:
    """Sensitivity of each step, float64 ``[B]``; its inverse is temporal gradient rectification's weight."""
    return coefficients(grid, steps, rate).lambda_


def step(x: Tensor, velocity: Tensor, at: Coefficients, noise: Tensor) -> Tensor:
    """One stochastic step ``[B,...]`` with standard normal ``noise``."""
    return sde_step(x, velocity, at.a, at.b, at.std, noise)


def mean(x: Tensor, velocity: Tensor, at: Coefficients) -> Tensor:
    """The mean of :func:`step`; under :data:`ODE` the deterministic step itself."""
    return sde_step(x, velocity, at.a, at.b, at.std, None)


def log_prob(x_next: Tensor, x_mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density per element, its mean over a sample's elements: float64 ``[B]``.

    mean[-(x' - mu)^2 / (2 std^2)] - ln std - ln(2 pi) / 2, for every kind.
    """
    scaled = unscaled_log_prob(x_next, x_mean) / (2 * std**2)
    return scaled - std.log() - 0.5 * math.log(2 * math.pi)


def unscaled_log_prob(x_next: Tensor, x_mean: Tensor) -> Tensor:
    """Flow-CPS's -mean (x' - mu)^2, float64 ``[B]``: not a log-density. Its ratios and clip ranges differ from
    :func:`log_prob`'s by 1 / (2 std^2)."""
    residual = x_next - x_mean
    return -mean_product(residual, residual)


def velocity_log_ratio(
    velocity: Tensor,
    velocity_old: Tensor,
    noise: Tensor,
    lambda_: Tensor,
    form: RatioForm = "exact",
) -> LogRatio:
    """log p_theta(x') - log p_old(x') of a step x' = mu_old + std z, without x' and without cancellation.

    Args:
        velocity, velocity_old: ``[B,...]``, or ``[1,...]`` for a group that shares its state; equal ones give 0.
        noise: z, ``[B,...]``.
        lambda_: :attr:`Coefficients.lambda_`, ``[B]`` or ``[1]``.
        form: see :func:`reelforge.kernels.group_loss.log_ratio`, where the formula is.
    """
    return log_ratio(velocity_terms(velocity, velocity_old, noise), lambda_, form)
