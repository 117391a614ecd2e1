"""Noise schedules: which sigmas a sampler visits, and which timestep the network is told.

sigma in [0, 1] mixes x_sigma = (1 - sigma) x0 + sigma noise. A grid is an even walk u from noise to data, warped by
flow_shift s: sigma = s u / (1 + (s - 1) u). Two grids are in use and must not be mixed:

- ``unipc_flow``: u from 0.999 to 0, timestep = int(1000 sigma). Wan2.1's own UniPC, and diffusers'
  ``UniPCMultistepScheduler(use_flow_sigmas=True)`` before its default grid moved to u from 1 to 0.001. Newer
  versions give it through ``set_timesteps(sigmas=(1 - np.linspace(1, 0.001, N + 1))[::-1][:-1])``.
- ``euler``: u from 1 to 0, timestep = 1000 sigma (Wan2.1's ``get_sampling_sigmas``, DanceGRPO).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError

TIMESTEPS = 1000.0
Sigma = TypeVar("Sigma", float, Tensor)


@dataclass(frozen=True, eq=False)
class Grid:
    """The steps of one sampling run; step k goes from ``sigmas[k]`` to ``sigmas[k + 1]``.

    Attributes:
        sigmas: float64 ``[N+1]`` on the CPU, falling, the last one 0.
        timesteps: float32 ``[N]`` on the CPU, what the network is told at step k. A sigma is never derived from it.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def steps(self) -> list[tuple[float, float]]:
        """(sigma, timestep) of every step, as numbers: a sampling loop reads no tensor."""
        return list(zip(self.sigmas.tolist(), self.timesteps.tolist(), strict=False))


@dataclass(frozen=True)
class FlowSchedule:
    """A family of grids; usable as a recipe's table.

    Attributes:
        kind: which grid, see the module.
        flow_shift: warp towards noise, > 0; 1 is none. Wan2.1 uses 3 for 480p, 5 for 720p.

    Raises:
        ConfigError: ``flow_shift`` is not a positive number.
    """

    kind: Literal["unipc_flow", "euler"] = "unipc_flow"
    flow_shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.flow_shift < math.inf:
            raise ConfigError(f"flow_shift is {self.flow_shift}.", "It must be positive; Wan2.1 uses 3 to 12.")

    def shift(self, u: Sigma) -> Sigma:
        """Warp an even u in [0, 1] to sigma = s u / (1 + (s - 1) u); a tensor comes back in float64."""
        u = u.double() if isinstance(u, Tensor) else u
        return self.flow_shift * u / (1 + (self.flow_shift - 1) * u)

    def unshift(self, sigma: Sigma) -> Sigma:
        """The u that :meth:`shift` warps to ``sigma``: u = sigma / (s - (s - 1) sigma)."""
        sigma = sigma.double() if isinstance(sigma, Tensor) else sigma
        return sigma / (self.flow_shift - (self.flow_shift - 1) * sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What a sampler tells the network at ``sigma`` (any shape): float32, truncated under ``unipc_flow``."""
        scaled = sigma.double() * TIMESTEPS
        return (scaled.trunc() if self.kind == "unipc_flow" else scaled).float()

    @staticmethod
    def training_timestep(sigma: Tensor) -> Tensor:
        """What training tells the network at a continuous ``sigma`` (any shape): float32 1000 sigma."""
        return (sigma.double() * TIMESTEPS).float()

    def grid(self, num_steps: int) -> Grid:
        """The grid of ``num_steps`` steps.

        Raises:
            ConfigError: ``num_steps`` < 1.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps is {num_steps}.", "Sampling takes at least one step.")
        if self.kind == "euler":
            u = np.linspace(1.0, 0.0, num_steps + 1)
        else:
            # As 1 - alpha, like diffusers: where 1000 sigma is nearly whole, rounding decides the truncation.
            u = (1.0 - np.linspace(1.0, 1.0 / TIMESTEPS, num_steps + 1))[::-1].copy()
        sigmas = self.shift(torch.from_numpy(u))
        return Grid(sigmas, self.timestep(sigmas[:-1]))

    def few_step(self, denoising_steps: Sequence[float]) -> Grid:
        """The grid of a few-step student.

        Args:
            denoising_steps: unshifted timesteps, falling within (0, 1000], e.g. 1000, 750, 500, 250. At shift 5
                the network is told 1000, 937.5, 833.3, 625: never truncated, whatever ``kind`` is.

        Raises:
            ConfigError: the list is empty, not falling, or out of range.
        """
        steps = [float(step) for step in denoising_steps]
        fenced = [math.nextafter(TIMESTEPS, math.inf), *steps, 0.0]
        if not steps or not all(high > low for high, low in itertools.pairwise(fenced)):
            raise ConfigError(f"denoising_steps is {steps}.", "List falling timesteps in (0, 1000].")
        sigmas = self.shift(torch.tensor([*steps, 0.0], dtype=torch.float64) / TIMESTEPS)
        return Grid(sigmas, self.training_timestep(sigmas[:-1]))
