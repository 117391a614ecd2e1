"""Freed tensors are used again: no page faults once a process runs. Each in a process of its own, to be changed."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, torch
from reelforge.engine.core.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(6)]  # 4 MiB each
    return sum((tensor + 1).sum() for tensor in tensors)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def faults_a_step(keep: bool) -> float:
    code = _FAULTS.format(keep=keep)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_is_kept() -> None:
    assert faults_a_step(keep=True) < 10
    assert faults_a_step(keep=False) > 1000, "else the setting is needless by now"
