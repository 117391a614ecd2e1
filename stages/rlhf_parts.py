"""From a recipe to the parts of an RLHF run: what is wrong with a recipe is found here, before anything is written."""

import copy
import dataclasses
import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.metrics import JsonlLog
from reelforge.engine.core.types import VideoCodec
from reelforge.engine.io.model_files import read_json
from reelforge.engine.model.folder import GenerationDefaults, load_codec, load_generation_defaults, load_text_encoder
from reelforge.engine.model.generation import latent_shape
from reelforge.engine.model.generator import decode_uint8
from reelforge.engine.model.lora import lora_parameters
from reelforge.engine.model.text import Umt5TextEncoder
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rewards.contract import Scorer
from reelforge.engine.rewards.registry import build_scorers
from reelforge.engine.rewards.scoring import Decode, Scoring
from reelforge.engine.rl.advantage import Fusion
from reelforge.engine.rl.monitor import Kind, Monitor, Sampling
from reelforge.engine.rl.origin import origin
from reelforge.engine.rl.plan import Planner
from reelforge.engine.rl.policy import Policy
from reelforge.engine.rl.prompts import encode_prompts, read_prompts
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.engine.rl.rollout import Sampler
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.engine.train.start import load_for_training
from reelforge.engine.train.state import TrainState


@dataclass(frozen=True)
class Parts:
    """A run before its first step; prompts have blank embeddings until :func:`encode`.

    Attributes:
        task: losses and facts.
        state: what is trained.
        monitor: None without ``[held_out]``.
        origin: hashes of what it starts from.
    """

    task: GrpoTask
    state: TrainState
    monitor: Monitor | None
    origin: dict[str, str]


def build(config: RlhfConfig, device: torch.device) -> Parts:
    """Load and connect everything.

    Raises:
        ConfigError, DataError, CheckpointError: as named.
    """
    defaults, prompts = sampling_defaults(config), read_prompts(config.prompts)
    rollout, seed = config.rollout, config.train.seed
    planner = Planner(config.plan, seed, len(prompts.prompts), config.train.batch_size, rollout.num_steps)
    grid = (rollout.schedule or defaults.schedule).grid(rollout.num_steps)
    scorers = build_scorers(config.rewards, defaults.video)
    codec = load_codec(config.model, device)
    shape = latent_shape(codec, defaults.video)
    model = load_for_training(config.model, config.lora, config.train, config.gradient_checkpointing, device)
    parameters = _trained(config, model)
    frozen = config.loss.kl.weight > 0 and not config.lora
    reference = copy.deepcopy(model).requires_grad_(False) if frozen else None
    text = _blank_text(config, model).expand(len(prompts.prompts) + 1, -1, -1)
    policy = Policy(model, text, rollout.path, config.train.precision, reference)
    sampler = Sampler(
        config.plan, grid, rollout.noise, prompts.ids, shape, seed, rollout.batch_rows,
        config.train.micro_batch_size,
    )  # fmt: skip
    scoring = Scoring(scorers, _decoder(codec), config.scoring)
    fusion = Fusion(config.fusion, scoring.axes)
    task = GrpoTask(
        policy, sampler, planner, scoring, fusion, prompts, config.loss, config.updates_per_rollout,
        rollout.batch_groups, config.pace, lambda records: _note_bad_samples(config.output, records),
    )  # fmt: skip
    carried = {"fusion_running": fusion.running, **task.pace.carried}
    state = TrainState(parameters, config.optimizer, config.train.steps, carried, task.pace)
    started = origin(prompts, grid, model.parameters(), codec.fingerprint)
    return Parts(task, state, _monitor(config, task, scorers), started)


def sampling_defaults(config: RlhfConfig) -> GenerationDefaults:
    """The model folder's, for clips of the recipe's size."""
    defaults = load_generation_defaults(config.model)
    return dataclasses.replace(defaults, video=config.video or defaults.video)


def encode(config: RlhfConfig, parts: Parts) -> None:
    """Embed all prompts, or find them embedded in the run directory."""
    policy, monitor, training = parts.task.policy, parts.monitor, parts.task.prompts.prompts
    watched = monitor.prompts.prompts if monitor else ()
    negative = load_generation_defaults(config.model).negative_prompt
    path = config.output / "text.safetensors"
    policy.text = encode_prompts(lambda: load_text_encoder(config.model), (*training, *watched), negative, path)
    if monitor:
        monitor.text = policy.text[len(training) :]


def _decoder(codec: VideoCodec) -> Decode:
    return lambda latents: torch.from_numpy(decode_uint8(codec, latents))


def _blank_text(config: RlhfConfig, model: WanTransformer) -> Tensor:
    """A plan needs the embeddings' shape, not a text encoder of 11 GB: zeros ``[1, S, E]``."""
    table = read_json(config.model / "text_encoder" / "config.json")
    return torch.zeros(1, table.get("max_tokens", Umt5TextEncoder.max_tokens), model.config.text_dim)


def _monitor(config: RlhfConfig, task: GrpoTask, rewards: list[Scorer]) -> Monitor | None:
    """The rewards' own scorers, the held-out ones, and the picture's statistics unless they are among these."""
    wanted = config.held_out
    if wanted is None:
        return None
    defaults, policy = sampling_defaults(config), task.policy
    autocast = config.train.precision == "bf16" and policy.model.proj_out.weight.dtype == torch.float32
    sampling = Sampling(
        defaults.schedule.grid(defaults.num_steps), defaults.guidance_scale, task.sampler.shape, config.train.seed,
        autocast,
    )  # fmt: skip
    picture = () if "picture" in (*config.rewards, *wanted.scorers) else ("picture",)
    scorers: dict[Kind, list[Scorer]] = {
        "reward": rewards,
        "held_out": build_scorers(wanted.scorers, defaults.video),
        "picture": build_scorers(picture, defaults.video),
    }
    prompts, decode = read_prompts(wanted.prompts), task.scoring.decode
    return Monitor(wanted, policy.model, prompts, policy.text, sampling, scorers, decode, config.scoring)


def _note_bad_samples(output: Path, records: list[dict[str, Any]]) -> None:
    if distributed.rank() == 0:
        with JsonlLog(output / "bad_samples.jsonl") as log:
            for record in records:
                log.write(**record)


def _trained(config: RlhfConfig, model: WanTransformer) -> dict[str, nn.Parameter]:
    """The weights that train; all others are frozen."""
    if config.lora:
        return dict(lora_parameters(model))
    every = dict(model.named_parameters())
    patterns = config.trainable or ("*",)
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise ConfigError(f"trainable: {pattern!r} matches no weight.", f"A weight is called {next(iter(every))}.")
    model.requires_grad_(False)
    chosen = {
        name: parameter
        for name, parameter in every.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen
