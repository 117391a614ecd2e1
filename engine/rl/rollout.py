"""Rolls out groups: one shared ODE prefix, the stochastic step on the training path, G branches finished together.

All groups of a batch walk the schedule in lockstep, one row a state: a group has M rows up to its first stochastic
step and G after it. So a batch may mix groups with different stochastic steps, and step k costs one forward and one
ragged fork. A prefix is exact, not an approximation: the members of a group start from the same noise and take the
same deterministic steps, so their states are one state.

The score function is that of the stochastic steps alone; that the deterministic ones depend on the weights as well is
left out of the gradient, as in every single-step method.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.flow import sde
from reelforge.engine.flow.sampler import initial_noise
from reelforge.engine.flow.schedule import Grid
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.rl.plan import Group, PlanConfig
from reelforge.engine.rl.policy import TrainingPath
from reelforge.kernels.sde_step import fork


class Actor(Protocol):
    """What a rollout asks of :class:`~reelforge.engine.rl.policy.Policy`: velocities of x ``[B,C,T,H,W]`` at
    timestep ``[B]`` for one prompt a row."""

    def sample(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor: ...

    def detached_train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor: ...

    def path(self, rows: int) -> TrainingPath: ...


@dataclass(frozen=True)
class Decision:
    """States left by a stochastic step that is trained: one forward of the training path.

    Attributes:
        step: k of all of them.
        x: ``[S,C,T,H,W]`` the states.
        velocity: ``[S,C,T,H,W]`` of the rollout.
        timestep: ``[S]`` as the network was told.
        prompts: each state's.
        keys: of the noise of the R members that left, int64 ``[R]``.
        offsets: members of each state, int32 ``[S + 1]``.
        members: their places among the iteration's samples, long ``[R]`` on the CPU.
        path: that the rollout took.
    """

    step: int
    x: Tensor
    velocity: Tensor
    timestep: Tensor
    prompts: tuple[int, ...]
    keys: Tensor
    offsets: Tensor
    members: Tensor
    path: TrainingPath


@dataclass(frozen=True)
class Rollout:
    """What a batch of groups left.

    Attributes:
        latents: x0 of every sample, group by group, ``[P G,C,T,H,W]``.
        decisions: what the loss trains on.
        evaluations: velocities that were computed.
    """

    latents: Tensor
    decisions: tuple[Decision, ...]
    evaluations: int


@dataclass(frozen=True)
class _Row:
    """A state of the batch: its group, that group's first sample in the iteration, the members it stands for."""

    group: Group
    first_sample: int
    members: range

    @property
    def sample(self) -> int:
        """Number in the iteration of the only, or the first, member."""
        return self.first_sample + self.members.start

    def branches(self, k: int) -> list["_Row"]:
        """Where the state goes at step k: every member on its own at the group's first stochastic step."""
        if k != self.group.stochastic[0]:
            return [self]
        return [_Row(self.group, self.first_sample, range(member, member + 1)) for member in self.members]


