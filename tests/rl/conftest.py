"""A tiny transformer, and the parts of an iteration that fit it, for tests of the RL core."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rl.advantage import step_weights
from reelforge.engine.rl.loss import Targets
from reelforge.engine.rl.plan import Group, PlanConfig, Planner
from reelforge.engine.rl.policy import PathConfig, Policy
from reelforge.engine.rl.rollout import Rollout, Sampler

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
CPU = torch.device("cpu")


def tiny_transformer(seed: int = 0, dtype: torch.dtype = torch.float32) -> WanTransformer:
    """Wan's initialisation with a head that says something."""
    model = WanTransformer.from_config(TINY, seed=seed)
    head = model.proj_out.weight
    head.data.copy_(0.2 * rng.normal([rng.key("head", seed)], head.shape)[0])
    return model.to(dtype)


@dataclass
class Parts:
    """What tests make iterations from: 8 prompts, latents ``[4, 2, 4, 4]``, 5 steps.

    Attributes:
        shape: of a latent.
        prompts: how many.
        text: ``[N + 1, S, E]``, the negative prompt last.
    """

    shape: tuple[int, int, int, int] = (4, 2, 4, 4)
    prompts: int = 8
    num_steps: int = 5

    @property
    def text(self) -> Tensor:
        return rng.normal([rng.key("text", n) for n in range(self.prompts + 1)], (6, 16))

    def policy(self, model: WanTransformer | None = None, path: PathConfig | None = None, **others: object) -> Policy:
        """In fp32 throughout unless told otherwise."""
        settings = {"precision": "fp32", **others}
        return Policy(model or tiny_transformer(), self.text, path or PathConfig(sample_precision="fp32"), **settings)

    def sampler(self, plan: PlanConfig, rate: NoiseRate | None = None, **others: object) -> Sampler:
        """Three states a deterministic forward, two a trained one."""
        settings = {"sample_rows": 3, "train_rows": 2, "seed": 5, **others}
        grid = FlowSchedule("unipc_flow", 3.0).grid(self.num_steps)
        ids = [rng.key("prompt", n) for n in range(self.prompts)]
        return Sampler(plan, grid, rate or NoiseRate("trunc"), ids, self.shape, **settings)

    def groups(self, plan: PlanConfig, count: int = 4, iteration: int = 0) -> tuple[Group, ...]:
        """As planned."""
        return Planner(plan, 5, self.prompts, count, self.num_steps).iteration(iteration)

    def roll_out(self, policy: Policy, sampler: Sampler, groups: Sequence[Group], iteration: int = 0) -> Rollout:
        """All groups at once, in their places."""
        policy.prepare([group.prompt for group in groups])
        return sampler.run(policy, groups, range(len(groups)), iteration, CPU)

    def targets(
        self,
        sampler: Sampler,
        groups: Sequence[Group],
        advantages: Tensor,
        counted: Tensor | None = None,
        rectify: bool = True,
    ) -> Targets:
        """Advantages ``[A, P, G]`` as the trainer hands them to the loss; everything counted is pulled by a KL term."""
        counted = torch.ones(advantages.shape[1:], dtype=torch.bool) if counted is None else counted
        trained = [group.trained for group in groups]
        lambda_ = sde.sde_lambda(sampler.grid, range(self.num_steps), sampler.rate)
        weights = step_weights(lambda_, trained, counted, rectify)
        decisions = sum(int(row.sum()) * len(steps) for row, steps in zip(counted, trained, strict=True))
        share = counted.double().flatten() / max(decisions, 1)
        return Targets(advantages.double().flatten(1), counted.flatten(), weights, lambda_, share)


def move(model: WanTransformer, size: float, seed: int = 1) -> None:
    """Weights that are a little different."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += size * rng.normal([rng.key(name, seed)], parameter.shape)[0].to(parameter)


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def tiny() -> Callable[..., WanTransformer]:
    """Makes the transformer: ``tiny(seed, dtype)``."""
    return tiny_transformer


@pytest.fixture
def moved() -> Callable[..., None]:
    """Changes a model's weights: ``moved(model, size)``."""
    return move
