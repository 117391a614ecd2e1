"""``reelforge doctor``: what this machine has, what runs on it and why, what is missing; what a recipe will take."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import torch

from reelforge.bench.distill_forecast import Forecast, Ledger, network, price_dmd, price_init, simulated
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware, probe
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.probe import Finding
from reelforge.engine.distill.trainer import DmdTask, Student
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.io.model_files import read_json
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.engine.model.generation import latent_shape
from reelforge.engine.model.layout import chunk_causal, chunk_pattern, packed_teacher_forcing
from reelforge.engine.model.lora import LoraConfig
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig
from reelforge.stages.console import emit
from reelforge.stages.distill_config import DistillConfig, InitPhase

_H200_BYTES = 139.8 * 2**30  # of its 141 GB, what a process can have

# libx264 and libx265 inside PyAV are GPL; reelforge bundles neither.
_ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "h264_nvenc")


def findings() -> dict[str, list[Finding]]:
    """Everything the verb prints, by heading."""
    facts = hardware.hardware()
    machine = [Finding(name.replace("_", " "), str(value)) for name, value in facts.items()]
    machine.append(_precision_advice(facts))
    versions = [Finding(name, version) for name, version in hardware.versions().items()]
    return {
        "Machine": machine,
        "Versions": versions,
        "Kernels": [*probe.kernels(), probe.cuda_library()],
        "Optional packages": probe.optional_packages(),
        "Video encoders": _encoders(),
    }


def _precision_advice(facts: dict[str, object]) -> Finding:
    if "gpu" in facts:
        return Finding("precision", "bf16 on the GPU")
    if facts["bf16_instructions"]:
        return Finding("precision", "bf16 autocast", "this CPU multiplies bf16 natively")
    return Finding("precision", "fp32", 'this CPU has no bf16 instructions: set precision = "fp32"')


def _encoders() -> list[Finding]:
    return [Finding(name, "usable" if name in av.codecs_available else "missing") for name in _ENCODERS]


def plan(config: DistillConfig) -> dict[str, Forecast]:
    """What each phase of a distillation takes on one rank; of the models only the config.json files are read.

    Raises:
        CheckpointError: one is missing or damaged.
        ConfigError: the clip fits neither codec nor chunks.
    """
    defaults = load_generation_defaults(config.teacher)
    vae = read_json(config.teacher / "vae" / "config.json")  # Wan2.1's says its strides only indirectly
    strides = {name: vae.get(name, usual) for name, usual in (("temporal_stride", 4), ("spatial_stride", 8))}
    codec: Any = SimpleNamespace(latent_channels=vae.get("latent_channels", 16), **strides)
    shape = latent_shape(codec, config.video or defaults.video)
    schedule, found = config.schedule or defaults.schedule, {}
    grid = schedule.few_step(config.denoising_steps)
    for name in config.phases:
        with simulated("cpu" if config.device == "cpu" else "cuda") as ledger:
            found[name] = _price(config, name, ledger, shape, schedule, grid)
    return found


def _price(
    config: DistillConfig,
    name: str,
    ledger: Ledger,
    shape: tuple[int, int, int, int],
    schedule: FlowSchedule,
    grid: Grid,
) -> Forecast:
    phase, train = config.phases[name], config.phases[name].train
    half = torch.bfloat16 if train.precision == "bf16" else torch.float32

    def load(folder: Path | None, lora: LoraConfig | None = None, frozen: bool = False) -> WanTransformer:
        wanted = WanConfig.from_dict(read_json((folder or config.teacher) / "transformer" / "config.json"))
        model = network(wanted, half if lora or (frozen and config.device != "cpu") else torch.float32, lora)
        model.gradient_checkpointing = config.gradient_checkpointing
        return model

    def pattern(frames: int) -> tuple[int, ...]:
        return chunk_pattern(frames, config.chunk_frames, config.first_chunk_frames or None)

    student = load(config.student, phase.lora)
    tokens = read_json(config.teacher / "text_encoder" / "config.json").get("max_tokens", 512)  # UMT5's goes unsaid
    text = torch.empty(min(train.micro_batch_size, train.batch_size) + 1, tokens, student.config.text_dim)
    if isinstance(phase, InitPhase):
        layout = (chunk_causal if phase.init.method == "ode" else packed_teacher_forcing)(pattern(shape[1]))
        other = load(phase.teacher or config.student) if phase.init.method == "consistency" else None
        return price_init(ledger, student, other, shape, layout, phase.optimizer, train, text[1:])
    chunks = (shape[1],) if name == "few_step" else pattern(phase.rollout.frames or shape[1])
    critic = load(config.critic, phase.critic_lora)
    teacher = None if phase.critic_lora else load(config.teacher, frozen=True).requires_grad_(False)
    rolled, ids = Student(student, grid, chunks, shape), range(len(text) - 1)
    task = DmdTask(rolled, critic, teacher, text, ids, phase.dmd, phase.rollout, schedule, train)
    return price_dmd(ledger, task, phase.optimizer, phase.critics)


def print_plan(recipe: Path, overrides: list[str], memory: float | None = None) -> int:
    """Print :func:`plan` beside a GPU's memory, GiB; None is this machine's, or an H200's."""
    if "teacher" not in configuration.read_table(recipe):
        raise ConfigError(
            f"{recipe} is not a recipe of distill.",
            "Others are not priced here; `reelforge rlhf RECIPE --plan` is its own.",
        )
    config = configuration.load(DistillConfig, recipe, overrides)
    size = memory * 2**30 if memory else float(hardware.hardware().get("gpu_memory_bytes", _H200_BYTES))
    for name, found in plan(config).items():
        for line in (name, *("  " + line for line in found.lines(size))):
            emit(line)
    return 0


def main(arguments: argparse.Namespace) -> int:
    """The verb."""
    if arguments.plan:
        return print_plan(arguments.plan, arguments.overrides, arguments.memory)
    for heading, lines in findings().items():
        emit(f"{heading}")
        width = max(len(line.subject) for line in lines)
        for line in lines:
            emit(f"  {line.subject:<{width}}  {line.state}" + (f"  ({line.consequence})" if line.consequence else ""))
    return 0
