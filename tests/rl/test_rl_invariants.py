"""On policy v_theta - v_old is exactly 0, or the run stops: planted faults that must be caught, and no false alarm."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.core.config import build, read_table
from reelforge.engine.core.errors import TrainingError
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters, merge
from reelforge.engine.rl.loss import LossConfig, LossMeter, check_on_policy, losses
from reelforge.engine.rl.plan import PlanConfig
from reelforge.engine.rl.policy import PathConfig, Policy
from reelforge.engine.rl.rollout import Decision
from reelforge.kernels import dispatch

CPU = torch.device("cpu")
PLAN = PlanConfig(group_size=4, steps=(0, 5))
PRESETS = Path(__file__).resolve().parents[2] / "recipes" / "presets"


def adapted(model, dtype: torch.dtype = torch.float32):
    """An adapter that changes something, beside frozen weights of another type."""
    inject(model.to(dtype), LoraConfig(rank=2, alpha=4.0), seed=1)
    for name, parameter in lora_parameters(model):
        parameter.data = 0.2 * rng.normal([rng.key(name)], parameter.shape)[0]
    return model


def roll_out(parts, policy: Policy, plan: PlanConfig = PLAN, rate: NoiseRate | None = None, groups: int = 4):
    """Decisions and targets of an iteration."""
    sampler, groups = parts.sampler(plan, rate), parts.groups(plan, groups)
    decisions = parts.roll_out(policy, sampler, groups).decisions
    advantages = torch.randn(1, len(groups), plan.group_size, generator=torch.Generator().manual_seed(0))
    return decisions, parts.targets(sampler, groups, advantages)


def first_update(policy: Policy, decisions: Sequence[Decision], targets, config: LossConfig | None = None) -> LossMeter:
    """What the trainer does before it lets the optimizer move."""
    meter = LossMeter(CPU)
    for loss in losses(policy, decisions, targets, config or LossConfig(), meter):
        loss.backward()
    check_on_policy(meter)
    return meter


# -- no false alarm ---------------------------------------------------------------------------------------------------

POLICIES: dict[str, Callable[..., Policy]] = {
    "fp32": lambda parts, model: parts.policy(model),
    "bf16": lambda parts, model: parts.policy(model, PathConfig(), precision="bf16"),
    "guided": lambda parts, model: parts.policy(model, PathConfig(4.5), precision="bf16"),
    "guided, one branch": lambda parts, model: parts.policy(model, PathConfig(4.5, gradient_through_uncond=False)),
    "adapter": lambda parts, model: parts.policy(adapted(model)),
    "adapter on bf16": lambda parts, model: parts.policy(adapted(model, torch.bfloat16), PathConfig(3.0)),
    "adapter in bf16": lambda parts, model: parts.policy(adapted(model), PathConfig(3.0), precision="bf16"),
    "fp64": lambda parts, model: parts.policy(model.double()),
}


def exactly_on_policy(meter: LossMeter, decisions: int) -> None:
    found = meter.means()
    assert meter.gap.item() == 0.0 and found["ratio"] == 1.0 and found["kl"] == 0.0
    assert found["clipped_low"] == found["clipped_high"] == 0.0
    assert meter.sums[0] == decisions


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", POLICIES)
def test_on_policy_the_gap_is_zero(parts, tiny, name: str, checkpointing: bool) -> None:
    model = tiny()
    model.gradient_checkpointing = checkpointing
    policy = POLICIES[name](parts, model)
    for distinct_noise in (1, 2, 4):
        found = roll_out(parts, policy, dataclasses.replace(PLAN, distinct_noise=distinct_noise), groups=2)
        exactly_on_policy(first_update(policy, *found), 8)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_on_policy_under_every_preset(parts, tiny, preset: str) -> None:
    """Their plans, noise, ratio and clip; the sizes are the test's."""
    table = read_table(PRESETS / f"{preset}.toml")
    sizes = {"group_size": 4, "distinct_noise": min(4, table["plan"]["distinct_noise"]), "steps": [0, 4], "window": 2}
    plan = build(PlanConfig, {**table["plan"], **sizes})
    config = build(LossConfig, {name: value for name, value in table["loss"].items() if name != "kl"})
    policy = parts.policy(tiny(), PathConfig(2.0), precision="bf16")
    decisions, targets = roll_out(parts, policy, plan, build(NoiseRate, table["rollout"]["noise"]))
    trained = sum(len(group.trained) for group in parts.groups(plan))
    exactly_on_policy(first_update(policy, decisions, targets, config), 4 * trained)


# -- planted faults ---------------------------------------------------------------------------------------------------


def replaced(decisions: Sequence[Decision], change: Callable[[Decision], dict[str, object]]) -> list[Decision]:
    return [dataclasses.replace(decision, **change(decision)) for decision in decisions]


def blind(policy: Policy, decisions: Sequence[Decision]) -> list[Decision]:
    """As if the rollout had taken the path that training takes now: what is left is to compare the velocities."""
    return replaced(decisions, lambda decision: {"path": policy.path(len(decision.x))})


def caught(policy: Policy, decisions: Sequence[Decision], targets, by_path: str | None) -> None:
    """Stopped by the path's name where it shows there, and by the velocities alone."""
    if by_path:
        with pytest.raises(TrainingError, match=f"stochastic step ran with {by_path} = ") as error:
            first_update(policy, decisions, targets)
        assert "one computation" in error.value.hint
    with pytest.raises(TrainingError, match="differs from the rollout's stochastic step by up to") as error:
        first_update(policy, blind(policy, decisions), targets)
    assert "before any update" in error.value.what and "dropout" in error.value.hint


