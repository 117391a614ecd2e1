"""The losses of distribution matching distillation, step by step: the critic's turns, then the student's.

One task serves two sub-phases. With a pattern of one chunk the student is bidirectional and few-step; with several it
is causal, and learns from its own past by self-forcing. Every draw is named by (seed, step, global slot): weights,
optimizers and averages are all there is to store.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.core.types import Velocity
from reelforge.engine.distill.dmd import DmdConfig, distribution_gradient, dmd_losses, draw_sigmas
from reelforge.engine.distill.self_forcing import ExitPolicy, Rollout, exit_steps, replay, roll_out
from reelforge.engine.distill.turns import Turns
from reelforge.engine.flow.sampler import guided, initial_noise, step_keys
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.model.generation import CLEAN, ChunkDecoder, Guidance, half_precision
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.lora import adapters_off
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.train.flow_loss import draw_noise, flow_losses
from reelforge.engine.train.loop import LoopConfig

# Largest |replayed - rolled out| over the sample's root mean square; the two run the same maths in other kernels.
REPLAY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}


@dataclass(frozen=True)
class RolloutConfig:
    """How the student's samples are made.

    Attributes:
        exit_policy: at which of its steps a chunk's sample is taken, see :func:`exit_steps`.
        context: what a finished chunk leaves for the next ones; ``generate`` does likewise.
        frames: latent frames of a rollout; 0 is the clip's. Of a longer one the newest clip is judged and trained.
        segments: rollouts that continue the same videos, one after the other, before new ones begin (long tuning).
    """

    exit_policy: ExitPolicy = "random"
    context: ContextConfig = CLEAN
    frames: int = 0
    segments: int = 1

    def __post_init__(self) -> None:
        if self.frames < 0 or self.segments < 1:
            raise ConfigError(
                f"rollout.frames is {self.frames} and segments {self.segments}.", "Frames are 0 or more, segments 1."
            )


@dataclass(frozen=True)
class Student:
    """The trained model and how it samples.

    Attributes:
        model: causal, or bidirectional under a pattern of one chunk.
        grid: its few steps.
        pattern: latent frames of each chunk of a rollout.
        shape: of the teacher's clip, ``[C,T,H,W]``.
    """

    model: WanTransformer
    grid: Grid
    pattern: tuple[int, ...]
    shape: tuple[int, int, int, int]


class DmdTask:
    """Losses and facts of a run.

    Args:
        student: what learns.
        critic: follows the student's distribution.
        teacher: frozen; None is the critic without its adapter, which saves a copy of the weights.
        text: ``[N + 1, S, E]`` on any device, the negative prompt last.
        ids: names of the N prompts.
        config: the objective.
        rollout: of the student.
        schedule: its shift warps the noise levels of the comparison and of the critic.
        train: batch, micro-batch, precision, seed.

    Raises:
        ConfigError: see :func:`check_rollout`.
    """

    def __init__(
        self,
        student: Student,
        critic: WanTransformer,
        teacher: WanTransformer | None,
        text: Tensor,
        ids: Sequence[int],
        config: DmdConfig,
        rollout: RolloutConfig,
        schedule: FlowSchedule,
        train: LoopConfig,
    ) -> None:
        self.student, self.critic, self.teacher = student, critic, teacher
        self.text, self.ids = text, ids
        self.config, self.rollout, self.schedule, self.train = config, rollout, schedule, train
        self.device = student.model.proj_out.weight.device
        self._skipped = sum(student.pattern) - student.shape[1]  # frames of a long rollout that nobody judges
        self._decoder: ChunkDecoder | None = None
        self._facts: dict[str, list[Tensor]] = {}
        check_rollout(student.pattern, student.shape[1], rollout, train)

    def losses(self, step: int) -> Iterator[Tensor]:
        """This rank's share of an optimizer step, piece by piece."""
        mine = Turns.is_students(step, self.config.critic_steps)
        own, rows = distributed.own_slots(self.train.batch_size), self.train.micro_batch_size
        for start in range(own.start, own.stop, rows):
            slots = range(start, min(start + rows, own.stop))
            prompts = self._prompts(step, slots)
            text = self.text[[*prompts, -1]].to(self.device)
            ids = [self.ids[prompt] for prompt in prompts]
            # Nothing here keeps a rollout: a cache is gone before the next one is made, a critic's turn needs none.
            if mine:
                yield from self._student_losses(step, slots, self._roll_out(step, slots, ids, text[:-1]), text)
            else:
                yield from self._critic_losses(step, slots, self._roll_out(step, slots, ids, text[:-1]).x0, text)

    def describe(self, steps: range) -> dict[str, Any]:
        """Means of the facts since the last call.

        Raises:
            TrainingError: rollout and replay disagree.
        """
        del steps
        # A sample that is not finite is told by `dropped`, and its step by `skipped`.
        facts = {
            name: [v for v in torch.stack(values).tolist() if math.isfinite(v)] for name, values in self._facts.items()
        }
        means = {name: sum(values) / len(values) for name, values in facts.items() if values}
        gap = max(facts.get("replay_gap", []), default=0.0)
        self._facts.clear()
        if gap > REPLAY_TOLERANCE[self.train.precision]:
            raise TrainingError(
                f"Rollout and replay differ by {gap:.3g} of the samples' size, more than "
                f"{REPLAY_TOLERANCE[self.train.precision]:g}.",
                "Both must run the same kernels and weights: unpin kernels, or set train.precision.",
            )
        return means

    def _prompts(self, step: int, slots: range) -> list[int]:
        """Prompts of these slots: every one once, in random order, before any comes again."""
        first = step // self.rollout.segments * self.train.batch_size
        return rng.in_epochs("distill_prompts", self.train.seed, len(self.ids), [first + slot for slot in slots])

    def _roll_out(self, step: int, slots: range, ids: Sequence[int], text: Tensor) -> Rollout:
        student, how, seed = self.student, self.rollout, self.train.seed
        frames = sum(student.pattern)
        shape = (student.shape[0], frames, *student.shape[2:])
        # Iteration 0 is sampling outside training.
        noise = initial_noise(seed, ids, slots, shape, step + 1, self.device)
        keys = step_keys(seed, ids, slots, student.grid.num_steps, step + 1, self.device)
        number, segment = step, step % how.segments
        if how.exit_policy == "cycle":
            # By its own count: of the run's steps, a cycle of six would never meet two of four exits.
            mine = Turns.is_students(step, self.config.critic_steps)
            number = Turns.share(step, self.config.critic_steps)[0 if mine else 1]
        exits = exit_steps(how.exit_policy, seed, number, len(student.pattern), student.grid.num_steps)
        with self._half(student.model):
            if segment == 0 or self._decoder is None:
                guidance = Guidance(text, text[:0], 1.0)
                self._decoder = ChunkDecoder(
                    student.model, guidance, max(student.pattern), how.segments * frames, shape[-2:]
                )
            else:  # the weights may have moved since the video began
                with torch.no_grad():
                    self._decoder.text = student.model.text_context(text)
            rolled = roll_out(
                self._decoder, noise, student.grid, lambda k: rng.normal(keys[k], shape), student.pattern, exits,
                how.context, goes_on=segment + 1 < how.segments,
            )  # fmt: skip
        if segment + 1 == how.segments:
            self._decoder = None
        return rolled

    def _critic_losses(self, step: int, slots: range, x0: Tensor, text: Tensor) -> Iterator[Tensor]:
        x, (sigma, noise) = x0[:, :, self._skipped :], self._noised(step, slots)
        with self._half(self.critic):
            losses = flow_losses(self.critic, x, noise, sigma, text[:-1])
        yield losses.sum() / self.train.batch_size

    def _student_losses(self, step: int, slots: range, rolled: Rollout, text: Tensor) -> Iterator[Tensor]:
        x, (sigma, noise) = rolled.x0[:, :, self._skipped :], self._noised(step, slots)
        teacher, critic = self._scores(text)
        g, finite = distribution_gradient(x, teacher, critic, sigma, noise)
        size = x.square().mean().sqrt()
        self._note(dmd=g.abs().mean(), sample_rms=size, dropped=1 - finite.float().mean())
        for state in rolled.exits:
            if state.frames.start < self._skipped:
                continue
            with self._half(self.student.model):
                again = replay(self.student.model, rolled, state, text[:-1], self.student.grid)
            gap = (again.detach() - rolled.x0[:, :, state.frames]).abs().amax()
            self._note(replay_gap=gap / size)
            part = slice(state.frames.start - self._skipped, state.frames.stop - self._skipped)
            share = (part.stop - part.start) / x.shape[2]  # of the sample's elements
            yield dmd_losses(again, g[:, :, part]).sum() * share / self.train.batch_size

    def _noised(self, step: int, slots: range) -> tuple[Tensor, Tensor]:
        """Noise levels ``[B]`` and noise ``[B,C,T,H,W]`` at which samples are judged."""
        sigma = draw_sigmas(self.config, self.schedule, self.train.seed, step, slots)
        return sigma, draw_noise(self.train.seed, step, slots, self.student.shape, self.device)

    def _scores(self, text: Tensor) -> tuple[Velocity, Velocity]:
        """Velocities of teacher, guided, and critic."""
        prompts, negative = text[:-1], text[-1:].expand(len(text) - 1, -1, -1)
        shared = self.teacher is None
        model = self.critic if self.teacher is None else self.teacher

        def teach(x: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
            with self._half(model), adapters_off(model) if shared else nullcontext():
                return model(x, timestep, rows)

        def criticise(x: Tensor, timestep: Tensor) -> Tensor:
            with self._half(self.critic):
                return self.critic(x, timestep, prompts)

        return guided(teach, prompts, negative, self.config.teacher_guidance), criticise

    def _half(self, model: WanTransformer) -> AbstractContextManager[object]:
        wide = model.proj_out.weight.dtype == torch.float32
        return half_precision(self.device, self.train.precision == "bf16" and wide)

    def _note(self, **facts: Tensor) -> None:
        if distributed.rank() == 0:  # no other is asked to describe
            for name, value in facts.items():
                self._facts.setdefault(name, []).append(value.detach())


def check_rollout(pattern: Sequence[int], clip_frames: int, rollout: RolloutConfig, train: LoopConfig) -> None:
    """Refuse a rollout whose newest clip cannot be judged, and segments that are cut into micro-batches.

    Args:
        pattern: latent frames of each chunk of a rollout.
        clip_frames: latent frames of the clip that teacher and critic judge.

    Raises:
        ConfigError: as said.
    """
    skipped = sum(pattern) - clip_frames
    if skipped not in {sum(pattern[:chunk]) for chunk in range(len(pattern))}:
        raise ConfigError(
            f"The newest {clip_frames} of {sum(pattern)} latent frames do not begin with a chunk ({list(pattern)}).",
            "Leave rollout.frames out; or let it be longer than the clip, without first_chunk_frames.",
        )
    own = len(distributed.own_slots(train.batch_size))
    if rollout.segments > 1 and train.micro_batch_size < own:
        raise ConfigError(
            f"rollout.segments is {rollout.segments} and a rank's {own} videos are cut into micro-batches of "
            f"{train.micro_batch_size}.",
            f"Videos that go on keep their cache: set train.micro_batch_size = {own}, or train.batch_size lower.",
        )


def steps_in_cycles(steps: int, critic_steps: int) -> tuple[int, int]:
    """The numbers of steps nearest to ``steps``, below and above, that end with the student's turn."""
    cycle = critic_steps + 1
    return steps // cycle * cycle, math.ceil(steps / cycle) * cycle
