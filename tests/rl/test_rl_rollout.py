"""Rollouts with shared prefixes against a naive one: every member alone, from its noise to x0, by the formulas."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.flow import sde
from reelforge.engine.flow.sampler import initial_noise, sample_ode
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.rl.plan import Group, PlanConfig, evaluations
from reelforge.engine.rl.policy import TrainingPath
from reelforge.engine.rl.rollout import Rollout, Sampler

CPU = torch.device("cpu")
ITERATION = 3
# Groups whose steps differ, the first and the last step of the schedule among them.
RAGGED = (Group(2, (0,), (0,)), Group(5, (3,), (3,)), Group(0, (1,), (1,)), Group(7, (4,), (4,)), Group(3, (1,), (1,)))
SEVERAL = (Group(2, (1, 2, 3), (1, 3)), Group(5, (0, 4), (4,)), Group(1, (2, 3), (2, 3)))
PLANS = [PlanConfig(group_size=4, distinct_noise=m, steps=(0, 5)) for m in (1, 2, 4)]
EXACT = {"sample_rows": 1, "train_rows": 1, "dtype": torch.float64}


class Polynomial:
    """A velocity of additions and multiplications alone, which round alike in every batch; counts what it is asked."""

    def __init__(self) -> None:
        self.sampled: list[int] = []
        self.trained: list[int] = []

    def velocity(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        rows = torch.tensor(prompts, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        return 0.3 * x - 0.02 * x * x * x + 0.1 * rows + (1e-3 * timestep.to(x.dtype)).view(-1, 1, 1, 1, 1)

    def sample(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        self.sampled.append(len(x))
        return self.velocity(x, timestep, prompts)

    def detached_train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        self.trained.append(len(x))
        return self.velocity(x, timestep, prompts)

    def path(self, rows: int) -> TrainingPath:
        return TrainingPath(rows, torch.float64, None, 0, True, ())


def naive(actor, sampler: Sampler, group: Group, member: int) -> list[Tensor]:
    """One member's states at all steps and its x0, by the formulas of :mod:`engine.flow.sde`."""
    plan, name = sampler.config, sampler.prompt_ids[group.prompt]
    noise = member * plan.distinct_noise // plan.group_size
    x = rng.normal([rng.key("x_T", sampler.seed, ITERATION, name, noise)], sampler.shape).to(sampler.dtype)
    states = [x]
    for k, timestep in enumerate(sampler.grid.timesteps.tolist()):
        ask = actor.detached_train if k in group.trained else actor.sample
        velocity = ask(x, torch.tensor([timestep]), [group.prompt]).to(x.dtype)
        if k in group.stochastic:
            z = rng.normal([rng.key("step", sampler.seed, ITERATION, name, member, k)], sampler.shape)
            at = sde.coefficients(sampler.grid, [k], sampler.rate)
            x = at.a.to(x) * x + at.b.to(x) * velocity + at.std.to(x) * z.to(x)
        else:
            x = x + (sampler.grid.sigmas[k + 1] - sampler.grid.sigmas[k]).to(x) * velocity
        states.append(x)
    return states


def roll_out(actor, sampler: Sampler, groups: Sequence[Group], slots: Sequence[int] | None = None) -> Rollout:
    return sampler.run(actor, groups, slots or range(len(groups)), ITERATION, CPU)


def all_naive(actor, sampler: Sampler, groups: Sequence[Group]) -> list[list[Tensor]]:
    """By sample number."""
    return [naive(actor, sampler, group, m) for group in groups for m in range(sampler.config.group_size)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"M={plan.distinct_noise}")
