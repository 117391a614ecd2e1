"""What the training step of an RLHF iteration computes and keeps, arm against arm: its gradient and its memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from reelforge.bench import measure
from reelforge.bench.arms import FAILURES
from reelforge.bench.rl_arms import Arm, Setting, apart, kernels, policy, sampler
from reelforge.bench.rl_iteration import inputs, train_on
from reelforge.bench.rl_world import World
from reelforge.engine.flow import sde
from reelforge.engine.rl.advantage import step_weights
from reelforge.engine.rl.loss import LossConfig, LossMeter, Targets, losses
from reelforge.engine.rl.policy import Policy
from reelforge.engine.rl.rollout import Decision, Sampler


def gradient_error(world: World, setting: Setting, arm: Arm, reference: Arm) -> float:
    """Relative L2 distance of an arm's gradient to that of ``reference`` with a forward for every sample.

    Both replay one rollout of a group with shared noise, under advantages that alternate in sign.
    """
    device = world.model.proj_out.weight.device
    together = replace(arm, shared=True, collapsed=True)
    roller = sampler(world, together, setting)
    groups = setting.planner(together, len(world.prompts)).iteration(0)[:1]
    actor, other = policy(world, arm), policy(world, reference)
    for each in (actor, other):
        each.prepare([groups[0].prompt])
    with kernels(arm, device):
        whole = roller.run(actor, groups, [0], 0, device).decisions
        members = [part for decision in whole for part in apart(decision)]
        own = gradient(world, actor, roller, whole if arm.collapsed else members)
    with kernels(reference, device):
        path = other.path(1)  # that of the rollout names other kernels
        exact = gradient(world, other, roller, [replace(part, path=path) for part in members])
    return ((own - exact).norm() / exact.norm()).item()


def gradient(world: World, actor: Policy, roller: Sampler, decisions: Sequence[Decision]) -> Tensor:
    """Of the loss over a group's decisions: all trained weights in one fp64 vector."""
    members = roller.config.group_size
    lambda_ = sde.coefficients(roller.grid, range(roller.grid.num_steps), roller.rate).lambda_
    counted = torch.ones(1, members, dtype=torch.bool)
    weights = step_weights(lambda_, [[decisions[0].step]], counted, True)
    advantages = torch.linspace(-1, 1, members, dtype=torch.float64) * (-1.0) ** torch.arange(members)
    targets = Targets(advantages[None], counted[0], weights, lambda_, torch.zeros(members, dtype=torch.float64))
    for loss in losses(actor, decisions, targets, LossConfig(), LossMeter(actor.device)):
        loss.backward()
    parameters = world.trained.values()
    found = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


@dataclass(frozen=True)
class Peak:
    """Memory of one training forward and backward.

    Attributes:
        states: in it.
        saved: bytes that the backward keeps of the forward.
        allocated: bytes that both add to the device's memory at their peak; None on a CPU.
    """

    states: int
    saved: int
    allocated: float | None


def peak(world: World, arm: Arm, states: int) -> Peak | str:
    """Of ``states`` states at once, or why it did not run."""
    device = world.model.proj_out.weight.device
    actor, given = policy(world, arm), inputs(world, states)
    actor.prepare([0])
    try:
        with kernels(arm, device):
            saved = saved_bytes(lambda: actor.train(*given), world.model)
            found = measure.peak_memory(lambda: train_on(actor, world, *given), device).peak_alloc_mb
    except FAILURES as error:  # too large for the device
        return measure.failure(error, device)
    return Peak(states, saved, None if found is None else 1e6 * found)


def saved_bytes(call: Callable[[], Tensor], model: nn.Module) -> int:
    """What the backward of ``call`` keeps, weights aside; every storage counts once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # whose graph holds them, so that none is counted under another one's address
    total = sum(size for storage, size in kept.items() if storage not in weights)
    del result
    return total
