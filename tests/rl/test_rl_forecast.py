"""What a plan says a run takes, against what its rollouts do take."""

import pytest
import torch

from reelforge.bench.rl_forecast import Forecast, Rates, memory, probe, trained_states, work
from reelforge.engine.rl.plan import Group, PlanConfig, Planner

RATES = Rates(row_s=0.5, train_s=4.0, decode_s=1.0, velocity_bytes=100, peak_bytes=0)


@pytest.mark.parametrize("distinct_noise", [1, 2, 4])
def test_a_groups_states(distinct_noise):
    config = PlanConfig(group_size=4, distinct_noise=distinct_noise)
    assert trained_states(Group(0, (1,), (1,)), config) == distinct_noise
    assert trained_states(Group(0, (1, 2, 3), (1, 3)), config) == distinct_noise + 4
    assert trained_states(Group(0, (1, 2, 3), (2, 3)), config) == 8


@pytest.mark.parametrize("stochastic", ["one", "all", "window"])
def test_work_is_what_the_sampler_does(parts, stochastic):
    """Rows and states against those of real rollouts, iteration by iteration."""
    config = PlanConfig(4, 2, (0, 4), stochastic, window=2, window_iterations=1, trained_share=0.7)
    planner = Planner(config, 0, parts.prompts, 4, parts.num_steps)
    policy, sampler = parts.policy(), parts.sampler(config, train_rows=3)
    rows, states, forwards = [], [], []
    for number in range(3):
        groups = planner.iteration(number)
        policy.prepare([group.prompt for group in groups])
        rolled = [
            sampler.run(policy, [groups[slot] for slot in part], part, number, policy.device)
            for own in [planner.share(number, 0, 1)]
            for part in (own[:2], own[2:])
        ]
        rows.append(sum(each.evaluations for each in rolled))
        states.append(sum(len(decision.x) for each in rolled for decision in each.decisions))
        forwards.append(sum(len(each.decisions) for each in rolled))
    found = work(planner, 3, policy.branches, 1, batch_groups=2, train_rows=3)
    assert found.rows == pytest.approx(policy.branches * sum(rows) / 3)
    assert found.trained_states == pytest.approx(sum(states) / 3)
    assert found.states_per_forward == pytest.approx(sum(states) / sum(forwards))
    assert found.independent_rows == policy.branches * 4 * 4 * parts.num_steps
    assert (found.busiest_rows, found.busiest_clips) == (found.rows, 16)


def test_shared_prefixes_save_what_the_formula_says():
    """(K + 1) / 2 (G - 1) / (G T) for k uniform in K steps: 24.1 % at T = 20, G = 8, K = 10."""
    planner = Planner(PlanConfig(8, steps=(0, 10)), 0, 96, 48, 20)
    assert work(planner, 64, 2, 1, 1, 1).saved == pytest.approx(11 / 2 * 7 / 160, abs=1e-9)  # pairs make it exact
    half = work(planner, 64, 2, 8, 1, 1)
    assert half.busiest_rows == pytest.approx(half.rows / 8) and half.busiest_clips == 48


def test_seconds_and_hours_by_hand():
    planner = Planner(PlanConfig(4, steps=(0, 1)), 0, 8, 4, 2)
    todo = work(planner, 5, 2, 2, 1, 1)
    assert (todo.busiest_rows, todo.busiest_states, todo.busiest_clips) == (2 * 2 * (1 + 4), 2, 8)
    found = Forecast(5, 3, 2, todo, {}, RATES, reference_rows=4, held_out_rows=100)
    seconds = 20 * 0.5 + 3 * (2 * 4.0 + 4 * 0.5) + 8 * 1.0
    assert found.iteration_s == seconds
    assert found.device_hours == pytest.approx((5 * 2 * seconds + 50) / 3600)
    assert found.facts()["iteration_s"] == seconds


def test_the_probe_leaves_no_trace(parts):
    policy = parts.policy()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    rates = probe(policy, lambda latents: latents.clone(), parts.shape, 4, 2)
    assert min(rates.row_s, rates.train_s, rates.decode_s) > 0
    assert rates.velocity_bytes == 4 * torch.Size(parts.shape).numel() and rates.peak_bytes == 0
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    planner = Planner(PlanConfig(4, steps=(0, 2)), 0, 8, 4, 5)
    todo = work(planner, 1, 1, 1, 1, 1)
    sizes = memory(policy, list(policy.model.parameters())[:1], todo, rates, parts.shape)
    assert sizes["states"] == 4 * 2 * rates.velocity_bytes
    assert sizes["weights"] == sum(p.nbytes for p in policy.model.parameters())
    assert sizes["adam"] == 2 * sizes["average"] == 2 * next(iter(policy.model.parameters())).nbytes
