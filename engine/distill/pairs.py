"""Trajectories of the teacher for ODE regression: generated once, in parts, resumable, shared among ranks.

The teacher's solver walks a grid that contains the student's steps, so a stored state is exactly what the student will
be asked about. ``part-00003/`` holds pairs 768 to 1023 in a tensor store of its own: ranks take whole parts, and what
is in a part depends on neither their number nor on where a run was interrupted.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.progress import track
from reelforge.engine.core.types import Velocity
from reelforge.engine.flow.sampler import sample_ode
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.flow.solver import SolverName
from reelforge.engine.io.shards import ShardReader, ShardWriter

PART = 256  # pairs
# Numbers of pairs to their trajectories [B, K + 1, C, T, H, W], x0 last, and what to remember of each.
Make = Callable[[Sequence[int]], tuple[Tensor, list[dict[str, Any]]]]


@dataclass(frozen=True)
class PairsConfig:
    """What is generated.

    Attributes:
        count: trajectories; prompts take turns.
        substeps: solver steps between two of the student's steps: 12 and four steps make 48.
        solver: starts anew at each of the student's steps.
        guidance_scale: of the teacher; none is its own.
        batch_size: trajectories a forward.
    """

    count: int = 1536
    substeps: int = 12
    solver: SolverName = "euler"
    guidance_scale: float | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "count", "substeps", "batch_size")


def trajectory_grids(schedule: FlowSchedule, denoising_steps: Sequence[float], substeps: int) -> list[Grid]:
    """The solver's grid between each two of the student's steps, the last one ending at sigma 0."""
    ends = [*denoising_steps, 0.0]
    walks = [
        [high - (high - low) * part / substeps for part in range(substeps)] for high, low in itertools.pairwise(ends)
    ]
    whole = schedule.few_step([step for walk in walks for step in walk])
    starts = range(0, whole.num_steps, substeps)
    return [Grid(whole.sigmas[s : s + substeps + 1], whole.timesteps[s : s + substeps]) for s in starts]


def trajectory(velocity: Velocity, noise: Tensor, grids: Sequence[Grid], solver: SolverName) -> Tensor:
    """States at the student's steps and x0, ``[B, K + 1, C, T, H, W]``, from noise ``[B,C,T,H,W]``."""
    states = [noise]
    for grid in grids:
        states.append(sample_ode(velocity, states[-1], grid, solver))
    return torch.stack(states, dim=1)


def make_pairs(folder: Path, header: Mapping[str, Any], config: PairsConfig, make: Make) -> None:
    """Generate what is missing.

    Raises:
        DataError: the folder holds pairs of another teacher, schedule or prompt list.
        StorageError: it cannot be written.
    """
    parts = [range(first, min(first + PART, config.count)) for first in range(0, config.count, PART)]
    for number in range(distributed.rank(), len(parts), distributed.world_size()):
        part, size = parts[number], config.batch_size
        with ShardWriter(_part(folder, number), header) as writer:
            # Batches lie where an uninterrupted run has them: how a row is rounded depends on its batch.
            batches = [part[start : start + size] for start in range(0, len(part), size)]
            todo = [batch for batch in batches if any(str(pair) not in writer.rows for pair in batch)]
            for batch in track(todo, f"pairs, part {number + 1} of {len(parts)}", total=len(todo)):
                states, facts = make(batch)
                for row, pair in enumerate(batch):
                    if str(pair) not in writer.rows:
                        # bf16 moves a state by 0.4 %, far below what a few-step student can resolve.
                        writer.add(str(pair), facts[row], {"states": states[row].to(torch.bfloat16)})
    distributed.barrier()


class Pairs:
    """Reads finished trajectories.

    Args:
        folder: written by :func:`make_pairs` with the same ``header`` and ``count``.

    Raises:
        DataError: unfinished, damaged, or another teacher's.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], count: int) -> None:
        numbers = range(-(-count // PART))
        self._parts = [ShardReader(_part(folder, number)) for number in numbers]
        self._count = count
        for part in self._parts:
            for name, value in header.items():
                if part.header.get(name) != value:
                    raise DataError(
                        f"{part.folder} was built with {name} = {part.header.get(name)!r}, not {value!r}.",
                        "Choose another output folder, or delete this one to build it again.",
                    )
        missing = [pair for pair in range(count) if str(pair) not in self._parts[pair // PART].rows]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {count} trajectories, the first is number {missing[0]}.",
                "Run the same command again; it continues.",
            )

    def __len__(self) -> int:
        return self._count

    def states(self, pairs: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """fp32 ``[B, K + 1, C, T, H, W]``."""
        rows = [self._parts[pair // PART].tensors(str(pair))["states"] for pair in pairs]
        return torch.stack(rows).to(device).float()


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}"
