"""Batches and losses of the causal initialisation; all of them functions of the step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.data.latents import LatentCache
from reelforge.engine.distill.causal_init import (
    CausalInitConfig,
    Network,
    PackedVelocity,
    consistency_losses,
    draw_levels,
    packed,
    per_chunk,
    regression_losses,
    teacher_forcing_losses,
)
from reelforge.engine.distill.pairs import Pairs
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.model.generation import half_precision
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.train.flow_loss import draw_noise
from reelforge.engine.train.loop import LoopConfig
from reelforge.kernels.sde_step import guide

Average = Callable[[], AbstractContextManager[None]]  # inside, the student computes with its averaged weights


@dataclass(frozen=True)
class Batch:
    """Some clips.

    Attributes:
        x0: fp32 ``[B,C,T,H,W]``.
        text: ``[B,S,E]``.
        states: trajectories at the student's steps ``[B,K,C,T,H,W]``, if there are any.
    """

    x0: Tensor
    text: Tensor
    states: Tensor | None = None


class Source(Protocol):
    """Where clips come from; all have one shape.

    ``negative`` is what guidance leads away from, ``[S, E]``.
    """

    @property
    def negative(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def batch(self, indexes: Sequence[int], step: int, slots: range, device: torch.device) -> Batch:
        """Clips for these slots of a step's global batch."""
        ...


class TeacherClips:
    """The ends of stored trajectories: what the teacher itself makes of the prompts.

    Args:
        pairs: one trajectory a pair; pair i shows prompt i modulo N.
        text: ``[N + 1, S, E]``, the negative prompt last.
    """

    def __init__(self, pairs: Pairs, text: Tensor) -> None:
        self._pairs, self._text = pairs, text
        self.negative = text[-1]

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, indexes: Sequence[int], step: int, slots: range, device: torch.device) -> Batch:
        states = self._pairs.states(indexes, device)
        text = self._text[[index % (len(self._text) - 1) for index in indexes]].to(device)
        return Batch(states[:, -1], text, states[:, :-1])


class CachedClips:
    """Real clips from a latent cache, those of the student's shape.

    Raises:
        DataError: there is none.
    """

    def __init__(self, cache: LatentCache, shape: Sequence[int], seed: int) -> None:
        self._cache, self._seed = cache, seed
        self._clips = [index for index in range(len(cache)) if cache.shape_of(index) == tuple(shape[1:])]
        self.negative = torch.nn.functional.pad(
            cache.empty_text, (0, 0, 0, cache.header["max_tokens"] - len(cache.empty_text))
        )
        if not self._clips:
            raise DataError(
                f"The cache has no clip of {shape[1]} latent frames of {shape[2]} x {shape[3]}.",
                "Build it with the video spec that the student is made for.",
            )

    def __len__(self) -> int:
        return len(self._clips)

    def batch(self, indexes: Sequence[int], step: int, slots: range, device: torch.device) -> Batch:
        clips = [self._clips[index] for index in indexes]
        choices = [rng.key("caption", self._seed, step, slot) for slot in slots]
        return Batch(self._cache.latents(clips, device), self._cache.text(clips, choices, device))


