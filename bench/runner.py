"""``reelforge bench kernels`` and ``bench block``: jobs on the GPU of this machine, records as they come."""

import argparse
import pkgutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reelforge.bench.cases
from reelforge.bench import supervise
from reelforge.bench.supervise import Folder, Outcome
from reelforge.bench.worker import Job, Kind
from reelforge.engine.core.errors import ConfigError
from reelforge.kernels import dispatch

_LIMIT_S = 7200.0
_NOT_FAMILIES = ("case", "catalogue")


def families() -> list[str]:
    """Modules of :mod:`reelforge.bench.cases` that hold cases."""
    names = (entry.name for entry in pkgutil.iter_modules(reelforge.bench.cases.__path__))
    return [name for name in sorted(names) if name not in _NOT_FAMILIES]


def require_gpu() -> None:
    """Refuse to time anything without a GPU.

    Raises:
        ConfigError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "There is no CUDA device on this machine, so nothing can be timed.",
            "Run it on a GPU; `bench h200 --quick` shows on a CPU that everything works.",
        )


def main(arguments: argparse.Namespace) -> int:
    """``reelforge bench kernels``."""
    require_gpu()
    dispatch.load()
    unknown = sorted(set(arguments.op) - set(dispatch.implementations()))
    if unknown:
        raise ConfigError(f"There is no op {unknown[0]!r}.", f"Choose of {sorted(dispatch.implementations())}.")
    found = [Job("rates", name, tuple(arguments.op), arguments.filter or "") for name in families()]
    return _run(found, arguments.out)


def run_kind(kind: Kind, out: Path | None) -> int:
    """One job without a family."""
    require_gpu()
    return _run([Job(kind)], out, step_limit_s=supervise.COMPILING_STEP_S)


def _run(jobs: Sequence[Job], out: Path | None, **options: Any) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(out.parent if out is not None else Path(scratch), out)
        with folder:
            deadline = time.monotonic() + _LIMIT_S
            outcomes = [supervise.run(job, folder, deadline, **options) for job in jobs]
            folder.note(summary(outcomes))
    return 0 if all(outcome.finished for outcome in outcomes) else 1


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line on how jobs ended."""
    records, failed = (sum(getattr(each, name) for each in outcomes) for name in ("records", "failed"))
    cut = sum(not each.finished for each in outcomes)
    text = f"{records} records"
    text += f", {failed} pieces of work took their process with them" if failed else ""
    return text + (f", {cut} of {len(outcomes)} jobs unfinished" if cut else "")
