"""From prompts' embeddings to latents with one transformer: all frames at once, or chunk by chunk against a KV cache.

Previews, evaluation and ``generate`` all come through here, so they sample alike.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import Velocity, VideoCodec, VideoSpec
from reelforge.engine.flow.sampler import OnStep, guided, sample_few_step, sample_ode
from reelforge.engine.flow.schedule import TIMESTEPS, Grid
from reelforge.engine.flow.solver import SolverName
from reelforge.engine.model.kv_cache import ChunkPass, ContextConfig
from reelforge.engine.model.wan import TextContext, WanTransformer

CLEAN = ContextConfig()
Renoise = Callable[[int], Tensor]  # fresh noise [B, C, T, H, W] after step k


@dataclass(frozen=True)
class Guidance:
    """What the samples are conditioned on.

    Attributes:
        text: ``[B, S, E]``.
        negative: ``[B, S, E]``; unused at scale 1.
        scale: of classifier-free guidance; 1 is none.
    """

    text: Tensor
    negative: Tensor
    scale: float

    @property
    def rows(self) -> Tensor:
        """The text of one forward: negative and positive prompts, or the positive ones alone."""
        return self.text if self.scale == 1.0 else torch.cat((self.negative, self.text))


def latent_shape(codec: VideoCodec, video: VideoSpec) -> tuple[int, int, int, int]:
    """``(C, T, H, W)`` of a clip.

    Raises:
        ConfigError: frames or size do not fit the codec's strides; names the nearest that do.
    """
    stride = codec.temporal_stride
    steps, left = divmod(video.num_frames - 1, stride)
    if video.num_frames < 1 or left:
        below = max(steps, 0) * stride + 1
        raise ConfigError(
            f"num_frames is {video.num_frames}; the codec needs 1 + {stride} k.", f"Use {below} or {below + stride}."
        )
    for name, size in (("height", video.height), ("width", video.width)):
        if size < codec.spatial_stride or size % codec.spatial_stride:
            raise ConfigError(f"{name} is {size}.", f"It must be a multiple of {codec.spatial_stride}.")
    return codec.latent_channels, steps + 1, video.height // codec.spatial_stride, video.width // codec.spatial_stride


def half_precision(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """bf16 autocast around fp32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def sample_latents(
    model: WanTransformer,
    guidance: Guidance,
    noise: Tensor,
    grid: Grid,
    solver: SolverName = "unipc",
    on_step: OnStep | None = None,
) -> Tensor:
    """All frames at once by the ODE.

    Args:
        noise: ``[B, C, T, H, W]`` fp32.
        grid: the schedule's steps.

    Returns:
        x0 ``[B, C, T, H, W]`` fp32.
    """
    context = model.text_context(guidance.rows)
    return sample_ode(_velocity(model, guidance, context), noise, grid, solver, on_step)


@torch.no_grad()
def sample_chunks(
    model: WanTransformer,
    guidance: Guidance,
    noise: Tensor,
    grid: Grid,
    pattern: Sequence[int],
    renoise: Renoise | None = None,
    on_step: OnStep | None = None,
    context: ContextConfig = CLEAN,
) -> Tensor:
    """Chunk by chunk against a KV cache: denoise a chunk, then write its clean keys and values, then the next.

    Args:
        noise: ``[B, C, T, H, W]`` fp32 with T = sum(pattern).
        grid: of one chunk; a few-step grid with ``renoise``, or the ODE's (Euler) without.
        pattern: latent frames of each chunk.
        renoise: fresh noise ``[B, C, T, H, W]`` after step k of the few-step sampler; k = N - 1 is the context's.
        context: what a finished chunk leaves for the next ones; its noise needs ``renoise``.

    Returns:
        x0 ``[B, C, T, H, W]`` fp32.
    """
    assert renoise is not None or not context.noise, "the context's noise needs renoise"
    decoder = ChunkDecoder(model, guidance, max(pattern), sum(pattern), noise.shape[-2:])
    chunks: list[Tensor] = []
    for frames in pattern:
        span, velocity = decoder.span(frames), decoder.velocity(frames)
        if renoise is None:
            x0 = sample_ode(velocity, noise[:, :, span], grid, "euler", on_step)
        else:
            x0 = sample_few_step(velocity, noise[:, :, span], grid, frames_of(renoise, span), on_step)
        chunks.append(x0)
        if len(chunks) < len(pattern):
            fresh = renoise(grid.num_steps - 1)[:, :, span] if renoise is not None and context.noise else None
            decoder.commit(x0, context, fresh)
    return torch.cat(chunks, dim=2)


class ChunkDecoder:
    """A batch of videos that grow chunk by chunk; decodes samples, and rolls out a student under distillation.

    Args:
        model: the causal transformer.
        guidance: prompts; their keys and values are projected here, once.
        chunk_frames: of the largest chunk.
        max_frames: latent frames that the cache holds.
        size: height and width of the latents.
    """

    def __init__(
        self, model: WanTransformer, guidance: Guidance, chunk_frames: int, max_frames: int, size: Sequence[int]
    ) -> None:
        self.model, self.guidance = model, guidance
        self.cache = model.new_cache(len(guidance.rows), chunk_frames, max_frames, *size)
        self.tokens_per_frame = model.tokens_per_frame(*size)
        with torch.no_grad():
            self.text = model.text_context(guidance.rows)

    def span(self, frames: int) -> slice:
        """Latent frames of the next chunk."""
        return slice(self.cache.next_frame, self.cache.next_frame + frames)

    def velocity(self, frames: int) -> Velocity:
        """Guided, of the next chunk at any step, without trace in the committed part of the cache."""
        chunk = self.cache.denoising(frames, frames * self.tokens_per_frame)
        return _velocity(self.model, self.guidance, self.text, chunk)

    @torch.no_grad()
    def commit(self, x0: Tensor, context: ContextConfig = CLEAN, noise: Tensor | None = None) -> None:
        """Make a finished chunk visible to the next ones.

        Args:
            x0: ``[B, C, frames, H, W]``.
            context: what they see of it.
            noise: standard normal, like ``x0``; needed for a noisy context alone.
        """
        frames = x0.shape[2]
        tokens = frames * self.tokens_per_frame
        if context.kind == "last_step":
            self.cache.keep(frames, tokens)
            return
        if noise is not None:
            x0 = torch.lerp(x0, noise.to(x0), context.noise)
        clean, rows = self.cache.clean(frames, tokens), len(self.guidance.rows)
        timestep = torch.full((rows,), TIMESTEPS * context.noise, device=x0.device)
        self.model(x0.repeat(rows // len(x0), 1, 1, 1, 1), timestep, self.text, chunk=clean)
        self.cache.commit(clean)


def _velocity(
    model: WanTransformer, guidance: Guidance, context: TextContext, chunk: ChunkPass | None = None
) -> Velocity:
    """The guided velocity; text is projected once, in ``context``, not once a step."""

    def call(x: Tensor, timestep: Tensor, _: Tensor) -> Tensor:
        return model(x, timestep, context, chunk=chunk)

    return guided(call, guidance.text, guidance.negative, guidance.scale)


def frames_of(renoise: Renoise, span: slice) -> Renoise:
    return lambda k: renoise(k)[:, :, span]
