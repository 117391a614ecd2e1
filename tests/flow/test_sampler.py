"""Sampling loops: what the network is asked, and what comes out."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.errors import Interrupted
from reelforge.engine.flow.sampler import (
    few_step_state,
    guided,
    initial_noise,
    predict_x0,
    sample_few_step,
    sample_ode,
    step_keys,
    timesteps,
)
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.solver import SolverName

SHAPE = (2, 3, 4, 4)


def network(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Stands for the transformer: each sample depends on its own inputs alone."""
    bias = text.mean((1, 2)).view(-1, 1, 1, 1, 1)
    return torch.tanh(x + bias) * (timestep / 1000).view(-1, 1, 1, 1, 1)


def test_euler_is_the_plain_loop() -> None:
    grid = FlowSchedule("unipc_flow", 3.0).grid(9)
    text = torch.ones(2, 5, 6)
    noise = initial_noise(0, [0, 1], [0, 0], SHAPE)
    x = noise.clone()
    for k in range(9):
        told = torch.full((2,), float(int(1000 * grid.sigmas[k])))
        x = x + float(grid.sigmas[k + 1] - grid.sigmas[k]) * network(x, told, text)
    ours = sample_ode(lambda x, t: network(x, t, text), noise, grid, "euler")
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_result_does_not_depend_on_the_batch_split(solver: SolverName) -> None:
    grid = FlowSchedule("unipc_flow", 5.0).grid(6)
    text = initial_noise(1, [0, 1, 2], [0, 0, 0], (5, 6))
    noise = initial_noise(0, [0, 1, 2], [0, 0, 0], SHAPE)
    whole = sample_ode(lambda x, t: network(x, t, text), noise, grid, solver)
    for i in range(3):
        alone = sample_ode(lambda x, t, i=i: network(x, t, text[i : i + 1]), noise[i : i + 1], grid, solver)
        assert torch.equal(alone, whole[i : i + 1])


def test_state_stays_float32_and_leaves_the_noise_alone() -> None:
    grid = FlowSchedule("unipc_flow", 5.0).grid(4)
    noise = initial_noise(0, [0], [0], SHAPE).bfloat16().requires_grad_()
    before = noise.detach().clone()
    seen = []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x.dtype, timestep.dtype, tuple(timestep.shape)))
        return x.bfloat16()

    x0 = sample_ode(velocity, noise, grid)
    assert x0.dtype == torch.float32
    assert not x0.requires_grad
    assert torch.equal(noise, before)
    assert set(seen) == {(torch.float32, torch.float32, (1,))}


def test_few_step_renoises_the_prediction() -> None:
    grid = FlowSchedule("unipc_flow", 5.0).few_step((1000, 750, 500, 250))
    noise = initial_noise(3, [4, 5], [0, 0], SHAPE)
    told: list[float] = []

    def student(x: Tensor, timestep: Tensor) -> Tensor:
        told.append(timestep[0].item())
        return torch.sin(x) + timestep.view(-1, 1, 1, 1, 1) / 1000

    keys = step_keys(3, [4, 5], [0, 0], 3)

    def fresh(k: int) -> Tensor:
        return rng.normal(keys[k], SHAPE)

    ours = sample_few_step(student, noise, grid, fresh)
    assert told == pytest.approx([1000.0, 937.5, 833.3333, 625.0])
    x, sigmas = noise.double(), [1.0, 15 / 16, 5 / 6, 5 / 8]
    for k, sigma in enumerate(sigmas):
        x0 = x - sigma * (torch.sin(x) + sigma)
        x = x0 if k == 3 else (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * fresh(k).double()
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-5)


