"""A model folder that makes videos: what ``generate`` and evaluation share."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reelforge.engine.core import config as configuration
from reelforge.engine.core import rng
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoCodec, VideoSpec, pad_text
from reelforge.engine.flow.sampler import OnStep, initial_noise, step_keys
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.flow.solver import SolverName
from reelforge.engine.model import generation
from reelforge.engine.model.folder import GenerationDefaults, ModelFolder
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.layout import chunk_pattern
from reelforge.engine.model.lora import load_adapter, merge
from reelforge.engine.model.precision import Fp8Policy, fp8_copy
from reelforge.engine.model.weights import load_transformer
from reelforge.kernels.frames import to_uint8


@dataclass(frozen=True)
class GenerateConfig:
    """How to sample; what is not set is the model folder's default.

    Attributes:
        num_steps: solver steps.
        guidance_scale: of classifier-free guidance.
        negative_prompt: what guidance leads away from.
        video: frames, size and rate.
        schedule: kind and flow_shift.
        solver: ``unipc`` or ``euler``.
        chunk_frames: latent frames a chunk; 0 makes all frames at once, otherwise the KV-cached causal decoder runs, by
            Euler steps or by ``denoising_steps``.
        first_chunk_frames: 0 is ``chunk_frames``.
        denoising_steps: a few-step student's timesteps, e.g. [1000, 750, 500, 250]; empty is the ODE.
        context: what a finished chunk leaves for the next ones; its noise needs ``denoising_steps``.
        samples: videos per prompt.
        batch_size: videos a forward.
        device: ``auto`` takes the GPU if there is one.
        precision: of the transformer; ``fp8`` by the default policy, the rest in bf16.
    """

    num_steps: int
    guidance_scale: float
    negative_prompt: str
    video: VideoSpec
    schedule: FlowSchedule
    solver: SolverName = "unipc"
    chunk_frames: int = 0
    first_chunk_frames: int = 0
    denoising_steps: tuple[float, ...] = ()
    context: ContextConfig = ContextConfig()
    samples: int = 1
    batch_size: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        require_positive(self, "samples", "batch_size", "num_steps")

    def weights_dtype(self, device: torch.device) -> torch.dtype:
        """What the transformer is loaded in: on a CPU bf16 is autocast around fp32 weights."""
        return torch.bfloat16 if self.precision != "fp32" and device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Job:
    """One video to make: the ``member``-th of its prompt.

    Attributes:
        request: what the prompt was rewritten from, if it was: its noise is the request's, so that a video with and
            without the rewrite differ by the words alone.
    """

    prompt: str
    member: int
    request: str = ""

    @property
    def prompt_id(self) -> int:
        """Names the noise by the prompt itself, so that other prompts in the run change nothing."""
        return rng.key("prompt:" + (self.request or self.prompt))


class Generator:
    """A loaded model folder that makes batches of videos.

    Args:
        folder: transformer, codec and text encoder.
        config: how to sample.
        seed: names the noise.
    """

    def __init__(self, folder: ModelFolder, config: GenerateConfig, seed: int) -> None:
        if config.precision == "fp8":
            folder = dataclasses.replace(folder, transformer=fp8_copy(folder.transformer, Fp8Policy()))
        self.folder, self.config, self.seed = folder, config, seed
        self.shape = generation.latent_shape(folder.codec, config.video)
        self.pattern: tuple[int, ...] = ()
        if config.chunk_frames:
            self.pattern = chunk_pattern(self.shape[1], config.chunk_frames, config.first_chunk_frames or None)
        elif config.denoising_steps:
            raise ConfigError("denoising_steps is set and chunk_frames is 0.", "Set chunk_frames, e.g. to 3.")
        if config.context.noise and not config.denoising_steps:
            raise ConfigError(f"context.noise is {config.context.noise} without denoising_steps.", "Set it to 0.")

    @property
    def num_evaluations(self) -> int:
        """Network evaluations a video, guidance counted twice, clean passes included."""
        steps = self.grid.num_steps * max(1, len(self.pattern)) + len(self._written)
        return steps * (1 if self.config.guidance_scale == 1.0 else 2)

    @property
    def token_forwards(self) -> int:
        """Tokens through the network a video, whatever the size of a forward: what models of any pattern compare by."""
        frames, tokens = self.shape[1], self.folder.transformer.tokens_per_frame(*self.shape[2:])
        branches = 1 if self.config.guidance_scale == 1.0 else 2
        return (self.grid.num_steps * frames + sum(self._written)) * tokens * branches

    @property
    def _written(self) -> tuple[int, ...]:
        """Latent frames of each chunk that a pass of its own writes for the next ones."""
        return self.pattern[:-1] if self.config.context.kind == "clean" else ()

    @property
    def grid(self) -> Grid:
        few = self.config.denoising_steps
        return self.config.schedule.few_step(few) if few else self.config.schedule.grid(self.config.num_steps)

    def fits(self, prompt: str) -> bool:
        """Whether the text encoder takes the whole prompt."""
        encoder = self.folder.text_encoder
        return encoder.num_tokens(prompt) <= encoder.max_tokens

    def latents(self, jobs: Sequence[Job], on_step: OnStep | None = None) -> Tensor:
        """x0 ``[B, C, T, H, W]`` of a batch of jobs; cancel it by raising from ``on_step``."""
        model = self.folder.transformer
        device = model.proj_out.weight.device
        ids, members = [job.prompt_id for job in jobs], [job.member for job in jobs]
        noise = initial_noise(self.seed, ids, members, self.shape, device=device)
        guidance = self._guidance([job.prompt for job in jobs], device)
        autocast = self.config.precision != "fp32" and model.proj_out.weight.dtype == torch.float32
        with generation.half_precision(device, autocast):
            if not self.pattern:
                return generation.sample_latents(model, guidance, noise, self.grid, self.config.solver, on_step)
            renoise = self._renoise(ids, members, device) if self.config.denoising_steps else None
            return generation.sample_chunks(
                model, guidance, noise, self.grid, self.pattern, renoise, on_step, self.config.context
            )

    def _renoise(self, ids: list[int], members: list[int], device: torch.device) -> Callable[[int], Tensor]:
        keys = step_keys(self.seed, ids, members, self.grid.num_steps, device=device)
        return lambda k: rng.normal(keys[k], self.shape)

    def _guidance(self, prompts: list[str], device: torch.device) -> generation.Guidance:
        encoder = self.folder.text_encoder
        embeddings = encoder.encode([*prompts, self.config.negative_prompt])
        text = pad_text(embeddings, encoder.max_tokens).to(device)
        return generation.Guidance(
            text[:-1], text[-1:].expand(len(prompts), -1, -1).contiguous(), self.config.guidance_scale
        )


def load_served(
    root: Path, transformer: Path | None, adapter: Path | None, dtype: torch.dtype, device: torch.device
) -> ModelFolder:
    """A model folder, with another run's ``transformer`` in it and a LoRA ``adapter`` merged, if there are any."""
    folder = ModelFolder.load(root, dtype, device)
    if transformer is not None:
        folder = dataclasses.replace(folder, transformer=load_transformer(transformer, dtype, device))
    if adapter is not None:
        load_adapter(folder.transformer, adapter)
        merge(folder.transformer)
    return folder


def decode_uint8(codec: VideoCodec, latents: Tensor) -> np.ndarray:
    """Latents ``[B, C, T, H, W]`` to pixels ``[B, F, H, W, 3]`` uint8."""
    return to_uint8(codec.decode(latents.float()).contiguous()).cpu().numpy()


def through_codec(codec: VideoCodec, videos: Tensor, batch_size: int = 64) -> Tensor:
    """Encode and decode uint8 ``[B, F, H, W, 3]``: the best that a model of these latents can show."""
    pixels = (part.permute(0, 4, 1, 2, 3).float() / 127.5 - 1 for part in videos.split(batch_size))
    return torch.cat([torch.from_numpy(decode_uint8(codec, codec.encode(part))) for part in pixels])


def resolve(defaults: GenerationDefaults, overrides: Sequence[str]) -> GenerateConfig:
    """The folder's defaults with ``--set`` laid over them."""
    table = dataclasses.asdict(defaults)
    for override in overrides:
        configuration.override(table, override)
    return configuration.build(GenerateConfig, table)
