"""Cycles of self-forcing under a stopwatch: a turn of the critic and one of the student, the engine's own task.

A piece of a turn's loss is timed from the moment the optimizer asks for it until its backward is done and the next one
is asked for, less the rollout and the scores, which have clocks of their own.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.bench.distill_backward import SEED
from reelforge.bench.distill_world import World
from reelforge.bench.rl_arms import now
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.timing import Times
from reelforge.engine.core.types import Velocity
from reelforge.engine.distill.dmd import DmdConfig
from reelforge.engine.distill.self_forcing import Rollout
from reelforge.engine.distill.trainer import DmdTask, RolloutConfig
from reelforge.engine.distill.turns import Turns
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig, TrainState

CRITIC_STEPS = 1  # of a measured cycle; five are usual, and cost what one costs five times
# Every step is a whole one, and the weights stay where they are.
STILL, STILL_CRITIC = (OptimizerConfig(lr=1e-8, warmup_steps=0, ema_decay=decay) for decay in (0.99, 0.0))


class TimedTask(DmdTask):
    """The engine's task; seconds since they were last cleared, by part, and of each piece of a loss."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: dict[str, float] = defaultdict(float)
        self.pieces: list[float] = []

    def losses(self, step: int) -> Iterator[Tensor]:
        start, timed = now(self.device), sum(self.seconds.values())
        for loss in super().losses(step):
            yield loss
            self.pieces.append(now(self.device) - start - (sum(self.seconds.values()) - timed))
            start, timed = now(self.device), sum(self.seconds.values())

    def _roll_out(self, *arguments: Any) -> Rollout:
        with self._timed("rollout"):
            return super()._roll_out(*arguments)

    def _scores(self, text: Tensor) -> tuple[Velocity, Velocity]:
        teacher, critic = super()._scores(text)
        return self._watched("teacher", teacher), self._watched("critic_score", critic)

    def _watched(self, name: str, velocity: Velocity) -> Velocity:
        def call(x: Tensor, timestep: Tensor) -> Tensor:
            with self._timed(name):
                return velocity(x, timestep)

        return call

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = now(self.device)
        yield
        self.seconds[name] += now(self.device) - start


@dataclass(frozen=True)
class Split:
    """Seconds of one cycle.

    Attributes:
        rollout: of both turns.
        teacher: its velocity, both branches of guidance.
        critic_score: the critic's velocity for the student's turn.
        replay: forward and backward of every chunk together.
        critic: forward and backward of the critic's turn.
        rest: optimizer steps and averages.
        total: all of it.
    """

    rollout: float
    teacher: float
    critic_score: float
    replay: float
    critic: float
    rest: float
    total: float


@dataclass(frozen=True)
class Cycle:
    """What one cycle took.

    Attributes:
        split: its seconds.
        chunks: seconds of each chunk's replay.
        critic_peak, student_peak: most bytes allocated on the device during a turn, all that lies there included; 0 on
            a CPU.
    """

    split: Split
    chunks: tuple[float, ...]
    critic_peak: int
    student_peak: int


def settings(world: World) -> tuple[DmdConfig, RolloutConfig, LoopConfig]:
    """Of a measured cycle; every chunk takes all steps: the longest rollout there is, the same in every cycle."""
    batch = world.batch
    train = LoopConfig(batch_size=batch, micro_batch_size=batch, precision=world.precision, seed=SEED)
    return DmdConfig(world.guidance, critic_steps=CRITIC_STEPS), RolloutConfig("last"), train


class Bench:
    """A world ready to run.

    Attributes:
        exits: of every rollout.
    """

    def __init__(self, world: World) -> None:
        self.world, student = world, world.student
        self.exits = [student.grid.num_steps - 1] * len(student.pattern)
        dmd, rollout, train = settings(world)
        self.task = TimedTask(
            student, world.critic, world.teacher, world.text, world.ids, dmd, rollout, world.schedule, train
        )
        networks = ((student.model, STILL), (world.critic, STILL_CRITIC))
        learner, critic = (TrainState(dict(model.named_parameters()), config, steps=1) for model, config in networks)
        self.state = Turns(learner, critic, CRITIC_STEPS)

    def rounds(self, most: int, deadline: float, clocks: ClockSampler, arm: str) -> Iterator[Cycle]:
        """One cycle, and then as many up to ``most`` as end before ``deadline`` (of ``time.monotonic``)."""
        for _ in range(max(1, most)):
            start = time.monotonic()
            with clocks.arm(arm):
                found = self.cycle()
            yield found
            if 2 * time.monotonic() - start > deadline:
                return

    def cycle(self) -> Cycle:
        """A turn of the critic, then one of the student."""
        seconds: dict[str, float] = defaultdict(float)
        pieces, peaks = [], []
        for _ in range(CRITIC_STEPS + 1):
            took, peak = self._turn()
            seconds["total"] += took
            for name, part in self.task.seconds.items():
                seconds[name] += part
            pieces.append(tuple(self.task.pieces))
            peaks.append(peak)
        seconds["critic"], seconds["replay"] = (sum(found) for found in pieces)
        seconds["rest"] = 2 * seconds["total"] - sum(seconds.values())
        return Cycle(Split(**seconds), pieces[1], *peaks)

    def _turn(self) -> tuple[float, int]:
        """Seconds, and the device's peak."""
        device, task = self.world.device, self.task
        task.seconds.clear()
        task.pieces.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = now(device)
        self.state.optimizer_step(task.losses(self.state.step))
        took = now(device) - start
        return took, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def times(found: Sequence[Cycle], part: str) -> Times:
    """A part's seconds, one sample a cycle."""
    samples = tuple((getattr(cycle.split, part),) for cycle in found)
    return Times("wall", "warm", 1, 1, samples, None, rest=0.0)
