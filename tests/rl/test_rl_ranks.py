"""Two gloo processes against one: the same plan, rewards, gradients and weights; and a rank that drifts is caught."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_processes import in_two_processes

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import TrainingError
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.advantage import Advantages, Fusion, FusionConfig
from reelforge.engine.rl.loss import LossConfig
from reelforge.engine.rl.plan import PlanConfig, Planner
from reelforge.engine.rl.prompts import PromptSet
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.engine.train.state import OptimizerConfig, TrainState

PLAN = PlanConfig(group_size=4, distinct_noise=2, steps=(0, 5))
GROUPS, STEPS = 6, 3


class Judge:
    """Brightness, and the contrast of most clips: what is dim has none."""

    axes = ("vq", "mq")

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        assert not self.broken, "this rank's scorer is out of order"
        flat = videos.flatten(1)
        return {"vq": Scores.of(flat.mean(1)), "mq": Scores.of(flat.std(1), flat.mean(1) > -0.15)}


class Told(Fusion):
    """Remembers the tables of rewards."""

    def __call__(self, rewards: Tensor, wanted: Tensor | None = None) -> Advantages:
        self.tables = [*getattr(self, "tables", []), rewards.clone()]
        return super().__call__(rewards, wanted)


class Run:
    """A task and its state, and the gradients that went through it."""

    def __init__(self, parts, model, judge: Judge | None = None) -> None:
        scoring = Scoring([judge or Judge()], lambda latents: latents, ScoringConfig(missing_limit=0.4, overlap=False))
        prompts = PromptSet(tuple(f"prompt {n}" for n in range(parts.prompts)), ((),) * parts.prompts)
        self.fusion = Told(FusionConfig(), scoring.axes)
        self.task = GrpoTask(
            parts.policy(model), parts.sampler(PLAN), Planner(PLAN, 5, parts.prompts, GROUPS, parts.num_steps),
            scoring, self.fusion, prompts, LossConfig(), 1, 2,
        )  # fmt: skip
        self.gradients: list[Tensor] = []
        optimizer = OptimizerConfig(lr=3e-3, warmup_steps=0)
        self.state = TrainState(dict(model.named_parameters()), optimizer, STEPS, pace=self._observe)

    def _observe(self, gradients: Sequence[Tensor]) -> float:
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).clone())
        return 1.0

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.state.parameters.values()])

    def train(self) -> dict[str, Tensor]:
        """What there was at every step, and what is left."""
        for step in range(STEPS):
            self.state.optimizer_step(self.task.losses(step))
        return {
            "rewards": torch.stack(self.fusion.tables), "gradients": torch.stack(self.gradients),
            "weights": self.weights, "running": self.fusion.running,
        }  # fmt: skip


def test_two_ranks_are_one_process(parts, tiny, tmp_path) -> None:
    """Rewards to rounding with NaN where it was, so the same samples count; gradients and weights to fp32 rounding,
    and equal between the ranks bit for bit."""

    def work(rank: int) -> None:
        own = Run(parts, tiny())
        found = own.train()
        distributed.check_replicas(own.state.parameters)
        save_file(found, tmp_path / f"{rank}.safetensors")

    one = Run(parts, tiny()).train()
    assert in_two_processes(work, tmp_path) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name in one:
        assert torch.equal(first[name].nan_to_num(1e9), second[name].nan_to_num(1e9)), name
    assert first["rewards"].isnan().any() and (first["rewards"].isnan() == one["rewards"].isnan()).all()
    assert not first["rewards"][:, 0].isnan().any()
    torch.testing.assert_close(first["rewards"], one["rewards"], rtol=0, atol=1e-4, equal_nan=True)
    scale = one["gradients"].norm(dim=1)
    assert ((first["gradients"] - one["gradients"]).norm(dim=1) < 1e-4 * scale).all()
    assert (first["gradients"][0] - one["gradients"][0]).norm() < 3e-6 * scale[0], "nothing has drifted yet"
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=2e-5)
    torch.testing.assert_close(first["running"], one["running"], rtol=1e-5, atol=0)


def test_ranks_roll_out_different_groups_of_one_plan(parts, tiny, tmp_path) -> None:
    def work(rank: int) -> int:
        own = Run(parts, tiny())
        decisions = own.task._roll_out(0).decisions
        plan = torch.tensor([[group.prompt, *group.stochastic] for group in own.task.planner.iteration(0)])
        plans = [torch.zeros_like(plan) for _ in range(2)]
        dist.all_gather(plans, plan)
        taken = torch.bincount(torch.cat([d.members for d in decisions]), minlength=GROUPS * PLAN.group_size)
        distributed.sum_([taken])
        return 5 if torch.equal(*plans) and torch.equal(taken, torch.ones_like(taken)) else 2

    assert in_two_processes(work, tmp_path) == [5, 5]


def test_gradients_come_from_both_ranks(parts, tiny, tmp_path) -> None:
    """Before the reduction they differ, after it they are equal, and the sum of the two."""

    def work(rank: int) -> int:
        own = Run(parts, tiny())
        local = torch.zeros(sum(p.numel() for p in own.state.parameters.values()))
        for loss in own.task.losses(0):
            grads = torch.autograd.grad(loss, list(own.state.parameters.values()))
            local += torch.cat([g.flatten() for g in grads])
        every = [torch.zeros_like(local) for _ in range(2)]
        dist.all_gather(every, local)
        again = Run(parts, tiny())
        again.state.optimizer_step(again.task.losses(0))
        (reduced,) = again.gradients
        apart = (every[0] - every[1]).norm() > 0.1 * every[0].norm()
        close = (reduced - every[0] - every[1]).norm() < 1e-5 * reduced.norm()
        return 4 if apart and close else 2

    assert in_two_processes(work, tmp_path) == [4, 4]


@pytest.mark.parametrize("fault", ["a weight", "a gradient"])
def test_a_rank_that_drifts_is_caught(parts, tiny, tmp_path, fault: str) -> None:
    """A weight that one rank alone changed; a reduction that one rank's gradient missed."""

    def work(rank: int) -> int:
        own = Run(parts, tiny())
        if fault == "a gradient":
            own.state.pace = lambda gradients: gradients[3].mul_(1 + rank).isfinite().all().item()
        own.state.optimizer_step(own.task.losses(0))
        if fault == "a weight" and rank:
            own.state.parameters["blocks.1.ffn.net.2.weight"].data[3, 4] += 1e-4
        try:
            distributed.check_replicas(own.state.parameters)
        except TrainingError as error:
            return 7 if "differs between ranks" in error.what else 3
        return 2

    assert in_two_processes(work, tmp_path) == [7, 7]


def test_missing_rewards_stop_both_ranks(parts, tiny, tmp_path) -> None:
    """One rank's scorer fails: neither waits for the other, and neither learns."""

    def work(rank: int) -> int:
        own = Run(parts, tiny(), Judge(broken=rank == 1))
        before = own.weights.clone()
        try:
            own.state.optimizer_step(own.task.losses(0))
        except TrainingError as error:
            return 6 if torch.equal(before, own.weights) and "lack a score" in error.what else 3
        return 2

    assert in_two_processes(work, tmp_path) == [6, 6]
