"""Two real processes on one machine."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def in_two_processes(work: Callable[[int], int | None], folder: Path) -> list[int]:
    """Exit codes of ``work(rank)`` in two forked gloo ranks; a traceback is code 1."""
    # A store of its own: a second rendezvous in a used one finds the addresses of ranks that are gone.
    store, children = tempfile.mkdtemp(dir=folder), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
                code = work(rank) or 0
                dist.destroy_process_group()
            finally:
                if code == 1:
                    traceback.print_exc()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
