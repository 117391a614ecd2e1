"""RLHF iterations of the miniature, each arm against the one before it, beside what the arithmetic expects.

As in :mod:`bench_dit` the two of a pair take turns. ``extra_info.ratio`` is the later arm's time over the earlier
one's, below 1 where the step pays; ``expected`` follows from the network calls' own times, ``forwards`` from their
number.
"""

import statistics
from itertools import pairwise

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from reelforge.bench import rl_world
from reelforge.bench.miniature import CASES
from reelforge.bench.rl_arms import CHAIN, FLASH, FULL, Arm, Setting
from reelforge.bench.rl_iteration import Bench, Round, Split, compare

ROUNDS = 5
SETTING = Setting(8, 10, (0, 5), 2)


@pytest.mark.parametrize(("other", "arm"), [*pairwise(CHAIN), (FLASH, FULL)], ids=lambda arm: arm.name)
def bench_iteration(benchmark: BenchmarkFixture, other: Arm, arm: Arm) -> None:
    case = CASES[0]
    world = rl_world.from_config(
        case.name, case.config, case.latents[1:], case.text_tokens, torch.device("cpu"), adapted=False
    )
    bench = Bench(world, SETTING, (other, arm))
    bench.warm_up()
    theirs: list[Split] = []
    ours: list[Split] = []

    def time_other() -> None:
        theirs.append(bench.turn(other, len(theirs)))

    benchmark.pedantic(lambda: ours.append(bench.turn(arm, len(ours))), setup=time_other, rounds=ROUNDS)
    turns = enumerate(zip(theirs, ours, strict=True))
    found: list[Round] = [bench.as_round(number, {other.name: a, arm.name: b}) for number, (a, b) in turns]
    ratio = compare(bench, found, arm, other)
    benchmark.extra_info["other_ms"] = round(1e3 * statistics.median(split.total for split in theirs), 1)
    benchmark.extra_info["ratio"] = round(1 / ratio.measured.median, 3)
    benchmark.extra_info["expected"] = round(1 / ratio.expected, 3)
    benchmark.extra_info["forwards"] = round(1 / ratio.forwards, 3)
