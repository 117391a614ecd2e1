"""Solvers against diffusers, and against an adaptive high-order integrator."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import UniPCMultistepScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from reelforge.engine.core.types import Velocity
from reelforge.engine.flow.sampler import sample_ode
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.flow.solver import SolverName

WEIGHT = np.random.Generator(np.random.Philox(key=7)).standard_normal((16, 16))
START = np.random.Generator(np.random.Philox(key=8)).standard_normal((2, 4, 1, 2, 2))


def random_field(dtype: torch.dtype) -> Velocity:
    """A nonlinear velocity that mixes all elements and depends on time; it answers in ``dtype``."""

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        mixed = x.double().flatten(1) @ torch.from_numpy(WEIGHT) + timestep.double()[:, None] / 300
        return (2 * torch.tanh(mixed)).view_as(x).to(dtype)

    return velocity


def diffusers_unipc(flow_shift: float, grid: Grid, dtype: torch.dtype, exact_sigmas: bool) -> Tensor:
    """diffusers' loop; its sigmas are float32 unless ours are put in their place."""
    schedule = FlowSchedule("unipc_flow", flow_shift)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, solver_order=2
    )
    scheduler.set_timesteps(sigmas=schedule.unshift(grid.sigmas[:-1]).numpy())
    if exact_sigmas:
        scheduler.sigmas = grid.sigmas
    x, velocity = torch.from_numpy(START).to(dtype), random_field(dtype)
    for told, ours in zip(scheduler.timesteps, grid.timesteps, strict=True):
        x = scheduler.step(velocity(x, ours.expand(2)), told, x).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0, 12.0])
def test_unipc_equals_diffusers(num_steps: int, flow_shift: float) -> None:
    grid = FlowSchedule("unipc_flow", flow_shift).grid(num_steps)
    for dtype, exact_sigmas, atol in (
        (torch.float64, True, 1e-12),
        (torch.float64, False, 1e-5),
        (torch.float32, False, 1e-5),
    ):
        ours = sample_ode(random_field(dtype), torch.from_numpy(START).to(dtype), grid, "unipc")
        theirs = diffusers_unipc(flow_shift, grid, dtype, exact_sigmas)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 30])
def test_unipc_from_pure_noise_is_bounded_as_diffusers_does(num_steps: int) -> None:
    """At sigma 1 the log-SNR is infinite: diffusers moves that sigma itself to 1 - 1e-6, we its log-SNR alone."""
    grid = FlowSchedule("euler", 5.0).grid(num_steps)
    moved = Grid(grid.sigmas.clamp(max=1 - 1e-6), grid.timesteps)
    velocity, noise = random_field(torch.float64), torch.from_numpy(START)
    ours = sample_ode(velocity, noise, moved, "unipc")
    torch.testing.assert_close(ours, diffusers_unipc(5.0, moved, torch.float64, True), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, sample_ode(velocity, noise, grid, "unipc"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_velocity_dtype_does_not_touch_the_state(solver: SolverName) -> None:
    grid = FlowSchedule("unipc_flow", 3.0).grid(6)
    noise = torch.from_numpy(START).float()
    brain = random_field(torch.bfloat16)
    low = sample_ode(brain, noise, grid, solver)
    high = sample_ode(lambda x, t: brain(x, t).float(), noise, grid, solver)
    assert low.dtype == torch.float32
    assert torch.equal(low, high)


def smooth_field(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.sin(1.3 * x + 2 * sigma) - 0.8 * x * np.cos(3 * sigma)


def global_error(solver: SolverName, num_steps: int) -> float:
    grid = FlowSchedule("euler", 2.0).grid(num_steps)

    sigma_of = dict(zip(grid.timesteps.tolist(), grid.sigmas.tolist(), strict=False))

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.from_numpy(smooth_field(x.numpy(), sigma_of[float(timestep[0])]))

    x0 = sample_ode(velocity, torch.from_numpy(START), grid, solver)
    exact = solve_ivp(
        lambda s, x: smooth_field(x, s), (1.0, 0.0), START.ravel(), method="DOP853", rtol=1e-12, atol=1e-12
    )
    return float(np.abs(x0.numpy().ravel() - exact.y[:, -1]).max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(solver: SolverName, order: int) -> None:
    coarse, fine = global_error(solver, 160), global_error(solver, 640)
    slope = np.log(coarse / fine) / np.log(4)
    assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_constant_x0_is_found_in_any_number_of_steps(solver: SolverName) -> None:
    """A straight path (one target) has no discretisation error: x0 = x - sigma v is right everywhere."""
    target = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 1, 2, 2)
    for num_steps in (1, 2, 5):
        grid = FlowSchedule("euler", 3.0).grid(num_steps)
        sigma_of = dict(zip(grid.timesteps.tolist(), grid.sigmas.tolist(), strict=False))
        x0 = sample_ode(lambda x, t, at=sigma_of: (x - target) / at[float(t)], torch.ones_like(target), grid, solver)
        torch.testing.assert_close(x0, target, rtol=0, atol=1e-12)
