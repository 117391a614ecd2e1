"""SIGTERM and SIGINT to a training process: it saves, leaves, and continues exactly."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ReelforgeError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.train.loop import Hooks, LoopConfig, TrainLoop
from reelforge.engine.train.state import OptimizerConfig, TrainState

CONFIG = LoopConfig(steps=40, log_every=5, checkpoint_every=15)
STEP_S = 0.01


def train(folder: Path, step_s: float = 0.0) -> TrainState:
    """Run or continue; ``step_s`` stretches each step so that a signal lands inside the run."""
    model = nn.Linear(6, 6)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = rng.normal([number], parameter.shape)[0]

    def losses(step):
        time.sleep(step_s)
        x = rng.normal([rng.key("x", step)], (6,))
        yield (model(x) - x.flip(1)).square().mean()

    state = TrainState(dict(model.named_parameters()), OptimizerConfig(lr=1e-2, warmup_steps=1), CONFIG.steps)
    loop = TrainLoop(state, CONFIG, RunDir.open(folder, CONFIG), "cafe", "test")
    loop.resume()
    loop.fit(Hooks(losses))
    return state


def exit_status_of_signalled_run(folder: Path, number: int, chance: random.Random) -> int:
    """Train in a child process, signal it once it has begun, and wait."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder, STEP_S)
            code = 0
        except ReelforgeError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(read_jsonl(folder / "metrics.jsonl")):
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 25) * STEP_S)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def lines(folder: Path) -> list[dict]:
    records = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in records]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signalled_runs_save_and_continue_exactly(tmp_path, number):
    whole = train(tmp_path / "whole").groups()
    chance, stopped = random.Random(int(number)), 0
    for trial in range(5):
        folder = tmp_path / f"run{trial}"
        stopped += exit_status_of_signalled_run(folder, number, chance) == 130
        events = list(read_jsonl(folder / "events.jsonl"))
        assert all(event["event"] == "stopped" and event["signal"] == number.name for event in events)
        continued = train(folder).groups()
        for group, tensors in whole.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, continued[group][name]), name
        assert lines(folder) == lines(tmp_path / "whole")
    assert stopped >= 3, "the signals came too late to test anything"
