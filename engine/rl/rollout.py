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
    """A state of the batch: its group's place in it, and the members of the group that it stands for."""

    group: int
    members: range


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
        x, rows = self._start(groups, iteration, device)
        decisions: list[Decision] = []
        evaluations = 0
        for k in range(self.grid.num_steps):
            branches = [self._branches(groups[row.group], row, k) for row in rows]
            following = list(itertools.chain.from_iterable(branches))
            keys = torch.tensor([self._key(groups, row, iteration, k) for row in following], device=device)
            counts = [len(part) for part in branches]
            velocity = torch.empty_like(x)
            trained = {at for at, row in enumerate(rows) if k in groups[row.group].trained}
            for part in _parts([at for at in range(len(rows)) if at not in trained], self.sample_rows):
                velocity[part] = actor.sample(x[part], *self._told(groups, rows, part, k, device)).to(x.dtype)
            for part in _parts(sorted(trained), self.train_rows):
                state, (timestep, prompts) = x[part], self._told(groups, rows, part, k, device)
                answer = actor.detached_train(state, timestep, prompts)
                velocity[part] = answer.to(x.dtype)
                left = [place for at in part for place in range(sum(counts[:at]), sum(counts[: at + 1]))]
                members = [self._sample_number(slots, following[place]) for place in left]
                offsets = _offsets([counts[at] for at in part], device)
                taken = (keys[left], offsets, torch.tensor(members), actor.path(len(part)))
                decisions.append(Decision(k, state, answer, timestep, prompts, *taken))
            evaluations += len(rows)
            at = self._coefficients(groups, rows, k, x)
            x = fork(x, velocity, at.a, at.b, at.std, keys, _offsets(counts, device)).x
            rows = following
        return Rollout(x, tuple(decisions), evaluations)

    def _start(self, groups: Sequence[Group], iteration: int, device: torch.device) -> tuple[Tensor, list[_Row]]:
        """M noises a group, each the start of G / M members."""
        each = self.config.group_size // self.config.distinct_noise
        rows = [
            _Row(group, range(noise * each, (noise + 1) * each))
            for group in range(len(groups))
            for noise in range(self.config.distinct_noise)
        ]
        ids = [self.prompt_ids[groups[row.group].prompt] for row in rows]
        noises = [row.members.start // each for row in rows]
        return initial_noise(self.seed, ids, noises, self.shape, iteration, device).to(self.dtype), rows

    def _branches(self, group: Group, row: _Row, k: int) -> list[_Row]:
        """Where a state goes: every member on its own at the group's first stochastic step."""
        if k != group.stochastic[0]:
            return [row]
        return [_Row(row.group, range(member, member + 1)) for member in row.members]

    def _key(self, groups: Sequence[Group], row: _Row, iteration: int, k: int) -> int:
        """Of a member's noise at step k; 0 where no noise is added."""
        group = groups[row.group]
        if k not in group.stochastic:
            return 0
        return rng.key("step", self.seed, iteration, self.prompt_ids[group.prompt], row.members.start, k)

    def _told(
        self, groups: Sequence[Group], rows: Sequence[_Row], part: Sequence[int], k: int, device: torch.device
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Timestep and prompt of some rows."""
        timestep = torch.full((len(part),), self.grid.timesteps[k].item(), device=device)
        return timestep, tuple(groups[rows[at].group].prompt for at in part)

    def _sample_number(self, slots: Sequence[int], row: _Row) -> int:
        return slots[row.group] * self.config.group_size + row.members.start

    def _coefficients(self, groups: Sequence[Group], rows: Sequence[_Row], k: int, x: Tensor) -> sde.Coefficients:
        """Of step k for each row: the noise rate's where its group is stochastic, the ODE's elsewhere."""
        tables = [sde.step_table(self.grid, rate, x.dtype, x.device) for rate in (sde.ODE, self.rate)]
        noisy = torch.tensor([k in groups[row.group].stochastic for row in rows], device=x.device).long()
        pair = (torch.stack([getattr(table, name)[k] for table in tables])[noisy] for name in ("a", "b", "std", "s"))
        return sde.Coefficients(*pair)


def _parts(places: list[int], rows: int) -> list[list[int]]:
    return [places[start : start + rows] for start in range(0, len(places), rows)]


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
