"""``reelforge bench distill``, and the shapes of the unattended run.

--model FOLDER    a model folder for all three networks, on any device
--teacher NAME    random weights at published shapes: student and critic of 1.3B, 480 x 832 x 81, on a GPU
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reelforge.bench import distill_records, distill_world, runner
from reelforge.bench.cases.case import Case
from reelforge.bench.records import MIN_ROUNDS
from reelforge.bench.rl_arms import FULL, Arm
from reelforge.bench.rl_run import take
from reelforge.bench.session import Session
from reelforge.bench.supervise import Folder

TEACHERS = ("1.3B", "14B")
# The second is for a machine on which the first takes its process with it: unproven kernels may.
ARMS = (FULL, Arm("plain", plain=True))
_RESERVE = 0.9  # of a share of time; the rest is for what follows the last round
_LIMIT_S = 3600.0


def measured(teacher: str, *, small: bool = False) -> Case:
    """What :func:`events` measures."""
    return distill_records.case(distill_world.label(teacher, small=small))


def events(session: Session, teacher: str, seconds: float, *, small: bool = False) -> Iterator[dict[str, Any]]:
    """Records and tables with one teacher, within ``seconds``, by the first way that does not break."""
    deadline = time.monotonic() + _RESERVE * seconds
    made = measured(teacher, small=small)
    arm = next((arm for arm in ARMS if session.wants(made.name, arm.name)), None)
    if arm is None:
        return
    session.announce(made, (), distill_records.named(arm))
    world = distill_world.from_shape(teacher, session.device, small=small)
    yield from distill_records.events(replace(session, rounds=MIN_ROUNDS), world, arm, deadline)


def main(arguments: argparse.Namespace) -> int:
    """``reelforge bench distill``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model is not None:
        world = distill_world.from_folder(arguments.model, device, arguments.chunk_frames, arguments.batch)
    else:
        runner.require_gpu()
        world = distill_world.from_shape(arguments.teacher, device)
    session = replace(Session.open(device), rounds=arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "records.jsonl"
        with Folder(out.parent, out) as folder:
            for event in distill_records.events(session, world, FULL, time.monotonic() + _LIMIT_S):
                take(event, folder)
    return 0
