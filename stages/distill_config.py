"""The distillation stage's recipe."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.distill.causal_init import CausalInitConfig
from reelforge.engine.distill.dmd import DmdConfig
from reelforge.engine.distill.pairs import PairsConfig
from reelforge.engine.distill.trainer import RolloutConfig, steps_in_cycles
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.lora import LoraConfig
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig

PHASES = ("few_step", "causal_init", "self_forcing")


@dataclass(frozen=True)
class DmdPhase:
    """Distribution matching, of a bidirectional student or by self-forcing.

    Attributes:
        dmd: objective.
        rollout: of the student.
        train: length and rhythm; ``steps`` are optimizer steps of critic and student together.
        optimizer: the student's.
        critic_optimizer: the critic's; nobody samples the critic, so it has no average whatever ``ema_decay`` says.
        lora: train an adapter of the student, which is merged in at the end; none trains all weights.
        critic_lora: the critic is the teacher with an adapter, sharing its weights; none is a copy, all of it trained.
    """

    dmd: DmdConfig = DmdConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    critic_lora: LoraConfig | None = None

    @property
    def critics(self) -> OptimizerConfig:
        """The critic's optimizer, without an average."""
        return dataclasses.replace(self.critic_optimizer, ema_decay=0.0)

    def __post_init__(self) -> None:
        below, above = steps_in_cycles(self.train.steps, self.dmd.critic_steps)
        if below != above:
            raise ConfigError(
                f"train.steps is {self.train.steps}; a cycle is {self.dmd.critic_steps} critic steps and one of the "
                "student.",
                f"Choose {f'{below} or ' if below else ''}{above}.",
            )
        if self.train.steps % self.rollout.segments:
            raise ConfigError(
                f"train.steps is {self.train.steps} and rollout.segments {self.rollout.segments}.",
                "A video is not cut: make the steps a multiple of the segments.",
            )
        if math.gcd(self.dmd.critic_steps + 1, self.rollout.segments) > 1:
            raise ConfigError(
                f"rollout.segments is {self.rollout.segments} and a cycle {self.dmd.critic_steps + 1} steps: the "
                "student would train on some of the segments and never on the others.",
                "Choose dmd.critic_steps so that the two have no common divisor.",
            )


@dataclass(frozen=True)
class InitPhase:
    """The causal initialisation.

    Attributes:
        init: the method.
        pairs: trajectories of the teacher, which ``ode`` needs.
        cache: latent cache of real clips for the other methods; none takes the ends of the trajectories.
        teacher: folder with the ``transformer`` of an autoregressive diffusion model, for ``consistency``; none is the
            one that the phase starts from.
        train: length and rhythm.
        optimizer: AdamW; its average is the goal of ``consistency`` and what is exported.
        lora: train an adapter, which is merged in at the end; none trains all weights.
    """

    init: CausalInitConfig = CausalInitConfig()
    pairs: PairsConfig = PairsConfig()
    cache: Path | None = None
    teacher: Path | None = None
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None

    @property
    def few_step(self) -> bool:
        """Whether what it makes samples in few steps; an autoregressive diffusion model needs the teacher's many."""
        return self.init.method != "teacher_forcing"

    def __post_init__(self) -> None:
        if self.init.method == "ode" and self.cache is not None:
            raise ConfigError(
                'causal_init.cache is set and init.method is "ode".',
                "Regression learns from the teacher's trajectories: leave the cache out, or choose another method.",
            )


@dataclass(frozen=True)
class DistillConfig:
    """The distillation stage: its phases run one after the other, each from the weights of the one before.

    Attributes:
        teacher: model folder, bidirectional; codec, text encoder and clip are the student's too.
        prompts: text file with one prompt a line, or JSON lines.
        output: folder of the phases' run directories and of the finished ``model``.
        student: model folder whose weights the first phase starts from; none is the teacher.
        critic: model folder whose weights the critics start from; none is the teacher.
        chunk_frames: latent frames a chunk.
        first_chunk_frames: 0 is ``chunk_frames``.
        denoising_steps: the student's few steps, unshifted timesteps.
        schedule: warps these and the noise levels of training; none is the teacher's.
        video: the clip; none is the teacher's.
        few_step: a bidirectional few-step student; none leaves it out.
        causal_init: the causal mask; none leaves it out.
        self_forcing: the causal few-step student; none leaves it out.
        previews: prompts of which every checkpoint makes a video.
        gradient_checkpointing: of student and critic.
        device: ``auto`` takes the GPU if there is one.
    """

    teacher: Path
    prompts: Path
    output: Path
    student: Path | None = None
    critic: Path | None = None
    chunk_frames: int = 3
    first_chunk_frames: int = 0
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    schedule: FlowSchedule | None = None
    video: VideoSpec | None = None
    few_step: DmdPhase | None = None
    causal_init: InitPhase | None = None
    self_forcing: DmdPhase | None = None
    previews: int = 4
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "chunk_frames")
        if self.first_chunk_frames < 0:
            raise ConfigError(f"first_chunk_frames is {self.first_chunk_frames}.", "0 is chunk_frames.")
        if self.few_step and dataclasses.replace(self.few_step.rollout, exit_policy="random") != RolloutConfig():
            raise ConfigError(
                "few_step.rollout sets context, frames or segments.",
                "A bidirectional student makes its clip in one piece: leave them out.",
            )
        if not self.phases:
            raise ConfigError("The recipe has no phase.", f"Add a table: {', '.join(PHASES)}.")
        if self.critic is not None and any(getattr(phase, "critic_lora", None) for phase in self.phases.values()):
            raise ConfigError(
                "critic is set beside critic_lora.", "An adapted critic shares the teacher's weights: leave out one."
            )

    @property
    def phases(self) -> dict[str, DmdPhase | InitPhase]:
        """Those that run, in order."""
        return {name: phase for name in PHASES if (phase := getattr(self, name)) is not None}

    @property
    def causal(self) -> bool:
        """Whether the finished student decodes chunk by chunk."""
        return self.causal_init is not None or self.self_forcing is not None


def decisive(config: DistillConfig) -> DistillConfig:
    """The config with its defaults wherever a setting does not decide the weights; files count by what is in them."""
    phases: dict[str, Any] = {
        name: dataclasses.replace(
            phase, train=dataclasses.replace(phase.train, log_every=1, checkpoint_every=1, keep_last=1)
        )
        for name, phase in config.phases.items()
    }
    if config.causal_init and config.causal_init.teacher:
        phases["causal_init"] = dataclasses.replace(phases["causal_init"], teacher=Path())
    return dataclasses.replace(
        config, teacher=Path(), prompts=Path(), output=Path(), previews=0, gradient_checkpointing=False, device="auto",
        student=config.student and Path(), critic=config.critic and Path(), **phases,
    )  # fmt: skip
