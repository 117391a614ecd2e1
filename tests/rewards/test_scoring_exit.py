"""A scorer that hangs neither keeps the process nor takes its exit status away."""

import subprocess
import sys

import pytest

EXIT = """
import sys, time
import torch
from reelforge.engine.rewards import scoring
from reelforge.engine.rewards.contract import Scores

scoring._GRACE_S = 0.5

def sleeps():
    time.sleep(1000)

def computes():
    x = torch.ones(64, 64)
    while True:
        x = (x @ x).tanh()

class Hangs:
    axes = ("bad",)

    def score(self, videos, prompts):
        {kind}()

config = scoring.ScoringConfig(timeout_s={timeout}, overlap={overlap})
run = scoring.Scoring([Hangs()], lambda latents: latents.byte(), config)
pending = [run.submit(torch.zeros(2, 1, 1, 1, 3), ["a", "b"]) for _ in range(3)]
if {timeout} < 1:
    assert pending[0].result()["bad"].values.isnan().all()
else:
    time.sleep(0.3)  # at work on the first batch, the others wait
print("left")
sys.exit(3)
"""


@pytest.mark.parametrize(
    "kind, overlap, timeout", [("sleeps", False, 0.2), ("computes", True, 0.2), ("computes", True, 600.0)]
)
def test_the_process_ends_with_its_own_status(kind: str, overlap: bool, timeout: float) -> None:
    """Without care the interpreter dies of its daemon threads: status 134, "terminate called"."""
    code = EXIT.format(kind=kind, overlap=overlap, timeout=timeout)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "left\n", "")
