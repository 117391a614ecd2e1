"""GRPO on a set of prompts: rollouts, rewards, one optimizer step per iteration; full weights or a LoRA adapter."""

import argparse
import copy
import dataclasses
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.core.types import VideoCodec
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.model.folder import load_codec, load_generation_defaults, load_text_encoder
from reelforge.engine.model.generation import latent_shape
from reelforge.engine.model.generator import decode_uint8
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters, save_adapter
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.engine.rewards.registry import build_scorers
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.advantage import Fusion, FusionConfig
from reelforge.engine.rl.loss import LossConfig
from reelforge.engine.rl.plan import PlanConfig, Planner
from reelforge.engine.rl.policy import PathConfig, Policy
from reelforge.engine.rl.prompts import encode_prompts, read_prompts
from reelforge.engine.rl.rollout import Sampler
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.engine.train.loop import Hooks, LoopConfig, TrainLoop
from reelforge.engine.train.state import OptimizerConfig, TrainState
from reelforge.stages.console import emit
from reelforge.stages.sft import last_metrics

PRESETS = Path(__file__).resolve().parents[1] / "recipes" / "presets"


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
        plan: groups, initial noises, stochastic steps.
        rollout: sampler.
        scoring: patience with the scorers.
        fusion: rewards to advantages.
        loss: objective.
        train: length and rhythm; ``steps`` are optimizer steps, ``batch_size`` prompts an iteration,
            ``micro_batch_size`` states a training forward.
        updates_per_rollout: optimizer steps on one rollout.
        optimizer: AdamW.
        lora: train an adapter of this shape; none trains the weights.
        trainable: patterns of the weights that train without an adapter, e.g. ``["blocks.*.weight"]``; empty is all.
        gradient_checkpointing: recompute activations in the backward pass.
        device: ``auto`` takes the GPU if there is one.
    """

    model: Path
    prompts: Path
    output: Path
    rewards: tuple[str, ...]
    plan: PlanConfig = PlanConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    train: LoopConfig = LoopConfig()
    updates_per_rollout: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    trainable: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class RlhfResult:
    """What a run left: averaged weights, optimizer steps, and the last lines of the metrics merged."""

    weights: Path
    steps: int
    metrics: dict[str, Any]


def run(config: RlhfConfig) -> RlhfResult:
    """Train, or continue, to the last step and write the averaged weights."""
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        if distributed.rank() == 0:
            RunDir.open(config.output, config, identity(config))
        distributed.barrier()
        weights = config.output / ("adapter" if config.lora else "transformer")
        if weights.exists():
            say(f"{config.output} is finished: {weights} is there.")
        else:
            _train(config, device, weights)
    return RlhfResult(weights, config.train.steps, last_metrics(config.output))


def identity(config: RlhfConfig) -> str:
    """Hash of what decides the weights."""
    train = dataclasses.replace(config.train, log_every=1, checkpoint_every=1, keep_last=1)
    plain = dataclasses.replace(
        config, model=config.model.resolve(), prompts=config.prompts.resolve(), output=Path(), train=train,
        gradient_checkpointing=False, device="auto", scoring=ScoringConfig(),
    )  # fmt: skip
    return configuration.fingerprint(plain)


def build(config: RlhfConfig, device: torch.device) -> tuple[GrpoTask, TrainState]:
    """The run's parts, from a config."""
    defaults = load_generation_defaults(config.model)
    codec = load_codec(config.model, device)
    prompts = read_prompts(config.prompts)
    text = encode_prompts(
        lambda: load_text_encoder(config.model), prompts.prompts, defaults.negative_prompt,
        config.output / "text.safetensors",
    )  # fmt: skip
    model = _load_model(config, device)
    parameters = _trained(config, model)
    reference = None
    if config.loss.kl.weight and not config.lora:
        reference = copy.deepcopy(model).requires_grad_(False)
    policy = Policy(model, text, config.rollout.path, config.train.precision, reference)
    grid = (config.rollout.schedule or defaults.schedule).grid(config.rollout.num_steps)
    planner = Planner(
        config.plan, config.train.seed, len(prompts.prompts), config.train.batch_size, config.rollout.num_steps
    )
    sampler = Sampler(
        config.plan, grid, config.rollout.noise, prompts.ids, latent_shape(codec, defaults.video), config.train.seed,
        config.rollout.batch_rows, config.train.micro_batch_size,
    )  # fmt: skip
    scoring = Scoring(build_scorers(config.rewards, defaults.video), _decoder(codec), config.scoring)
    fusion = Fusion(config.fusion, scoring.axes)
    task = GrpoTask(
        policy, sampler, planner, scoring, fusion, prompts, config.loss, config.updates_per_rollout,
        config.rollout.batch_groups,
    )  # fmt: skip
    state = TrainState(
        parameters, config.optimizer, config.train.steps, {"fusion_running": fusion.running}, task.cosine
    )
    return task, state


def _decoder(codec: VideoCodec) -> Any:
    return lambda latents: torch.from_numpy(decode_uint8(codec, latents))


def _train(config: RlhfConfig, device: torch.device, weights: Path) -> None:
    task, state = build(config, device)
    loop = TrainLoop(state, config.train, RunDir(config.output), identity(config), "rlhf")
    loop.resume()
    loop.fit(Hooks(task.losses, describe=task.describe, stride=config.updates_per_rollout))
    if distributed.rank() == 0:
        with state.ema.applied():
            model = task.policy.model
            save_adapter(model, weights) if config.lora else save_transformer(model, weights)
    distributed.barrier()


def _load_model(config: RlhfConfig, device: torch.device) -> WanTransformer:
    frozen_bf16 = config.lora is not None and config.train.precision == "bf16"
    model = load_transformer(config.model / "transformer", torch.bfloat16 if frozen_bf16 else None, device)
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.lora:
        inject(model, config.lora, config.train.seed)
    return model


def _trained(config: RlhfConfig, model: WanTransformer) -> dict[str, nn.Parameter]:
    """The weights that train; all others are frozen."""
    if config.lora:
        return dict(lora_parameters(model))
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not config.trainable or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.trainable)
    }
    if not chosen:
        raise ConfigError(f"trainable = {list(config.trainable)} matches no weight.", 'Try ["blocks.*.weight"].')
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints where the weights are and the last measurements."""
    overlays = (PRESETS / f"{arguments.preset}.toml",) if arguments.preset else ()
    result = run(configuration.load(RlhfConfig, arguments.recipe, arguments.overrides, overlays))
    emit(json.dumps({"weights": str(result.weights), "steps": result.steps, **result.metrics}))
    return 0