@dataclass(frozen=True)
class Sampler:
    """Rolls out planned groups.

    Attributes:
        config: group size and initial noises.
        grid: the schedule's steps.
        rate: noise of the stochastic steps.
        prompt_ids: what names each prompt's noise.
        shape: of one latent, ``[C,T,H,W]``.
        seed: of the run.
        sample_rows: states a forward of a deterministic step.
        train_rows: states a forward of a trained step, in the rollout and in training.
        dtype: of the states; float64 for tests.
    """

    config: PlanConfig
    grid: Grid
    rate: NoiseRate
    prompt_ids: Sequence[int]
    shape: Sequence[int]
    seed: int
    sample_rows: int
    train_rows: int
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def run(
        self,
        actor: Actor,
        groups: Sequence[Group],
        slots: Sequence[int],
        iteration: int,
        device: torch.device,
    ) -> Rollout:
        """Roll out some groups of an iteration.

        Args:
            actor: the network.
            groups: as planned.
            slots: each one's place in the iteration, which numbers its samples.
            iteration: names the noise.
        """
        x, rows = self._start(groups, slots, iteration, device)
        decisions: list[Decision] = []
        evaluations = 0
        for k in range(self.grid.num_steps):
            branches = [row.branches(k) for row in rows]
            velocity = torch.empty_like(x)
            trained = [k in row.group.trained for row in rows]
            for part in _parts(trained, False, self.sample_rows):
                velocity[part] = actor.sample(x[part], *self._told([rows[at] for at in part], k, device)).to(x.dtype)
            for part in _parts(trained, True, self.train_rows):
                decisions.append(self._decide(actor, x[part], [branches[at] for at in part], iteration, k))
                velocity[part] = decisions[-1].velocity.to(x.dtype)
            evaluations += len(rows)
            at = self._coefficients(rows, k, x)
            rows = list(itertools.chain.from_iterable(branches))
            x = fork(
                x, velocity, at.a, at.b, at.std, self._keys(rows, iteration, k, device), _offsets(branches, device)
            ).x
        return Rollout(x, tuple(decisions), evaluations)

    def _start(
        self, groups: Sequence[Group], slots: Sequence[int], iteration: int, device: torch.device
    ) -> tuple[Tensor, list[_Row]]:
        """M noises a group, each the start of G / M members."""
        size = self.config.group_size
        each = size // self.config.distinct_noise
        rows = [
            _Row(group, slot * size, range(first, first + each))
            for group, slot in zip(groups, slots, strict=True)
            for first in range(0, size, each)
        ]
        ids = [self.prompt_ids[row.group.prompt] for row in rows]
        noises = [row.members.start // each for row in rows]
        return initial_noise(self.seed, ids, noises, self.shape, iteration, device).to(self.dtype), rows

    def _decide(self, actor: Actor, x: Tensor, branches: Sequence[list[_Row]], iteration: int, k: int) -> Decision:
        """The training path's velocity at some states, and what leaves them."""
        timestep, prompts = self._told([part[0] for part in branches], k, x.device)
        velocity = actor.detached_train(x, timestep, prompts)
        members = list(itertools.chain.from_iterable(branches))
        keys, samples = self._keys(members, iteration, k, x.device), torch.tensor([row.sample for row in members])
        offsets = _offsets(branches, x.device)
        return Decision(k, x, velocity, timestep, prompts, keys, offsets, samples, actor.path(len(x)))

    def _told(self, rows: Sequence[_Row], k: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
        """Timestep and prompt of some rows."""
        timestep = torch.full((len(rows),), self.grid.timesteps[k].item(), device=device)
        return timestep, tuple(row.group.prompt for row in rows)

    def _keys(self, rows: Sequence[_Row], iteration: int, k: int, device: torch.device) -> Tensor:
        """Of the noise that each member got at step k; 0 where none is added."""
        keys = [
            rng.key("step", self.seed, iteration, self.prompt_ids[row.group.prompt], row.members.start, k)
            if k in row.group.stochastic
            else 0
            for row in rows
        ]
        return torch.tensor(keys, device=device)

    def _coefficients(self, rows: Sequence[_Row], k: int, x: Tensor) -> sde.Coefficients:
        """Of step k for each row: the noise rate's where its group is stochastic, the ODE's elsewhere."""
        tables = [sde.step_table(self.grid, rate, x.dtype, x.device) for rate in (sde.ODE, self.rate)]
        noisy = torch.tensor([k in row.group.stochastic for row in rows], device=x.device).long()
        pair = (torch.stack([getattr(table, name)[k] for table in tables])[noisy] for name in ("a", "b", "std", "s"))
        return sde.Coefficients(*pair)


def _parts(flags: Sequence[bool], wanted: bool, rows: int) -> list[list[int]]:
    """The places whose flag is as wanted, in runs of at most ``rows``."""
    places = [place for place, flag in enumerate(flags) if flag == wanted]
    return [places[start : start + rows] for start in range(0, len(places), rows)]


def _offsets(branches: Sequence[list[_Row]], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(map(len, branches))], dtype=torch.int32, device=device)
