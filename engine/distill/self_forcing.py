"""Self-forcing with replayed backward: a rollout as inference makes it, then gradients chunk by chunk.

The student decodes chunk after chunk from its own past (Huang et al. 2025, Self-Forcing). A chunk leaves its few steps
at an exit step; that step's prediction is the sample, and the only one with a gradient. Keys and values of the past
are constants: gradients stop at the cache. So the rollout needs no graph at all. It runs without gradient in
:class:`ChunkDecoder`, as ``generate`` does, and keeps each exit step's input; :func:`replay` then repeats one exit step
with gradient against the committed part of the cache as it was. That is the joint graph's gradient with one chunk's
activations in memory instead of all chunks'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.flow.sampler import few_step_state, predict_x0, timesteps
from reelforge.engine.flow.schedule import Grid
from reelforge.engine.model.generation import CLEAN, ChunkDecoder, Renoise, frames_of
from reelforge.engine.model.kv_cache import ContextConfig, KVCache
from reelforge.engine.model.wan import WanTransformer

ExitPolicy = Literal["random", "cycle", "per_chunk", "last"]


def exit_steps(policy: ExitPolicy, seed: int, number: int, chunks: int, num_steps: int) -> list[int]:
    """The step at which each chunk of rollout ``number`` leaves; the same on every rank.

    Args:
        policy: ``random`` draws one for all chunks (Self-Forcing), ``cycle`` takes one after the other (Causal-rCM),
            ``per_chunk`` draws one for each chunk, ``last`` always runs all steps.
    """
    if policy == "last":
        return [num_steps - 1] * chunks
    if policy == "cycle":
        return [number % num_steps] * chunks
    drawn = rng.generator("exit_step", seed, number).integers(num_steps, size=chunks).tolist()
    return drawn if policy == "per_chunk" else drawn[:1] * chunks


@dataclass(frozen=True)
class ExitState:
    """Where a chunk left its rollout.

    Attributes:
        x: input of the exit step, fp32 ``[B,C,frames,H,W]``.
        step: of the few-step grid.
        chunks_before: committed when it was decoded.
        frames: its place in the rollout's latents.
    """

    x: Tensor
    step: int
    chunks_before: int
    frames: slice


@dataclass(frozen=True)
class Rollout:
    """Samples of the student, and what their gradients need.

    Attributes:
        x0: fp32 ``[B,C,T,H,W]``, no graph.
        exits: one a chunk.
        cache: keys and values of the past; constants.
    """

    x0: Tensor
    exits: tuple[ExitState, ...]
    cache: KVCache


@torch.no_grad()
def roll_out(
    decoder: ChunkDecoder,
    noise: Tensor,
    grid: Grid,
    renoise: Renoise,
    pattern: Sequence[int],
    exits: Sequence[int],
    context: ContextConfig = CLEAN,
    goes_on: bool = False,
) -> Rollout:
    """Decode the next ``sum(pattern)`` latent frames of a batch of videos.

    Args:
        decoder: holds the past, nothing at first.
        noise: fp32 ``[B,C,T,H,W]`` with T = sum(pattern).
        grid: the student's few steps.
        renoise: fresh noise ``[B,C,T,H,W]`` after step k; k = N - 1 is the context's.
        pattern: latent frames of each chunk.
        exits: exit step of each chunk.
        context: what a finished chunk leaves for the next ones.
        goes_on: commit the last chunk too, for a later call that continues the videos.
    """
    parts: list[Tensor] = []
    states: list[ExitState] = []
    start = 0
    for frames, step in zip(pattern, exits, strict=True):
        span, velocity, before = slice(start, start + frames), decoder.velocity(frames), len(decoder.cache.slots)
        x = few_step_state(velocity, noise[:, :, span], grid, frames_of(renoise, span), step)
        x0 = predict_x0(x, velocity(x, timesteps(grid, step, x)), grid, step)
        states.append(ExitState(x, step, before, span))
        parts.append(x0)
        start += frames
        if goes_on or start < sum(pattern):
            noisy = frames_of(renoise, span)(grid.num_steps - 1) if context.noise else None
            decoder.commit(x0, context, noisy)
    return Rollout(torch.cat(parts, dim=2), tuple(states), decoder.cache)


def replay(model: WanTransformer, rollout: Rollout, state: ExitState, text: Tensor, grid: Grid) -> Tensor:
    """A chunk's exit step once more, with gradient.

    Args:
        model: the student.
        text: embeddings ``[B,S,E]``, projected anew: a prompt's keys and values have gradients too.

    Returns:
        x0 ``[B,C,frames,H,W]`` in fp32.
    """
    frames = state.x.shape[2]
    tokens = frames * model.tokens_per_frame(*state.x.shape[-2:])
    chunk = rollout.cache.upto(state.chunks_before).denoising(frames, tokens)
    velocity = model(state.x, timesteps(grid, state.step, state.x), text, chunk=chunk)
    return predict_x0(state.x, velocity, grid, state.step)
