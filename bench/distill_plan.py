"""What the engine's forecast expects of a measured cycle: the plan that ``doctor --plan`` prints, for a world."""

from dataclasses import replace

import torch

from reelforge.bench.distill_cycle import STILL, STILL_CRITIC, settings
from reelforge.bench.distill_forecast import Forecast, network, price_dmd, simulated
from reelforge.bench.distill_world import World
from reelforge.engine.distill.trainer import DmdTask
from reelforge.engine.model.wan import WanTransformer

# What lives during a turn, by the forecast's names.
STUDENT_TURN, CRITIC_TURN = ("rollout", "teacher", "replay"), ("rollout", "critic")


def plan(world: World) -> Forecast:
    """Of a cycle on this world's device, with the kernels that are pinned now."""
    with simulated(world.device.type) as ledger:

        def like(model: WanTransformer) -> WanTransformer:
            made = network(model.config, model.proj_out.weight.dtype)
            made.gradient_checkpointing = model.gradient_checkpointing
            return made

        student = replace(world.student, model=like(world.student.model))
        text = torch.empty(world.text.shape)
        dmd, rollout, train = settings(world)
        task = DmdTask(
            student, like(world.critic), like(world.teacher), text, world.ids, dmd, rollout, world.schedule, train
        )
        return price_dmd(ledger, task, STILL, STILL_CRITIC)
