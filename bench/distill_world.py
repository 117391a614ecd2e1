"""The three networks of self-forcing and what they share: a model folder's, or random weights at a published shape."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reelforge.bench import block, measure, rl_cost, wan_cost
from reelforge.bench.cases import case as sizes
from reelforge.bench.cases.case import Shape
from reelforge.bench.distill_cost import Layout, Network
from reelforge.bench.miniature import Case
from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.distill.trainer import Student
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.layout import chunk_pattern
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import storage_dtype

Precision = Literal["bf16", "fp32"]
STUDENT = "1.3B"
STEPS = (1000.0, 750.0, 500.0, 250.0)
CHUNK_FRAMES, FRAMES = 3, 21  # latent
_SHIFT, _GUIDANCE, _HEAD_STD = 5.0, 4.0, 0.02
_SLICE_LAYERS = 2
_CASE_BATCH = 8  # of a case's clips: the joint graph of all chunks is among what runs
_SMALL_LATENT, _SMALL_FRAMES, _SMALL_LAYERS, _SMALL_TEXT = (16, 4, 6), 9, 3, 8


@dataclass(frozen=True)
class World:
    """The parts.

    Attributes:
        name: of the student, ``"1.3B"``, a case's or a folder's.
        teacher_name: likewise.
        student: with its few steps and chunks.
        critic: of any size.
        teacher: frozen, bf16 on a GPU.
        slice_layers: of the network that the joint graph of all chunks is built of: all, or a few where that of the
            student would not fit.
        text: ``[B + 1, S, E]``, the negative prompt last.
        guidance: of the teacher.
        schedule: warps noise levels.
        precision: of the training passes.
    """

    name: str
    teacher_name: str
    student: Student
    critic: WanTransformer
    teacher: WanTransformer
    slice_layers: int
    text: Tensor
    guidance: float
    schedule: FlowSchedule
    precision: Precision

    @property
    def device(self) -> torch.device:
        return self.student.model.proj_out.weight.device

    @property
    def batch(self) -> int:
        """Clips."""
        return len(self.text) - 1

    @cached_property
    def ids(self) -> list[int]:
        """Names of the prompts."""
        return [rng.key("distill_bench_prompt", row) for row in range(self.batch)]

    @property
    def layout(self) -> Layout:
        frame_tokens = self.student.model.tokens_per_frame(*self.student.shape[-2:])
        return Layout(self.student.pattern, frame_tokens, self.text.shape[1], self.batch)

    def network(self, model: WanTransformer, name: str) -> Network:
        """One of the three, for the arithmetic."""
        config, tokens = model.config, sum(self.layout.pattern) * self.layout.frame_tokens
        shape = Shape(name, config.width, config.num_attention_heads, config.ffn_dim, tokens)
        return Network(shape, config.num_layers, model.gradient_checkpointing)

    def sliced(self) -> "World":
        """The same with a student of so many layers."""
        config = self.student.model.config
        if self.slice_layers == config.num_layers:
            return self
        few = _network({**config.to_dict(), "num_layers": self.slice_layers}, 0, self.device)
        return replace(self, student=replace(self.student, model=few))


def label(teacher: str, *, small: bool = False) -> str:
    """Of the world that :func:`from_shape` makes; says what a record's case is before there is one."""
    (_, height, width), frames = _latent(small)
    return _label(STUDENT, frames * (height // 2) * (width // 2), teacher, CHUNK_FRAMES, 1)


def label_of(world: World) -> str:
    tokens = sum(world.student.pattern) * world.layout.frame_tokens
    return _label(world.name, tokens, world.teacher_name, max(world.student.pattern), world.batch)


def _label(student: str, tokens: int, teacher: str, chunk_frames: int, batch: int) -> str:
    return f"{student} {tokens} teacher {teacher} chunk {chunk_frames} N {len(STEPS)} B {batch}"


def from_shape(teacher: str, device: torch.device, *, small: bool = False) -> World:
    """Random weights: student and critic of 1.3B, ``teacher`` ``"1.3B"`` or ``"14B"``, 480 x 832 x 81; or tiny.

    The teacher is made first: its fp32 weights pass through memory that the others take later.
    """
    (channels, height, width), frames = _latent(small)
    half = device.type == "cuda"
    judge = _network(_config(teacher, small), 2, device, torch.bfloat16 if half else torch.float32)
    measure.release(device)
    student, critic = (_network(_config(STUDENT, small), seed, device) for seed in (0, 1))
    student.gradient_checkpointing = critic.gradient_checkpointing = True
    text = _random_text(1, _SMALL_TEXT if small else wan_cost.TEXT_TOKENS, student)
    shape, models = (channels, frames, height, width), (student, critic, judge)
    made = _world(STUDENT, teacher, models, shape, CHUNK_FRAMES, text, "bf16" if half else "fp32")
    return replace(made, slice_layers=_SLICE_LAYERS)


def from_case(case: Case, device: torch.device | None = None, chunk_frames: int = 1) -> World:
    """Random weights of a benchmark's miniature, all three networks alike."""
    device = device or torch.device("cpu")
    models = tuple(_network(case.config, seed, device) for seed in range(3))
    shape = case.latents[1:]
    text = _random_text(min(case.latents[0], _CASE_BATCH), case.text_tokens, models[0])
    return _world(case.name, case.name, models, shape, chunk_frames, text, "fp32")


def from_folder(folder: Path, device: torch.device, chunk_frames: int, batch: int) -> World:
    """A model folder for all three; the student's weights are not causal, its time is the same.

    Raises:
        CheckpointError: it is not a model folder.
        ConfigError: its clip does not split into chunks, or there is none.
    """
    if batch < 1:
        raise ConfigError(f"The batch is {batch}.", "A cycle has at least one clip.")
    from reelforge.engine.model.folder import load_codec, load_generation_defaults, load_text_encoder
    from reelforge.engine.model.generation import latent_shape
    from reelforge.engine.model.weights import load_transformer

    shape = latent_shape(load_codec(folder), load_generation_defaults(folder).video)
    half = torch.bfloat16 if device.type == "cuda" else None
    models = tuple(load_transformer(folder / "transformer", dtype, device) for dtype in (None, None, half))
    name = folder.resolve().name
    text = _random_text(batch, load_text_encoder(folder).max_tokens, models[0])
    return _world(name, name, models, shape, chunk_frames, text, "bf16")


def _world(
    name: str,
    teacher_name: str,
    models: tuple[WanTransformer, ...],
    shape: tuple[int, ...],
    chunk_frames: int,
    text: Tensor,
    precision: Precision,
) -> World:
    student, critic, teacher = models
    channels, frames, height, width = shape
    schedule = FlowSchedule(flow_shift=_SHIFT)
    pattern = chunk_pattern(frames, chunk_frames)
    learner = Student(student, schedule.few_step(STEPS), pattern, (channels, frames, height, width))
    text = text.to(student.proj_out.weight.device)
    return World(
        name, teacher_name, learner, critic, teacher.requires_grad_(False), student.config.num_layers, text, _GUIDANCE,
        schedule, precision,
    )  # fmt: skip


def _config(name: str, small: bool) -> dict[str, int]:
    shape = Shape(name, *sizes.MODELS[name], tokens=0)
    return rl_cost.transformer_config(shape, _SMALL_LAYERS if small else wan_cost.LAYERS[name])


def _latent(small: bool) -> tuple[tuple[int, int, int], int]:
    """Channels, height and width, and frames."""
    return (_SMALL_LATENT, _SMALL_FRAMES) if small else (block.LATENT, FRAMES)


def _network(
    config: Mapping[str, int], seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> WanTransformer:
    model = WanTransformer.from_config(config, seed, device)
    head = model.proj_out.weight  # zero at first, and so would be every velocity
    head.data = _HEAD_STD * rng.normal([rng.key("distill_bench_head", seed)], head.shape, device)[0]
    for weight, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(weight, dtype))
    return model


def _random_text(batch: int, tokens: int, model: WanTransformer) -> Tensor:
    keys = [rng.key("distill_bench_text", row) for row in range(batch + 1)]
    return rng.normal(keys, (tokens, model.config.text_dim))
