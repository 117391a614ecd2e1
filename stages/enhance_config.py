"""The prompt enhancer's recipe."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.enhance.dialogue import DialogueConfig
from reelforge.engine.enhance.structure import StructureConfig
from reelforge.engine.rewards.scoring import ScoringConfig
from reelforge.engine.rl.advantage import FusionConfig
from reelforge.engine.rl.rewriting import RewritingConfig
from reelforge.engine.rl.text_loss import TextLossConfig
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig

PHASES = ("cold_start", "grpo")


@dataclass(frozen=True)
class ColdStartPhase:
    """Supervised lessons.

    Attributes:
        pairs: JSON lines, see :func:`reelforge.engine.enhance.pairs.read_pairs`.
        min_coverage: least share of a request's content words that its caption has.
        identity: share of further pairs whose request is the caption.
        train: ``batch_size`` counts pairs.
        optimizer: AdamW.
    """

    pairs: Path
    min_coverage: float = 0.9
    identity: float = 0.1
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        for name in ("min_coverage", "identity"):
            if not 0 <= vars(self)[name] <= 1:
                raise ConfigError(f"cold_start.{name} is {vars(self)[name]}.", "It is a share in [0, 1].")


@dataclass(frozen=True)
class ProxyConfig:
    """A cheaper generator to train against, e.g. a few-step student; it must rank videos as the real one does.

    Attributes:
        model: its model folder.
        requests: on which the two are compared, a rewrite each.
        min_correlation: least Spearman correlation of their rewards.
    """

    model: Path
    requests: int = 50
    min_correlation: float = 0.6

    def __post_init__(self) -> None:
        require_positive(self, "requests")


@dataclass(frozen=True)
class HeldOutConfig:
    """Requests that are watched and not trained on.

    Attributes:
        requests: a prompt file.
        draws: videos each.
    """

    requests: Path
    draws: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "draws")


@dataclass(frozen=True)
class GrpoPhase:
    """Policy gradients with the generator in the loop.

    Attributes:
        requests: a prompt file.
        generator: model folder; frozen.
        sampling: laid over its defaults, as ``generate --set``.
        rewards: scorers, see :func:`reelforge.engine.rewards.registry.build_scorer`.
        proxy: a cheaper stand-in for the generator.
        groups: rewrites and noises.
        loss: the objective.
        fusion: of the scorers' axes and ``structure``.
        scoring: patience.
        held_out: watched at every checkpoint.
        updates_per_rollout: optimizer steps on the same rewrites.
        train: ``steps`` are optimizer steps, ``batch_size`` requests, ``micro_batch_size`` answers.
        optimizer: AdamW.
    """

    requests: Path
    generator: Path
    rewards: tuple[str, ...]
    sampling: tuple[str, ...] = ()
    proxy: ProxyConfig | None = None
    groups: RewritingConfig = RewritingConfig()
    loss: TextLossConfig = TextLossConfig()
    fusion: FusionConfig = FusionConfig()
    scoring: ScoringConfig = ScoringConfig()
    held_out: HeldOutConfig | None = None
    updates_per_rollout: int = 1
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        require_positive(self, "updates_per_rollout")
        if not self.rewards:
            raise ConfigError("grpo.rewards is empty.", "Name a scorer, or package.module:Class of your own.")
        if self.train.steps % self.updates_per_rollout:
            raise ConfigError(
                f"grpo.train.steps is {self.train.steps} and updates_per_rollout {self.updates_per_rollout}.",
                "Make the steps a multiple of the updates.",
            )


@dataclass(frozen=True)
class EnhanceConfig:
    """What to train and how.

    Attributes:
        language_model: folder of a causal language model with a chat template.
        output: run directory; the last phase's ``rewriter`` in it is the result.
        dialogue: the words around a request.
        structure: the reward on a rewrite's words.
        cold_start: supervised first; none trusts the model to know the format.
        grpo: then from rewards; none leaves it at that.
        device: ``auto`` takes the GPU if there is one.
    """

    language_model: Path
    output: Path
    dialogue: DialogueConfig = DialogueConfig()
    structure: StructureConfig = StructureConfig()
    cold_start: ColdStartPhase | None = None
    grpo: GrpoPhase | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("The recipe has no phase.", f"Add a table: {', '.join(PHASES)}.")

    @property
    def phases(self) -> dict[str, Any]:
        """Those that run, in order."""
        return {name: phase for name in PHASES if (phase := getattr(self, name)) is not None}


def decisive(config: EnhanceConfig) -> EnhanceConfig:
    """The config with its defaults wherever a setting does not decide the weights; files count by what is in them."""
    blank: dict[str, dict[str, Any]] = {
        "cold_start": {"pairs": Path()},
        "grpo": {
            "requests": Path(), "generator": Path(), "proxy": None, "held_out": None, "scoring": ScoringConfig(),
        },
    }  # fmt: skip
    phases = {
        name: dataclasses.replace(
            phase, **blank[name], train=dataclasses.replace(phase.train, log_every=1, checkpoint_every=1, keep_last=1)
        )
        for name, phase in config.phases.items()
    }
    return dataclasses.replace(config, language_model=Path(), output=Path(), device="auto", **phases)