def test_merged_on_one_side(parts, tiny) -> None:
    """The rollout by a merged copy, as a server would serve it."""
    served = adapted(tiny())
    merge(served)
    found = roll_out(parts, parts.policy(served))
    policy = parts.policy(adapted(tiny()))
    roll_out(parts, policy)
    caught(policy, *found, "adapters")


def test_an_adapter_left_off(parts, tiny) -> None:
    model = adapted(tiny())
    policy = parts.policy(model)
    found = roll_out(parts, policy)
    next(module for module in model.modules() if hasattr(module, "lora_A")).active = False
    caught(policy, *found, "adapters")


def test_another_type(parts, tiny) -> None:
    policy = parts.policy(tiny(), precision="bf16")
    found = roll_out(parts, policy)
    policy.precision = "fp32"
    caught(policy, *found, "autocast")


def test_other_weights_type(parts, tiny) -> None:
    model = tiny()
    policy = parts.policy(model)
    found = roll_out(parts, policy)
    model.bfloat16()
    caught(policy, *found, "dtype")


@pytest.mark.parametrize("pinned_side", ["rollout", "training"])
def test_another_attention_kernel(parts, tiny, pinned_side: str) -> None:
    """torch's own attention against the reference, over enough tokens that they are two computations."""
    parts = dataclasses.replace(parts, shape=(4, 2, 16, 18))
    policy = parts.policy(tiny())
    with dispatch.pinned("attention", "torch") if pinned_side == "rollout" else nullcontext():
        found = roll_out(parts, policy)
    with dispatch.pinned("attention", "torch") if pinned_side == "training" else nullcontext():
        caught(policy, *found, "kernels")


def test_another_batch_shape(parts, tiny) -> None:
    """Rows that were rolled out two at a time and are trained one at a time. In fp32 on a CPU the bits may agree, so
    it is the path that tells."""
    policy = parts.policy(tiny())
    decisions, targets = roll_out(parts, policy)
    assert any(len(decision.x) == 2 for decision in decisions)
    halves = [
        dataclasses.replace(
            decision, x=decision.x[:1], velocity=decision.velocity[:1], timestep=decision.timestep[:1],
            prompts=decision.prompts[:1], keys=decision.keys[:4], members=decision.members[:4],
            offsets=decision.offsets[:2],
        )
        for decision in decisions
    ]  # fmt: skip
    with pytest.raises(TrainingError, match="ran with rows = 2, training runs with 1"):
        first_update(policy, halves, targets)


def test_another_mode(parts, tiny) -> None:
    policy = parts.policy(tiny())
    decisions, targets = roll_out(parts, policy)
    policy.model.eval()
    with pytest.raises(TrainingError, match="ran with training = True, training runs with False"):
        first_update(policy, decisions, targets)


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_another_timestep(parts, tiny, amount: float) -> None:
    """A sigma that one side rounds: the network is told 962.9 and 963."""
    policy = parts.policy(tiny())
    decisions, targets = roll_out(parts, policy)
    caught(policy, replaced(decisions, lambda decision: {"timestep": decision.timestep - amount}), targets, None)


def test_another_schedule(parts, tiny) -> None:
    """States of one grid, timesteps of another."""
    policy = parts.policy(tiny())
    decisions, targets = roll_out(parts, policy)
    other = FlowSchedule("euler", 3.0).grid(parts.num_steps).timesteps
    told = replaced(decisions, lambda decision: {"timestep": other[decision.step].expand(len(decision.x))})
    caught(policy, told, targets, None)


def test_another_state(parts, tiny) -> None:
    """Stored in half precision."""
    policy = parts.policy(tiny())
    decisions, targets = roll_out(parts, policy)
    caught(policy, replaced(decisions, lambda decision: {"x": decision.x.bfloat16().float()}), targets, None)


def test_another_prompt_or_guidance(parts, tiny) -> None:
    policy = parts.policy(tiny(), PathConfig(3.0))
    decisions, targets = roll_out(parts, policy)
    turned = replaced(decisions, lambda decision: {"prompts": tuple(reversed(decision.prompts))})
    caught(policy, [decision for decision in turned if len(decision.x) == 2], targets, None)
    policy.config = PathConfig(3.01)
    caught(policy, decisions, targets, None)


def test_dropout(parts, tiny) -> None:
    model = tiny()
    model.blocks[1].ffn.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.1))
    policy = parts.policy(model)
    caught(policy, *roll_out(parts, policy), None)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_k.weight", "proj_out.bias", "condition_embedder.time_proj.bias"])
def test_weights_that_moved(parts, tiny, name: str) -> None:
    """By a thousandth, in one entry."""
    model = tiny()
    policy = parts.policy(model)
    found = roll_out(parts, policy)
    model.get_parameter(name).data.view(-1)[0] += 1e-3
    caught(policy, *found, None)


def test_velocities_that_are_no_numbers(parts, tiny) -> None:
    """NaN is no gap of 0."""
    model = tiny()
    policy = parts.policy(model)
    found = roll_out(parts, policy)
    model.proj_out.bias.data[0] = torch.nan
    caught(policy, *found, None)
    found = roll_out(parts, policy)
    caught(policy, *found, None)
