"""The few collectives that data parallelism needs; each is the identity in a single process.

Nothing here pickles: only tensors travel.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.core.settings import settings


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started (NCCL on CUDA, gloo otherwise); alone, do nothing."""
    if settings().world_size == 1 or _active():
        yield
        return
    # Ranks wait while rank 0 embeds prompts, or for the one with the most trajectories to make: longer than 10 minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to this process' device.

    Raises:
        ConfigError: ``cuda`` without a CUDA device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError('device is "cuda", but torch sees no CUDA device.', 'Set device = "cpu" or "auto".')
    device = torch.device("cuda", settings().local_rank)
    torch.cuda.set_device(device)
    return device


def rank() -> int:
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    return dist.get_world_size() if _active() else 1


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def own_slots(total: int) -> range:
    """This rank's contiguous part of ``total`` sample slots; parts differ by at most one.

    Raises:
        ConfigError: there are fewer samples than ranks.
    """
    size = world_size()
    if total < size:
        raise ConfigError(f"A global batch of {total} leaves some of {size} processes idle.", "Choose a larger batch.")
    return range(rank() * total // size, (rank() + 1) * total // size)


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks."""
    if _active():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def summed(device: torch.device, values: Tensor) -> Tensor:
    """The ranks' values as one, on the CPU: each holds zeros where it has no part, and NaN stays NaN.

    Args:
        device: of the collective.
    """
    shared = values.to(device, copy=True)
    sum_([shared])
    return shared.cpu()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; all ranks get the same answer."""
    if not _active():
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def barrier() -> None:
    """Wait for all ranks."""
    if _active():
        dist.barrier()


def check_replicas(tensors: Mapping[str, Tensor]) -> None:
    """Stop unless every rank holds the same values (compared by their fp64 sums).

    Raises:
        TrainingError: names the first tensor that differs.
    """
    if not _active():
        return
    sums = torch.stack([tensor.detach().double().sum() for tensor in tensors.values()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    for name, same in zip(tensors, (lowest == highest).tolist(), strict=True):
        if not same:
            raise TrainingError(f"Weight {name} differs between ranks.", "Restart from the last checkpoint.")
