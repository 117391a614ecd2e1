"""``reelforge bench rl``, and the real shapes of the unattended run.

--model FOLDER    a model folder on any device; the demo's miniature takes about a minute on two CPU cores
--shape NAME      random weights at a published shape, on a GPU
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reelforge.bench import rl_records, rl_world, runner
from reelforge.bench.cases.case import Case
from reelforge.bench.records import Record, parse
from reelforge.bench.rl_arms import CHAIN, COLLAPSED, FLASH, FULL, INDEPENDENT, Arm, Setting
from reelforge.bench.rl_iteration import Bench, expected, times
from reelforge.bench.rl_world import World
from reelforge.bench.session import Session
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.supervise import Folder
from reelforge.bench.tables import lines
from reelforge.bench.timing import spread

MODEL = "1.3B"  # of the unattended run
# By frames of 480 x 832, the most telling first: what a share of minutes has room for, at about the mean of k.
SHAPES: dict[int, tuple[Setting, Sequence[Arm]]] = {
    17: (Setting(8, 20, (4, 5), 1, batch=4), (FLASH, INDEPENDENT, FULL)),
    81: (Setting(4, 8, (1, 2), 1, batch=4), (FLASH, FULL)),
    33: (Setting(4, 20, (4, 5), 1, batch=4), (FLASH, FULL)),
}
SMALL = Setting(2, 3, (1, 2), 1, batch=2)
_RESERVE = 0.9  # of a share of time; the rest is for what follows the last round
_SWEEP_ROUNDS, _LIMIT_S = 3, 3600.0


# -- the unattended run ------------------------------------------------------------------------------------------------


def measured(frames: int, *, small: bool = False) -> Case:
    """What :func:`events` measures."""
    return rl_records.case(rl_world.shape(MODEL, frames, small=small), SMALL if small else SHAPES[frames][0])


def events(session: Session, frames: int, seconds: float, *, small: bool = False) -> Iterator[dict[str, Any]]:
    """Records and tables at one length, within ``seconds``."""
    deadline = time.monotonic() + _RESERVE * seconds
    setting, arms = SHAPES[frames]
    wanted = [arm for arm in arms if session.wants(measured(frames, small=small).name, arm.name)]
    if not wanted:  # each took its process with it
        return
    world = rl_world.from_shape(MODEL, frames, session.device, small=small)
    yield from rl_records.events(session, Bench(world, SMALL if small else setting, wanted), deadline)


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: argparse.Namespace) -> int:
    """``reelforge bench rl``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model is not None:
        world = rl_world.from_folder(arguments.model, device)
    else:
        runner.require_gpu()
        world = rl_world.from_shape(arguments.shape, arguments.frames, device)
    setting = Setting(arguments.group, arguments.steps, (0, max(1, arguments.steps // 2)), 2)
    session = replace(Session.open(device), rounds=arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "records.jsonl"
        with Folder(out.parent, out) as folder:
            for event in rl_records.events(session, Bench(world, setting, CHAIN), time.monotonic() + _LIMIT_S):
                take(event, folder)
            if arguments.sweep:
                folder.page(rl_records.page("G, k and T one at a time", sweep(world, setting)))
    return 0


def take(event: dict[str, Any], folder: Folder) -> None:
    """Put what a measurement told where it belongs."""
    match next(iter(event.items())):
        case "record", table:
            record = parse(table)
            assert isinstance(record, Record), f"no record: {record}"
            folder.append(record)
        case "page", text:
            folder.page(text)
        case _, text:
            folder.note(text)


def sweep(world: World, base: Setting) -> str:
    """Seconds of one group as G, k and T change, one at a time, beside what its calls let expect."""
    rows = []
    for setting in sizes(base):
        bench = Bench(world, setting, (INDEPENDENT, COLLAPSED))
        bench.warm_up()
        with ClockSampler("not watched") as clocks:
            found = list(bench.rounds(_SWEEP_ROUNDS, time.monotonic() + _LIMIT_S, clocks))
        cells = [setting.label]
        for arm in bench.arms:
            hoped = spread([expected(bench, arm, each).total for each in found]).median
            cells += [f"{times(found, arm).seconds.median:.3g}", f"{hoped:.3g}"]
        ratio = times(found, COLLAPSED).ratios(times(found, INDEPENDENT))
        rows.append((*cells, f"{ratio.median:.2f}"))
    return "\n".join(lines(("seconds", "independent", "expected", "collapsed", "expected", "ratio"), rows))


def sizes(base: Setting) -> list[Setting]:
    """Group sizes, stochastic steps and step counts around ``base``, one group each."""
    group, steps = base.group_size, base.num_steps
    middle = (base.steps[1] - 1) // 2
    triples = [
        *((g, middle, steps) for g in (group // 4, group // 2, group, 2 * group) if g > 1),
        *((group, k, steps) for k in (0, steps // 4, steps // 2, 3 * steps // 4)),
        *((group, middle, t) for t in (steps // 2, 2 * steps)),
    ]
    return [Setting(g, t, (k, k + 1), 1, base.batch) for g, k, t in dict.fromkeys(triples)]
