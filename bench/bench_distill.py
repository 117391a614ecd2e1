"""The parts of self-forcing on the miniature's shapes, and the replayed backward against the joint graph of all chunks.

``extra_info.gflop`` is the arithmetic of :mod:`distill_cost`. As in :mod:`bench_dit` the two ways of a student's step
take turns in one run: ``ratio`` is replayed / joint, rollout included, ``expected`` the same by arithmetic, ``kept_mb``
and ``joint_kept_mb`` what one chunk's backward and the joint one keep of their forwards.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from reelforge.bench import distill_backward as backward
from reelforge.bench import distill_world
from reelforge.bench.distill_records import networks
from reelforge.bench.distill_world import STEPS, World
from reelforge.bench.miniature import CASES, Case
from reelforge.engine.distill.dmd import distribution_gradient
from reelforge.engine.distill.pairs import trajectory, trajectory_grids
from reelforge.engine.flow.sampler import guided
from reelforge.engine.train.flow_loss import flow_losses

ROUNDS, SUBSTEPS = 5, 1
SIGMA = 0.5
Prepared = tuple[Callable[[], object], nn.Module | None, float]  # a call, whose gradient it leaves, its FLOPs


def rollout(world: World) -> Prepared:
    exits = backward.exits_of(world)
    return lambda: backward.rolled(world, exits), None, world.layout.rollout(networks(world)[0], exits)


def replayed_backward(world: World) -> Prepared:
    found, towards = backward.rolled(world, backward.exits_of(world)), backward.direction(world)
    counted = sum(world.layout.replays(networks(world)[0]))
    return lambda: backward.replayed_backward(world, found, towards), world.student.model, counted


def joint_rollout_and_backward(world: World) -> Prepared:
    exits, towards, student = backward.exits_of(world), backward.direction(world), networks(world)[0]
    both = world.layout.rollout(student, exits) + sum(world.layout.replays(student))
    counted = both / world.layout.extra(student, exits)
    return lambda: backward.joint_backward(world, exits, towards), world.student.model, counted


def critic_step(world: World) -> Prepared:
    x, noise = samples(world)
    sigma = torch.full((world.batch,), SIGMA)

    def run() -> None:
        flow_losses(world.critic, x, noise, sigma, world.text[:-1]).mean().backward()

    return run, world.critic, world.layout.critic_step(networks(world)[1])


def scores(world: World) -> Prepared:
    """Teacher, guided, and critic."""
    x, noise = samples(world)
    text, sigma = world.text[:-1], torch.full((world.batch,), SIGMA)
    teacher = guided(world.teacher, text, world.text[-1:].expand_as(text), world.guidance)
    _, critic, judge = networks(world)
    counted = 2 * world.layout.whole(judge) + world.layout.whole(critic)

    def criticise(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return world.critic(x_t, timestep, text)

    return lambda: distribution_gradient(x, teacher, criticise, sigma, noise), None, counted


def ode_pairs(world: World) -> Prepared:
    noise, _ = samples(world)
    text = world.text[:-1]
    teacher = guided(world.teacher, text, world.text[-1:].expand_as(text), world.guidance)
    grids = trajectory_grids(world.schedule, STEPS, SUBSTEPS)
    counted = world.layout.pairs(networks(world)[2], len(STEPS) * SUBSTEPS, branches=2)
    return lambda: trajectory(teacher, noise, grids, "euler"), None, counted


def samples(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, world.batch, *world.student.shape, generator=torch.Generator().manual_seed(0))
    return drawn[0], drawn[1]


WORKS = (rollout, replayed_backward, joint_rollout_and_backward, critic_step, scores, ode_pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def bench_part(benchmark: BenchmarkFixture, work: Callable[[World], Prepared], case: Case) -> None:
    call, model, flops = work(distill_world.from_case(case))

    def fresh() -> None:
        if model is not None:
            backward.drop_gradient(model)

    benchmark.pedantic(call, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["gflop"] = round(flops / 1e9, 2)
    benchmark.extra_info["gflop_per_s"] = round(flops / 1e9 / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_replay_against_joint_graph(benchmark: BenchmarkFixture, case: Case) -> None:
    world = distill_world.from_case(case)
    found = benchmark.pedantic(backward.compare, args=(world, ROUNDS), rounds=1)
    benchmark.extra_info["ratio"] = round(found.replayed_s / found.joint_s, 3)
    benchmark.extra_info["expected"] = round(found.expected, 3)
    benchmark.extra_info["kept_mb"] = round(found.replayed_bytes / 1e6, 2)
    benchmark.extra_info["joint_kept_mb"] = round(found.joint_bytes / 1e6, 2)
