"""Two networks in turn: whose step it is, what each one's share is, and that a checkpoint brings both back."""

import math

import pytest
import torch
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.distill.turns import Turns
from reelforge.engine.io import checkpoint
from reelforge.engine.train.state import OptimizerConfig, TrainState

STUDENT = OptimizerConfig(lr=1e-2, warmup_steps=2, decay="linear", ema_decay=0.9, betas=(0.0, 0.99))
CRITIC = OptimizerConfig(lr=4e-2, warmup_steps=0, decay="cosine", ema_decay=0.0)
STEPS, RATIO = 12, 3


def network(seed: int) -> nn.Linear:
    built = nn.Linear(3, 2)
    for index, parameter in enumerate(built.parameters()):
        parameter.data.copy_(rng.normal([rng.key("turns", seed, index)], parameter.shape)[0])
    return built


def turns(seed: int = 0, steps: int = STEPS) -> Turns:
    mine, others = Turns.share(steps, RATIO)
    student, critic = (dict(network(seed + k).named_parameters()) for k in (0, 10))
    return Turns(TrainState(student, STUDENT, mine), TrainState(critic, CRITIC, others), RATIO)


def losses(state: Turns, step: int, scale: float = 1.0):
    """Of whoever's turn it is, in two pieces."""
    mine = Turns.is_students(step, RATIO)
    for piece in range(2):
        weight, bias = (state.student if mine else state.critic).parameters.values()
        target = rng.normal([rng.key("target", step, piece)], weight.shape)[0]
        yield scale * ((weight - target).square().sum() + bias.square().sum())


def flat(groups: dict) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": value.clone() for group, tensors in groups.items() for name, value in tensors.items()}


def test_the_student_comes_after_so_many_steps_of_the_critic() -> None:
    assert [Turns.is_students(step, 3) for step in range(9)] == [False] * 3 + [True] + [False] * 3 + [True, False]
    assert [Turns.is_students(step, 1) for step in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("critic_steps", [1, 3, 5])
def test_shares_count_the_turns(critic_steps: int) -> None:
    for steps in range(30):
        students = sum(Turns.is_students(step, critic_steps) for step in range(steps))
        assert Turns.share(steps, critic_steps) == (students, steps - students)


def test_a_step_moves_the_one_whose_turn_it_is_and_leaves_every_bit_of_the_other() -> None:
    state = turns()
    for step in range(2 * (RATIO + 1)):
        assert state.step == step
        before = [flat(one.groups()) for one in (state.student, state.critic)]
        state.optimizer_step(losses(state, step))
        after = [flat(one.groups()) for one in (state.student, state.critic)]
        moved = [
            any(name not in old or not torch.equal(old[name], new[name]) for name in new)
            for old, new in zip(before, after, strict=True)
        ]
        assert moved == [Turns.is_students(step, RATIO), not Turns.is_students(step, RATIO)]
    assert (state.student.step, state.critic.step) == (2, 6)


@pytest.mark.parametrize("stopped", [1, 4, 6, 8])
def test_a_checkpoint_in_mid_cycle_brings_back_both(tmp_path, stopped: int) -> None:
    """Stopped after any number of steps and continued elsewhere, every bit is that of the run in one piece."""
    whole, first = turns(), turns()
    for step in range(STEPS):
        whole.optimizer_step(losses(whole, step))
    for step in range(stopped):
        first.optimizer_step(losses(first, step))
    path = checkpoint.save(tmp_path, first.step, first.groups(), {}, "cafe")

    second = turns(seed=77)
    second.restore(checkpoint.load(path, "cafe"))
    assert second.step == stopped
    assert (second.student.step, second.critic.step) == (first.student.step, first.critic.step)
    assert second.rates() == first.rates() and second.meter.read() == first.meter.read()
    for step in range(stopped, STEPS):
        second.optimizer_step(losses(second, step))
    expected, found = flat(whole.groups()), flat(second.groups())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert second.meter.read() == whole.meter.read()


def test_groups_and_parameters_of_both_have_names_of_their_own() -> None:
    state = turns()
    kinds = ["weights", "ema", "adam", "counters"]
    assert list(state.groups()) == kinds + [f"critic_{kind}" for kind in kinds]
    assert list(state.parameters) == ["weight", "bias", "critic_weight", "critic_bias"]
    assert state.parameters["critic_weight"] is state.critic.parameters["weight"]
    assert state.config is STUDENT and state.device == torch.device("cpu")


def test_each_rate_follows_its_own_schedule() -> None:
    """The student's 3 steps: warm-up 1/2, 1, then linear from 1; the critic's 9: a cosine."""
    state, told = turns(), []
    for step in range(STEPS):
        state.optimizer_step(losses(state, step))
        told.append(state.rates())
    assert [told[step]["lr"] for step in (3, 7, 11)] == pytest.approx([0.005, 0.01, 0.01])
    critics = [facts["critic_lr"] for step, facts in enumerate(told) if not Turns.is_students(step, RATIO)]
    assert critics == pytest.approx([0.02 * (1 + math.cos(math.pi * k / 9)) for k in range(9)])


def test_the_meter_tells_both_and_begins_anew() -> None:
    state = turns()
    state.optimizer_step(losses(state, 0))
    facts = state.meter.read()
    assert "loss" not in facts and facts["critic_loss"] == pytest.approx(state.critic.meter.read()["loss"])
    for step in range(1, RATIO + 1):
        state.optimizer_step(losses(state, step))
    facts = state.meter.read()
    assert facts["loss"] == state.student.meter.read()["loss"] != facts["critic_loss"]
    assert facts["grad_norm"] == state.student.meter.read()["grad_norm"] and "critic_grad_norm" in facts
    state.meter.reset()
    assert not {"loss", "critic_loss", "grad_norm", "critic_grad_norm"} & state.meter.read().keys()


@pytest.mark.parametrize("whose", ["student", "critic"])
def test_a_streak_of_bad_steps_is_seen_whoever_has_it(whose: str) -> None:
    """Either one's longest run of skipped steps, with its own numbers; the other one's good turns do not hide it."""
    state, bad = turns(), 0
    for step in range(STEPS):
        breaks = Turns.is_students(step, RATIO) == (whose == "student")
        bad += breaks
        state.optimizer_step(losses(state, step, scale=math.inf if breaks else 1.0))
    facts = state.meter.read()
    assert bad == getattr(state, whose).step and facts["longest_skip"] == facts["skipped"] == bad
    assert not math.isfinite(facts["bad_loss"])
    assert ("loss" in facts) == (whose == "critic") and ("critic_loss" in facts) == (whose == "student")
