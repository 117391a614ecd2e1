"""Plain work: its kernels compute what they say, and a machine's peak is what its plain work reached."""

import pytest
import torch

from reelforge.bench import cost, peaks
from reelforge.bench.accuracy import Exact
from reelforge.bench.cases.case import Draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAW = Draw(DEVICE, torch.Generator(DEVICE).manual_seed(0))


@pytest.mark.parametrize("label", ["copy", "bf16", "launch torch"])
def test_plain_work_is_right(label: str) -> None:
    case = next(case for case in peaks.cases(torch.device("cpu")) if case.label == label)
    assert Exact(case, case.inputs(DRAW)).quality(case.run).gate == "pass"


def test_l2_reads_every_block_it_counts() -> None:
    case = peaks._l2_read(blocks=5, programs=3)
    assert Exact(case, case.inputs(DRAW)).quality(case.run).gate == "pass"
    assert case.work.bytes == 3 * 64 * 4096 * 4


def test_the_tiny_kernel_adds_one() -> None:
    x = torch.tensor([2.0], device=DEVICE)
    assert peaks._launch_tiny(x).item() == 3.0


def test_peak_of_this_machine() -> None:
    peak = peaks.measure(torch.device("cpu"), "no NVML here", rounds=2)
    assert peak.name == "measured" and 1e8 < peak.bytes_per_s < 1e13
    assert peak.flops[torch.bfloat16] == peak.flops[torch.float8_e4m3fn] > 0, "fp8 counts as bf16 where it does not run"
    assert peak.sm_clock_hz == cost.PLAN.sm_clock_hz
