"""GPU machines have torch, Triton and little else: what is tested there is collected without the rest."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLLECT = """
import sys

import pytest

class Absent:
    names = ("av", "diffusers", "ftfy", "hypothesis", "peft", "tokenizers", "tomli_w", "transformers")

    @classmethod
    def find_spec(cls, name, *_):
        if name.partition(".")[0] in cls.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
folders = [f"tests/{name}" for name in ("kernels", "bench", "model", "flow", "rl")]
folders.append("tests/rewards/test_scoring_gpu.py")
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", *folders]))
"""


def test_tests_are_collected_without_what_a_gpu_machine_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
