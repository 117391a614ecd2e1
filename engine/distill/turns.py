"""Two networks that train in turn, as the one state that a training loop drives."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from reelforge.engine.io.checkpoint import Checkpoint
from reelforge.engine.train.state import OptimizerConfig, TrainState

_CRITIC = "critic_"  # prefix of its groups and facts


class Turns:
    """Student and critic: ``critic_steps`` optimizer steps of the critic, then one of the student.

    Args:
        student, critic: built for :meth:`turns_of` their share of the run's steps.
        critic_steps: of a cycle.
    """

    def __init__(self, student: TrainState, critic: TrainState, critic_steps: int) -> None:
        self.student, self.critic, self.critic_steps = student, critic, critic_steps
        self.device = student.device
        self.meter = _Meters(student, critic)

    @staticmethod
    def share(steps: int, critic_steps: int) -> tuple[int, int]:
        """How many of ``steps`` are the student's and the critic's."""
        students = steps // (critic_steps + 1)
        return students, steps - students

    @staticmethod
    def is_students(step: int, critic_steps: int) -> bool:
        """Whose turn step ``step`` (from 0) is."""
        return step % (critic_steps + 1) == critic_steps

    @property
    def step(self) -> int:
        return self.student.step + self.critic.step

    @property
    def config(self) -> OptimizerConfig:
        return self.student.config

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.student.parameters | {_CRITIC + name: value for name, value in self.critic.parameters.items()}

    def rates(self) -> dict[str, float]:
        """Learning rates of the latest steps."""
        return self.student.rates() | {_CRITIC + name: rate for name, rate in self.critic.rates().items()}

    def optimizer_step(self, losses: Iterable[Tensor]) -> None:
        """One step of the network whose turn it is."""
        mine = self.is_students(self.step, self.critic_steps)
        (self.student if mine else self.critic).optimizer_step(losses)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Everything to store."""
        return self.student.groups() | {_CRITIC + name: group for name, group in self.critic.groups().items()}

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of both."""
        done = self.share(saved.step, self.critic_steps)
        mine = {name: group for name, group in saved.groups.items() if not name.startswith(_CRITIC)}
        other = {name.removeprefix(_CRITIC): g for name, g in saved.groups.items() if name.startswith(_CRITIC)}
        for state, step, groups in zip((self.student, self.critic), done, (mine, other), strict=True):
            state.restore(Checkpoint(step, groups, saved.state))


class _Meters:
    """Both networks' meters as one."""

    def __init__(self, student: TrainState, critic: TrainState) -> None:
        self._states = student, critic

    def read(self) -> dict[str, Any]:
        student, critic = (state.meter.read() for state in self._states)
        worse = max(student, critic, key=lambda facts: facts["longest_skip"])
        means = {_CRITIC + name: critic.get(name, math.nan) for name in ("loss", "grad_norm") if name in critic}
        bad = {name: worse[name] for name in ("longest_skip", "bad_loss", "bad_grad_norm")}
        return {**student, **means, **bad, "skipped": student["skipped"] + critic["skipped"]}

    def reset(self) -> None:
        for state in self._states:
            state.meter.reset()