@pytest.mark.parametrize("groups", [RAGGED, SEVERAL], ids=["one step", "several steps"])
@pytest.mark.parametrize("rate", [NoiseRate("trunc"), NoiseRate("wan"), NoiseRate("cps", 0.7)], ids=lambda r: r.kind)
def test_equals_the_naive_rollout_bit_for_bit(parts, plan: PlanConfig, groups, rate: NoiseRate) -> None:
    """In batches of any rows; ragged over groups with different steps; every state that is trained among them."""
    for rows in (1, 3, 64):
        sampler = parts.sampler(plan, rate, sample_rows=rows, train_rows=rows, dtype=torch.float64)
        found = roll_out(Polynomial(), sampler, groups)
        expected = all_naive(Polynomial(), sampler, groups)
        assert found.latents.dtype == torch.float64
        assert torch.equal(found.latents, torch.cat([states[-1] for states in expected]))
        check_decisions(found, sampler, groups, expected)


def check_decisions(found: Rollout, sampler: Sampler, groups: Sequence[Group], expected: list[list[Tensor]]) -> None:
    """Every trained step of every member is in one decision, with the state and the noise of its naive rollout."""
    size = sampler.config.group_size
    seen = []
    for decision in found.decisions:
        k, offsets = decision.step, decision.offsets.tolist()
        assert len(decision.x) == len(decision.velocity) == len(decision.prompts) == len(decision.timestep)
        assert len(decision.x) <= sampler.train_rows and offsets[0] == 0 and offsets[-1] == len(decision.keys)
        assert (decision.timestep == sampler.grid.timesteps[k]).all()
        at = sde.coefficients(sampler.grid, [k], sampler.rate)
        for state, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            shared = size // sampler.config.distinct_noise
            members = decision.members[first:end].tolist()
            group = groups[members[0] // size]
            assert len(members) == (shared if k == group.stochastic[0] else 1)
            assert decision.prompts[state] == group.prompt and k in group.trained
            for member, key in zip(members, decision.keys[first:end].tolist(), strict=True):
                assert groups[member // size] is group
                own = expected[member]
                assert torch.equal(decision.x[state], own[k][0])
                z = rng.normal([key], sampler.shape)
                left = sde.step(decision.x[state : state + 1], decision.velocity[state : state + 1], at, z)
                assert torch.equal(left, own[k + 1])
                seen.append((member, k))
    assert sorted(seen) == sorted(
        (place * size + member, k) for place, g in enumerate(groups) for member in range(size) for k in g.trained
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [RAGGED, SEVERAL], ids=["one step", "several steps"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"M={plan.distinct_noise}")
def test_the_transformer_row_by_row_bit_for_bit(parts, tiny, plan: PlanConfig, groups, dtype: torch.dtype) -> None:
    policy = parts.policy(tiny(0, dtype))
    policy.prepare(range(parts.prompts))
    sampler = parts.sampler(plan, sample_rows=1, train_rows=1, dtype=dtype)
    found = roll_out(policy, sampler, groups)
    expected = all_naive(policy, sampler, groups)
    assert torch.equal(found.latents, torch.cat([states[-1] for states in expected]))
    check_decisions(found, sampler, groups, expected)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"M={plan.distinct_noise}")
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_transformer_in_batches(parts, plan: PlanConfig, scale: float) -> None:
    """fp32: another batch rounds otherwise, by 1e-6 of the largest element."""
    policy = parts.policy(path=dataclasses.replace(parts.policy().config, guidance_scale=scale))
    policy.prepare(range(parts.prompts))
    batched = roll_out(policy, parts.sampler(plan, sample_rows=7, train_rows=3), RAGGED)
    expected = torch.cat([states[-1] for states in all_naive(policy, parts.sampler(plan), RAGGED)])
    assert (batched.latents - expected).abs().max() < 1e-6 * expected.abs().max()


def test_members_differ_only_by_the_noise_of_the_step(parts) -> None:
    sampler = parts.sampler(PLANS[0], **EXACT)
    latents = roll_out(Polynomial(), sampler, RAGGED).latents.unflatten(0, (len(RAGGED), 4))
    assert all((latents[:, 0] - latents[:, m]).abs().amax() > 0.01 for m in (1, 2, 3))
    starts = [naive(Polynomial(), sampler, RAGGED[0], member)[0] for member in range(4)]
    assert all(torch.equal(starts[0], start) for start in starts)
    apart = parts.sampler(PLANS[2], **EXACT)
    starts = [naive(Polynomial(), apart, RAGGED[0], member)[0] for member in range(4)]
    assert len({start[0, 0, 0, 0, 0].item() for start in starts}) == 4


def test_a_group_depends_neither_on_its_batch_nor_on_its_place(parts) -> None:
    sampler = parts.sampler(PLANS[1], **EXACT)
    together = roll_out(Polynomial(), sampler, RAGGED)
    order = [3, 1, 4, 0, 2]
    mixed = roll_out(Polynomial(), sampler, [RAGGED[place] for place in order], order)
    for row, place in enumerate(order):
        alone = roll_out(Polynomial(), sampler, RAGGED[place : place + 1], [place])
        expected = together.latents[4 * place : 4 * place + 4]
        assert torch.equal(alone.latents, expected)
        assert torch.equal(mixed.latents[4 * row : 4 * row + 4], expected)
        ours = {tuple(decision.members.tolist()): decision for decision in together.decisions}
        own = [decision for decision in mixed.decisions if decision.prompts == (RAGGED[place].prompt,)]
        assert len(own) == len(alone.decisions) == 2
        for decision in (*own, *alone.decisions):
            twin = ours[tuple(decision.members.tolist())]
            assert torch.equal(twin.keys, decision.keys) and torch.equal(twin.x, decision.x)


def test_another_iteration_and_another_seed_draw_other_noise(parts) -> None:
    sampler = parts.sampler(PLANS[0], **EXACT)
    first = roll_out(Polynomial(), sampler, RAGGED).latents
    for other in (
        sampler.run(Polynomial(), RAGGED, range(5), ITERATION + 1, CPU),
        roll_out(Polynomial(), dataclasses.replace(sampler, seed=6), RAGGED),
    ):
        assert (other.latents - first).flatten(1).abs().amax(1).min() > 0.1


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"M={plan.distinct_noise}")
def test_without_noise_it_is_the_euler_solver(parts, plan: PlanConfig) -> None:
    sampler = parts.sampler(plan, sde.ODE, **EXACT)
    found = roll_out(Polynomial(), sampler, RAGGED).latents.unflatten(0, (len(RAGGED), -1))
    each = plan.group_size // plan.distinct_noise
    for latents, group in zip(found, RAGGED, strict=True):
        ids = [sampler.prompt_ids[group.prompt]] * plan.group_size
        noise = initial_noise(sampler.seed, ids, [m // each for m in range(4)], sampler.shape, ITERATION).double()
        velocity = Polynomial().velocity
        solved = sample_ode(lambda x, t, p=group.prompt: velocity(x, t, [p] * len(x)), noise, sampler.grid, "euler")  # noqa: B023
        assert torch.equal(latents, solved)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"M={plan.distinct_noise}")
def test_evaluations_are_counted_and_are_what_the_plan_says(parts, plan: PlanConfig) -> None:
    for group in (*RAGGED, *SEVERAL, *(Group(0, (k,), (k,)) for k in range(5))):
        actor = Polynomial()
        found = roll_out(actor, parts.sampler(plan, sample_rows=2), [group])
        assert found.evaluations == sum(actor.sampled) + sum(actor.trained) == evaluations(group, plan, 5)
    actor = Polynomial()
    found = roll_out(actor, parts.sampler(plan, sample_rows=6, train_rows=2), RAGGED)
    assert found.evaluations == sum(evaluations(group, plan, 5) for group in RAGGED)
    assert max(actor.sampled) <= 6 and max(actor.trained) <= 2
    assert sum(actor.trained) == plan.distinct_noise * len(RAGGED), "one training forward a state"
    if plan.distinct_noise == 1:
        assert evaluations(RAGGED[1], plan, 5) == (3 + 1) + 4 * (5 - 1 - 3)
