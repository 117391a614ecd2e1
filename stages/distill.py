"""Distillation into a causal few-step student: distribution matching, causal initialisation, self-forcing."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import phase_facts
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir, check_same
from reelforge.engine.flow.sampler import initial_noise, step_keys
from reelforge.engine.io.video import write_video
from reelforge.engine.model.folder import (
    GenerationDefaults,
    derive_model_folder,
    load_codec,
    load_generation_defaults,
    load_text_encoder,
)
from reelforge.engine.model.generator import decode_uint8
from reelforge.engine.model.lora import merge
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.engine.rl.origin import check_continued, check_ranks
from reelforge.engine.rl.prompts import encode_prompts, read_prompts
from reelforge.engine.train.loop import Hooks, TrainLoop
from reelforge.stages import doctor
from reelforge.stages.console import emit
from reelforge.stages.distill_config import DistillConfig, decisive
from reelforge.stages.distill_parts import Parts, Setup, build, set_up
from reelforge.stages.rlhf_watch import best_effort


@dataclass(frozen=True)
class DistillResult:
    """What a run left.

    Attributes:
        model: finished model folder.
        seconds: of training, by phase.
        metrics: the last lines of each phase's metrics, merged.
    """

    model: Path
    seconds: dict[str, float]
    metrics: dict[str, dict[str, Any]]


def run(config: DistillConfig) -> DistillResult:
    """Run, or continue, every phase, and write the student's model folder.

    Raises:
        Interrupted: a signal asked to stop; calling again continues.
        ConfigError, DataError, CheckpointError, StorageError, TrainingError: as named.
    """
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        check_same(config, config.output / "config.resolved.toml", decisive)
        model = config.output / "model"
        if model.exists():
            say(f"{config.output} is finished: {model} is there.")
        else:
            _distill(config, device, model)
    return DistillResult(model, *phase_facts(config.output, config.phases))


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints where the student is, and each phase's seconds and last measurements; or the plan."""
    if arguments.plan:
        return doctor.print_plan(arguments.recipe, arguments.overrides)
    result = run(configuration.load(DistillConfig, arguments.recipe, arguments.overrides))
    emit(json.dumps({"model": str(result.model), "seconds": result.seconds, **result.metrics}))
    return 0


def identity(config: DistillConfig) -> str:
    """Hash of what decides the weights."""
    return configuration.fingerprint(decisive(config))


def _distill(config: DistillConfig, device: torch.device, model: Path) -> None:
    setup = set_up(config, device)
    check_ranks(setup.origin | {"recipe": identity(config)}, device)
    _open(config, setup)
    prompts = read_prompts(config.prompts).prompts
    defaults = load_generation_defaults(config.teacher)
    path = config.output / "text.safetensors"
    text = encode_prompts(lambda: load_text_encoder(config.teacher), prompts, defaults.negative_prompt, path)
    before = config.student or config.teacher
    for name in config.phases:
        if not (config.output / name / "transformer").exists():
            _train(config, name, before, setup, text)
        before = config.output / name
    if distributed.rank() == 0:
        student = load_transformer(before / "transformer")
        derive_model_folder(config.teacher, model, student, _sampled_by(config, setup))
    distributed.barrier()


def _open(config: DistillConfig, setup: Setup) -> None:
    """The output folder; refuses one that was started from something else."""
    path = config.output / "origin.json"
    if path.exists():
        check_continued(json.loads(path.read_text(encoding="utf-8")), setup.origin)
    distributed.barrier()
    if distributed.rank() == 0:
        RunDir.open(config.output, config, identity(config))
        replace_file(path, json.dumps(setup.origin, indent=1))
    distributed.barrier()


def _train(config: DistillConfig, name: str, before: Path, setup: Setup, text: Tensor) -> None:
    root, phase, parts = config.output / name, config.phases[name], build(config, name, setup, before, text)
    if distributed.rank() == 0:
        RunDir.open(root, phase, identity(config))
    distributed.barrier()
    run_dir = RunDir(root)
    loop = TrainLoop(parts.state, phase.train, run_dir, "-".join((identity(config), *setup.origin.values())), name)
    loop.resume()
    look = _previews(config, parts, setup, text, run_dir)
    loop.fit(Hooks(parts.losses, look, parts.describe, stride=parts.stride))
    if distributed.rank() == 0:
        with parts.student.ema.applied():
            if phase.lora:  # what an adapter is merged into must not be rounded to the run's precision
                whole = load_transformer(before / "transformer", device=setup.device).state_dict()
                parts.model.load_state_dict(whole, strict=False, assign=True)
            merge(parts.model)
            save_transformer(parts.model, root / "transformer")
    distributed.barrier()


def _previews(
    config: DistillConfig, parts: Parts, setup: Setup, text: Tensor, run_dir: RunDir
) -> Callable[[int], dict[str, Any]]:
    """A hook that writes videos of the first prompts with the averaged weights, those that ``generate`` would make of
    the phase's seed; ranks share the prompts."""
    codec, fps = load_codec(config.teacher, setup.device), setup.defaults.video.fps

    def look(step: int) -> dict[str, Any]:
        folder = run_dir.samples / f"step-{step:08d}"
        with parts.student.ema.applied():
            for number in range(distributed.rank(), min(config.previews, len(text) - 1), distributed.world_size()):
                seed, named, shape = parts.seed, [setup.prompts.ids[number]], setup.shape
                noise = initial_noise(seed, named, [0], shape, device=setup.device)
                keys = step_keys(seed, named, [0], setup.grid.num_steps, device=setup.device)
                latents = parts.sample(text[number][None].to(setup.device), noise, keys)
                with best_effort():
                    write_video(folder / f"{number:02d}.mp4", decode_uint8(codec, latents)[0], fps)
        return {}

    return look


def _sampled_by(config: DistillConfig, setup: Setup) -> GenerationDefaults:
    """How the student is sampled by default."""
    pattern = setup.pattern if config.causal else (setup.shape[1],)
    first = pattern[0] if pattern[0] != pattern[-1] else 0
    sampled = dataclasses.replace(
        setup.defaults, schedule=setup.schedule, chunk_frames=pattern[-1], first_chunk_frames=first
    )
    if config.causal_init and not config.causal_init.few_step and not config.self_forcing:
        return sampled
    context = config.self_forcing.rollout.context if config.self_forcing else sampled.context
    return dataclasses.replace(sampled, guidance_scale=1.0, denoising_steps=config.denoising_steps, context=context)
