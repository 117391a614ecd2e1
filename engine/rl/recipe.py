"""The RLHF stage's recipe."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.model.lora import LoraConfig
from reelforge.engine.rewards.scoring import ScoringConfig
from reelforge.engine.rl.advantage import FusionConfig
from reelforge.engine.rl.loss import LossConfig
from reelforge.engine.rl.monitor import HeldOutConfig
from reelforge.engine.rl.plan import PlanConfig
from reelforge.engine.rl.policy import PathConfig
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.pace import PaceConfig
from reelforge.engine.train.state import OptimizerConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How training samples are made.

    Attributes:
        num_steps: sampler steps, T; fewer than when the model is used saves time and costs little.
        schedule: none is the model's own.
        noise: of the stochastic steps.
        path: guidance, and the precision of the deterministic steps.
        batch_groups: groups that are rolled out, decoded and scored together.
        batch_rows: states a forward of a deterministic step.
    """

    num_steps: int = 20
    schedule: FlowSchedule | None = None
    noise: NoiseRate = NoiseRate()
    path: PathConfig = PathConfig()
    batch_groups: int = 1
    batch_rows: int = 8

    def __post_init__(self) -> None:
        configuration.require_positive(self, "num_steps", "batch_groups", "batch_rows")


@dataclass(frozen=True)
class RlhfConfig:
    """The RLHF stage.

    Attributes:
        model: model folder to start from.
        prompts: text file with one prompt a line, or JSON lines.
        output: the run directory.
        rewards: scorers, see :func:`reelforge.engine.rewards.registry.build_scorer`.
        held_out: what is watched and never optimised; none watches nothing.
        video: size of all clips; none is the model's own.
        plan: groups, initial noises, stochastic steps.
        rollout: sampler.
        scoring: patience with the scorers.
        fusion: rewards to advantages.
        loss: objective.
        train: length and rhythm; ``steps`` are optimizer steps, ``batch_size`` prompts an iteration,
            ``micro_batch_size`` states a training forward.
        updates_per_rollout: optimizer steps on one rollout.
        optimizer: AdamW.
        pace: whether its rate follows how much of the gradient is signal.
        lora: train an adapter of this shape; none trains the weights.
        trainable: patterns of the weights that train without an adapter, e.g. ``["blocks.*.weight"]``; empty is all.
        gradient_checkpointing: recompute activations in the backward pass.
        device: ``auto`` takes the GPU if there is one.
    """

    model: Path
    prompts: Path
    output: Path
    rewards: tuple[str, ...]
    held_out: HeldOutConfig | None = None
    video: VideoSpec | None = None
    plan: PlanConfig = PlanConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    train: LoopConfig = LoopConfig()
    updates_per_rollout: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    pace: PaceConfig = PaceConfig()
    lora: LoraConfig | None = None
    trainable: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        configuration.require_positive(self, "updates_per_rollout")
        if not self.rewards:
            raise ConfigError("rewards is empty.", "Name a scorer, or package.module:Class of your own.")
        if self.held_out and (both := sorted(set(self.rewards) & set(self.held_out.scorers))):
            raise ConfigError(f"Scorer {both[0]!r} is optimised and held out.", "Take it out of one of the lists.")
        if self.lora and self.trainable:
            raise ConfigError("trainable is set beside [lora].", "An adapter trains alone: choose one of them.")
        if self.pace.full_cosine and self.updates_per_rollout > 1:
            raise ConfigError(
                f"pace.full_cosine is set and updates_per_rollout is {self.updates_per_rollout}.",
                "Gradients of one rollout share its noise and tell nothing of the signal: leave one of them out.",
            )
        iterations, left = divmod(self.train.steps, self.updates_per_rollout)
        if left:
            fits = [n * self.updates_per_rollout for n in (iterations, iterations + 1) if n]
            raise ConfigError(
                f"train.steps is {self.train.steps} and updates_per_rollout {self.updates_per_rollout}.",
                f"An iteration is not cut: choose {' or '.join(map(str, fits))} steps.",
            )

    @property
    def iterations(self) -> int:
        """Rollouts in all."""
        return self.train.steps // self.updates_per_rollout


def decisive(config: RlhfConfig) -> RlhfConfig:
    """The config with its defaults wherever a setting does not decide the weights; files count by what is in them."""
    train = dataclasses.replace(config.train, log_every=1, checkpoint_every=1, keep_last=1)
    return dataclasses.replace(
        config, model=Path(), prompts=Path(), output=Path(), train=train, held_out=None,
        gradient_checkpointing=False, device="auto", scoring=ScoringConfig(),
    )  # fmt: skip