def test_a_state_is_what_the_few_step_sampler_shows_the_student() -> None:
    """Bit for bit, at every step; the steps before it are run, it and later ones are not."""
    grid, noise = FlowSchedule("unipc_flow", 5.0).few_step((1000, 750, 500, 250)), initial_noise(3, [4], [0], SHAPE)
    shown: list[Tensor] = []

    def student(x: Tensor, timestep: Tensor) -> Tensor:
        shown.append(x)
        return torch.sin(x) + timestep.view(-1, 1, 1, 1, 1) / 1000

    fresh = [initial_noise(9, [k], [0], SHAPE) for k in range(3)]
    x0 = sample_few_step(student, noise, grid, lambda k: fresh[k])
    states = list(shown)
    for step, expected in enumerate(states):
        shown.clear()
        done: list[int] = []
        state = few_step_state(student, noise, grid, lambda k: fresh[k], step, done.append)
        assert torch.equal(state, expected) and len(shown) == step and done == list(range(1, step + 1))
    assert torch.equal(predict_x0(state, student(state, timesteps(grid, 3, state)), grid, 3), x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prediction_has_the_states_dtype_and_a_gradient(dtype: torch.dtype) -> None:
    grid = FlowSchedule("unipc_flow", 5.0).few_step((1000, 750, 500, 250))
    x = initial_noise(0, [0], [0], SHAPE).to(dtype).requires_grad_()
    velocity = initial_noise(1, [0], [0], SHAPE).bfloat16().requires_grad_()
    x0 = predict_x0(x, velocity, grid, 2)  # sigma = 5/6
    torch.testing.assert_close(x0, x - 5 / 6 * velocity.to(dtype))
    x0.sum().backward()
    assert x0.dtype == dtype and torch.all(x.grad == 1)
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, -5 / 6))


def test_guidance_is_one_forward_of_twice_the_batch() -> None:
    text, negative = torch.ones(2, 5, 6), torch.full((2, 5, 6), -0.5)
    x, timestep = initial_noise(0, [0, 1], [0, 0], SHAPE), torch.tensor([900.0, 500.0])
    batches = []

    def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        batches.append(len(x))
        return network(x, timestep, text)

    v_cond, v_uncond = network(x, timestep, text), network(x, timestep, negative)
    velocity = guided(call, text, negative, 4.5)(x, timestep)
    torch.testing.assert_close(velocity, v_uncond + 4.5 * (v_cond - v_uncond))
    assert batches == [4]
    assert torch.equal(guided(call, text, negative, 1.0)(x, timestep), v_cond)
    assert batches == [4, 2]


def test_a_run_reports_its_steps_and_can_be_cancelled() -> None:
    grid = FlowSchedule("euler", 1.0).grid(5)
    noise = initial_noise(0, [0], [0], SHAPE)
    done: list[int] = []
    sample_ode(lambda x, _: x, noise, grid, "unipc", done.append)
    assert done == [1, 2, 3, 4, 5]

    def stop(steps: int) -> None:
        if steps == 2:
            raise Interrupted("Sampling was cancelled.", "Start it again.")

    with pytest.raises(Interrupted):
        sample_few_step(lambda x, _: x, noise, grid, lambda _: noise, stop)


def test_noise_is_named_by_prompt_and_member_not_by_place() -> None:
    whole = initial_noise(7, [10, 10, 11], [0, 1, 0], SHAPE)
    assert torch.equal(initial_noise(7, [11, 10], [0, 1], SHAPE), whole[[2, 1]])
    names = [(7, [10], [0], SHAPE), (8, [10], [0], SHAPE), (7, [0], [10], SHAPE), (7, [10], [0], SHAPE, 1)]
    draws = [initial_noise(*name) for name in names]
    draws += [rng.normal(keys, SHAPE) for keys in step_keys(7, [10], [0], 2)]
    assert len({draw.sum().item() for draw in draws}) == len(draws)
    stacked = torch.stack(draws).flatten(1)
    correlation = torch.corrcoef(stacked) - torch.eye(len(draws))
    assert correlation.abs().max() < stats.norm.ppf(1 - 1e-5) / stacked.shape[1] ** 0.5
