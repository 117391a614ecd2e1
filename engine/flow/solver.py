"""ODE solvers: each owns the state of one sampling run and advances it by one velocity at a time.

With flow matching's alpha = 1 - sigma a data-prediction step is a blend: with r = sigma' / sigma,

    x' = r x + (1 - r) D

where D estimates x0 over the step. D = x0_hat = x - sigma v is the Euler step. UniPC (Zhao et al. 2023;
order 2, B2(h)) extrapolates x0_hat in the log-SNR L = log((1 - sigma) / sigma) for its predictor, and, once the
velocity at the new point is known, redoes the step with it (the corrector): no further network evaluation.
"""

import math
from typing import Literal, Protocol

from torch import Tensor

from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import Grid
from reelforge.kernels.sde_step import fork

SolverName = Literal["euler", "unipc"]
_ALMOST_NOISE = 1 - 1e-6  # L(1) is infinite; diffusers' bound


class Solver(Protocol):
    """Advances one batch along one grid."""

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        """From the current sigma to the next; ``velocity`` is the network's answer at ``x`` ``[B,...]``."""
        ...


class Euler:
    """The sampler step without noise."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._k = 0

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        at = sde.step_table(self._grid, sde.ODE, x.dtype, x.device)[self._k : self._k + 1]
        self._k += 1
        return fork(x, velocity, *(value.expand(len(x)) for value in (at.a, at.b, at.std))).x


class UniPC:
    """UniPC of order 2, first order in the first and last step, as diffusers' ``UniPCMultistepScheduler`` with
    ``prediction_type="flow_prediction"``."""

    def __init__(self, grid: Grid) -> None:
        self._sigmas: list[float] = grid.sigmas.tolist()
        self._log_snr = [_log_snr(min(sigma, _ALMOST_NOISE)) for sigma in self._sigmas]
        self._k = 0
        self._x0: list[Tensor] = []  # x0_hat at steps k-2 and k-1
        self._start: Tensor | None = None  # where step k-1 began, after correction

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        x0 = x - self._sigmas[self._k] * velocity.to(x.dtype)
        if self._start is not None:
            x = self._advance(self._start, self._k - 1, self._corrected(x0))
        self._x0 = [*self._x0[-1:], x0]
        self._start = x
        self._k += 1
        return self._advance(x, self._k - 1, self._predicted())

    def _advance(self, x: Tensor, k: int, x0: Tensor) -> Tensor:
        ratio = self._sigmas[k + 1] / self._sigmas[k]
        return ratio * x + (1 - ratio) * x0

    def _second_order(self, k: int) -> bool:
        return 0 < k < len(self._sigmas) - 2

    def _spans(self, k: int) -> tuple[float, float]:
        """Log-SNR step h of step k, and its predecessor's as a (negative) multiple of it."""
        before, here, after = self._log_snr[k - 1 : k + 2]
        return after - here, (before - here) / (after - here)

    def _predicted(self) -> Tensor:
        k, x0 = self._k - 1, self._x0[-1]
        if not self._second_order(k):
            return x0
        _, back = self._spans(k)
        return x0 + 0.5 / back * (self._x0[-2] - x0)

    def _corrected(self, x0_next: Tensor) -> Tensor:
        k, x0 = self._k - 1, self._x0[-1]
        if not self._second_order(k):
            return x0 + 0.5 * (x0_next - x0)
        h, back = self._spans(k)
        # Weights that make the blend exact for x0_hat linear and quadratic in L.
        first = -1 / h - 1 / math.expm1(-h)
        second = -2 * first / h - 1 / math.expm1(-h)
        past = (second - first) / (back - 1)
        return x0 + past / back * (self._x0[-2] - x0) + (first - past) * (x0_next - x0)


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf


SOLVERS: dict[SolverName, type[Euler] | type[UniPC]] = {"euler": Euler, "unipc": UniPC}