class InitTask:
    """Losses of a run.

    Args:
        student: trained under the chunk-causal mask.
        average: of the student's weights; the goal of ``consistency``.
        teacher: frozen; needed by ``consistency`` alone.
        source: clips, with trajectories for ``ode``.
        config: the method.
        schedule: warps noise levels.
        grid: the student's few steps.
        pattern: latent frames of each chunk.
        train: batch, micro-batch, precision, seed.
    """

    def __init__(
        self,
        student: WanTransformer,
        average: Average,
        teacher: WanTransformer | None,
        source: Source,
        config: CausalInitConfig,
        schedule: FlowSchedule,
        grid: Grid,
        pattern: tuple[int, ...],
        train: LoopConfig,
    ) -> None:
        self.student, self.average, self.teacher, self.source = student, average, teacher, source
        self.config, self.schedule, self.grid, self.pattern, self.train = config, schedule, grid, pattern, train
        self.device = student.proj_out.weight.device
        self._levels = schedule.few_step([1000 * (1 - k / config.levels) for k in range(config.levels)])

    def losses(self, step: int) -> Iterator[Tensor]:
        """Each micro-batch's share of the global mean loss, on this rank's slots."""
        own, rows = distributed.own_slots(self.train.batch_size), self.train.micro_batch_size
        for start in range(own.start, own.stop, rows):
            slots = range(start, min(start + rows, own.stop))
            batch = self.source.batch(self._indexes(step, slots), step, slots, self.device)
            losses = self._losses(step, slots, batch)
            yield losses.sum() / self.train.batch_size

    def _losses(self, step: int, slots: range, batch: Batch) -> Tensor:
        if self.config.method == "ode":
            return self._ode(step, slots, batch)
        return (self._consistency if self.config.method == "consistency" else self._teacher_forcing)(step, slots, batch)

    def _indexes(self, step: int, slots: range) -> list[int]:
        first = step * self.train.batch_size
        return rng.in_epochs("init_clips", self.train.seed, len(self.source), [first + slot for slot in slots])

    def _ode(self, step: int, slots: range, batch: Batch) -> Tensor:
        assert batch.states is not None, "regression needs trajectories"
        levels = draw_levels("ode_level", self.train.seed, step, slots, 1, self.grid.num_steps)[:, 0]
        student = self._half(self.student)
        return regression_losses(student, batch.states, batch.x0, levels, self.grid, batch.text, self.pattern)

    def _teacher_forcing(self, step: int, slots: range, batch: Batch) -> Tensor:
        seed, chunks = self.train.seed, len(self.pattern)
        u = torch.stack([rng.uniform(rng.key("tf_sigma", seed, step, slot), chunks) for slot in slots])
        noise, student = self._noise(step, slots, batch), self._half(self.student)
        return teacher_forcing_losses(student, batch.x0, noise, self.schedule.shift(u), batch.text, self.pattern)

    def _consistency(self, step: int, slots: range, batch: Batch) -> Tensor:
        drawn = draw_levels("cd_level", self.train.seed, step, slots, len(self.pattern), self._levels.num_steps)
        levels = per_chunk(drawn, self.pattern)
        student = packed(self._half(self.student), batch.x0, batch.text, self.pattern)

        def averaged(x: Tensor, timestep: Tensor) -> Tensor:
            with self.average():
                return student(x, timestep)

        noise = self._noise(step, slots, batch)
        return consistency_losses(student, averaged, self._taught(batch), batch.x0, noise, levels, self._levels)

    def _taught(self, batch: Batch) -> PackedVelocity:
        assert self.teacher is not None, "consistency needs a teacher"
        teacher = self._half(self.teacher)
        cond = packed(teacher, batch.x0, batch.text, self.pattern)
        if self.config.teacher_guidance == 1.0:
            return cond
        negative = self.source.negative.to(batch.text).expand_as(batch.text)
        uncond = packed(teacher, batch.x0, negative, self.pattern)
        return lambda x, timestep: guide(uncond(x, timestep), cond(x, timestep), self.config.teacher_guidance)

    def _half(self, model: WanTransformer) -> Network:
        """The model in the run's precision, a region of its own for each call: autocast keeps casts of weights while
        one is open, so a goal computed with averaged weights would lend its casts to the student."""
        enabled = self.train.precision == "bf16" and model.proj_out.weight.dtype == torch.float32

        def call(*arguments: Any, **options: Any) -> Tensor:
            with half_precision(self.device, enabled):
                return model(*arguments, **options)

        return call

    def _noise(self, step: int, slots: range, batch: Batch) -> Tensor:
        return draw_noise(self.train.seed, step, slots, batch.x0.shape[1:], self.device)
