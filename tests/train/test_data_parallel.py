"""Two gloo processes against one: same weights, one writer, common stop, replica check."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from two_processes import in_two_processes

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import ConfigError, Interrupted, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.io import checkpoint
from reelforge.engine.train.flow_loss import FlowLossConfig, draw_noise, draw_sigmas, flow_losses
from reelforge.engine.train.loop import Hooks, LoopConfig, TrainLoop
from reelforge.engine.train.state import OptimizerConfig, TrainState
from reelforge.engine.train.validation import frozen_sigmas, validate

SHAPE, BATCH = (2, 2, 3, 3), 8
CONFIG = LoopConfig(steps=12, log_every=4, checkpoint_every=6)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(36, 36)
        self.line.weight.data, self.line.bias.data = rng.normal([1], (36, 36))[0] * 0.1, torch.zeros(36)

    def forward(self, latents, timestep, text):
        return (self.line(latents.flatten(1)) * (timestep[:, None] / 1000)).view_as(latents)


def losses_of(model):
    clips = rng.normal(range(BATCH), SHAPE)

    def losses(step):
        sigma = draw_sigmas(FlowLossConfig(), FlowSchedule(), 0, step, BATCH)
        for slot in distributed.own_slots(BATCH):
            noise = draw_noise(0, step, [slot], SHAPE, torch.device("cpu"))
            text = torch.zeros(1, 1, 1)
            yield flow_losses(model, clips[slot : slot + 1], noise, sigma[slot : slot + 1], text).sum() / BATCH

    return losses


def held_out(number: int):
    return rng.normal([rng.key("held_out", number)], SHAPE), torch.zeros(1, 1, 1)


def train(folder: Path) -> None:
    model = Tiny()
    state = TrainState(dict(model.named_parameters()), OptimizerConfig(lr=1e-2, warmup_steps=2), CONFIG.steps)
    run = RunDir.open(folder, CONFIG) if distributed.rank() == 0 else RunDir(folder)
    loop = TrainLoop(state, CONFIG, run, "cafe", "test")
    loop.resume()
    loop.fit(Hooks(losses_of(model), lambda step: validate(model, held_out, 3, 4, "fp32")))


def test_two_ranks_train_as_one(tmp_path):
    train(tmp_path / "one")
    assert in_two_processes(lambda rank: train(tmp_path / "two"), tmp_path) == [0, 0]
    one, two = (checkpoint.load(tmp_path / name / "checkpoints/step-00000012") for name in ("one", "two"))
    for group in ("weights", "ema", "adam"):
        for name, tensor in one.groups[group].items():
            torch.testing.assert_close(two.groups[group][name], tensor, rtol=0, atol=1e-6)
    for a, b in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_s"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5)


def diverge(rank: int, folder: Path) -> int:
    try:
        distributed.check_replicas({"same": torch.ones(3), "other": torch.full((3,), 1.0 + rank)})
    except TrainingError as error:
        return 7 if "Weight other differs" in error.what else 1
    return 2


def stop_on_one_rank(rank: int, folder: Path) -> int:
    model = Tiny()
    state = TrainState(dict(model.named_parameters()), OptimizerConfig(), CONFIG.steps)
    loop = TrainLoop(state, CONFIG, RunDir(folder / "stop"), "cafe", "test")
    inner = losses_of(model)

    def losses(step):
        if step == 4 and rank == 1:
            os.kill(os.getpid(), 15)
        return inner(step)

    try:
        loop.fit(Hooks(losses))
    except Interrupted:
        return 9 if state.step == 5 else 3
    return 2


def test_ranks_that_drift_apart_stop_and_one_ranks_signal_stops_all(tmp_path):
    assert in_two_processes(lambda rank: diverge(rank, tmp_path), tmp_path) == [7, 7]
    assert in_two_processes(lambda rank: stop_on_one_rank(rank, tmp_path), tmp_path) == [9, 9]
    assert checkpoint.latest(tmp_path / "stop/checkpoints", pytest.fail).name == "step-00000005"


def test_slots_are_shared_out_evenly_and_completely(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(distributed.own_slots(8)))
    assert sum(parts, []) == list(range(8)) and {len(part) for part in parts} == {2, 3}
    with pytest.raises(ConfigError, match="global batch of 2 leaves some of 3 processes idle"):
        distributed.own_slots(2)


def test_validation_is_paired_and_spreads_over_bins():
    model = Tiny()
    first = validate(model, held_out, 5, 3, "fp32")
    again = validate(model, held_out, 5, 8, "fp32")
    assert again["validation_bins"] == pytest.approx(first["validation_bins"], rel=1e-6)
    assert first["validation_loss"] == pytest.approx(sum(first["validation_bins"]) / 8)
    sigmas = torch.stack([frozen_sigmas(clip) for clip in range(64)])
    assert (torch.floor(sigmas * 8) == torch.arange(8)).all()
    gaps = sigmas[:, 0].sort().values.diff()
    assert gaps.max() < 3 / 64 / 8  # golden ratio: no gap is three times the even one
    # By hand for one clip and one bin.
    x0, text = held_out(2)
    sigma = frozen_sigmas(2)[3:4]
    noise = rng.normal([rng.key("validation", 2, 3)], SHAPE)
    by_hand = flow_losses(model, x0, noise, sigma, text)
    three = [validate(model, held_out, n, 8, "fp32")["validation_bins"][3] * n for n in (2, 3)]
    assert three[1] - three[0] == pytest.approx(by_hand.item(), rel=1e-4)
