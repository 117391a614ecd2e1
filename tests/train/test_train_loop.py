"""The loop: resume, micro-batches, guards, learning rate, storage failures, metrics."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, ConfigError, Interrupted, StorageError, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.io import checkpoint
from reelforge.engine.train.flow_loss import FlowLossConfig, draw_noise, draw_sigmas, flow_losses
from reelforge.engine.train.loop import Hooks, LoopConfig, TrainLoop
from reelforge.engine.train.state import OptimizerConfig, TrainState, learning_rate

SHAPE = (2, 2, 3, 3)
SCHEDULE = FlowSchedule("euler", 2.0)
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A denoiser of a few hundred weights with the transformer's signature."""

    def __init__(self) -> None:
        super().__init__()
        width = math.prod(SHAPE)
        self.inner, self.outer = nn.Linear(width + 1, 24), nn.Linear(24, width)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.2 * rng.normal([number], parameter.shape)[0]

    def forward(self, latents, timestep, text):
        x = torch.cat((latents.flatten(1), timestep[:, None] / 1000), dim=1)
        return self.outer(torch.tanh(self.inner(x))).view_as(latents)


def micro_losses(model, step: int, batch: int = 8, micro: int = 8, seed: int = 0):
    clips = rng.normal(range(100, 100 + batch), SHAPE)
    sigma = draw_sigmas(FlowLossConfig(), SCHEDULE, seed, step, batch)
    for start in range(0, batch, micro):
        part = slice(start, start + micro)
        noise = draw_noise(seed, step, range(batch)[part], SHAPE, CPU)
        losses = flow_losses(model, clips[part], noise, sigma[part], torch.zeros(micro, 1, 1))
        yield losses.sum() / batch


OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=5, decay="cosine", ema_decay=0.9)


class Run:
    """One process' worth of a training run in a folder."""

    def __init__(self, folder: Path, losses=micro_losses, config: LoopConfig | None = None, **hooks) -> None:
        self.config = config or LoopConfig(steps=23, log_every=4, checkpoint_every=6)
        self.model = Tiny()
        self.state = TrainState(dict(self.model.named_parameters()), OPTIMIZER, self.config.steps)
        self.dir = RunDir.open(folder, self.config)
        self.loop = TrainLoop(self.state, self.config, self.dir, "cafe", "test")
        self.hooks = Hooks(lambda step: losses(self.model, step), **hooks)

    def go(self) -> "Run":
        self.loop.resume()
        self.loop.fit(self.hooks)
        return self

    def bits(self) -> dict[str, torch.Tensor]:
        groups = self.state.groups()
        return {f"{g}/{name}": t.detach().clone() for g, tensors in groups.items() for name, t in tensors.items()}

    def lines(self) -> list[dict]:
        return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in read_jsonl(self.dir.metrics)]

    def events(self) -> list[str]:
        return [line["event"] for line in read_jsonl(self.dir.events)]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAfter:
    """Losses that raise the stop signal during one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, model, step):
        if step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_losses(model, step)


@pytest.mark.parametrize("stop", [1, 6, 9, 12, 22])
def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    whole = Run(tmp_path / "whole", at_checkpoint=lambda step: {"validation_loss": step / 7}).go()
    first = Run(tmp_path / "parts", StopAfter(stop), at_checkpoint=lambda step: {"validation_loss": step / 7})
    with pytest.raises(Interrupted, match=f"SIGTERM after step {stop} of 23"):
        first.go()
    second = Run(tmp_path / "parts", at_checkpoint=lambda step: {"validation_loss": step / 7})
    assert second.loop.resume() == stop
    assert_same(first.bits(), second.bits())
    second.loop.fit(second.hooks)
    assert_same(whole.bits(), second.bits())
    assert whole.lines() == second.lines() and len(whole.lines()) == 10
    assert second.events() == ["stopped"]


def test_a_crash_falls_back_to_the_last_checkpoint_and_repeats_the_same_steps(tmp_path):
    def crash(model, step):
        if step == 15:
            raise RuntimeError("power cut")
        return micro_losses(model, step)

    whole = Run(tmp_path / "whole").go()
    with pytest.raises(RuntimeError):
        Run(tmp_path / "parts", crash).go()
    shard = next((tmp_path / "parts/checkpoints/step-00000012").glob("adam*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again = Run(tmp_path / "parts")
    assert again.loop.resume() == 6 and again.events() == ["checkpoint_damaged"]
    again.loop.fit(again.hooks)
    assert_same(whole.bits(), again.bits())
    assert whole.lines() == again.lines()


def test_finished_run_does_nothing_more(tmp_path):
    run = Run(tmp_path).go()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = Run(tmp_path).go()
    assert again.state.step == 23 and (tmp_path / "metrics.jsonl").read_text() == before
    assert_same(run.bits(), again.bits())


def loss_and_gradient(micro: int) -> tuple[float, torch.Tensor]:
    model = Tiny()
    losses = []
    for loss in micro_losses(model, 3, micro=micro):
        loss.backward()
        losses.append(loss.item())
    return sum(losses), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro):
    whole_loss, whole = loss_and_gradient(8)
    loss, gradient = loss_and_gradient(micro)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-6 * whole.abs().max().item())


def test_one_step_is_torchs_clipped_adamw():
    ours, theirs = Tiny(), Tiny()
    state = TrainState(dict(ours.named_parameters()), OPTIMIZER, 20)
    config = {"lr": OPTIMIZER.lr, "weight_decay": OPTIMIZER.weight_decay}
    reference = torch.optim.AdamW(theirs.parameters(), **config, foreach=False)
    for step in range(12):
        state.optimizer_step(micro_losses(ours, step, micro=2))
        reference.zero_grad()
        sum(micro_losses(theirs, step)).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), OPTIMIZER.grad_clip)
        reference.param_groups[0]["lr"] = learning_rate(OPTIMIZER, step, 20)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_overfits_one_sample():
    x0, noise = rng.normal([1], SHAPE), rng.normal([2], SHAPE)
    model = Tiny()
    config = OptimizerConfig(lr=1e-2, warmup_steps=10, decay="cosine", weight_decay=0.0, grad_clip=100.0)
    state = TrainState(dict(model.named_parameters()), config, 300)
    sigma, text = torch.tensor([0.5]), torch.zeros(1, 1, 1)
    for _ in range(300):
        state.optimizer_step([flow_losses(model, x0, noise, sigma, text).sum()])
    assert flow_losses(model, x0, noise, sigma, text).item() < 1e-3


def poisoned(site: str, value: float, steps: set[int]):
    """Losses whose value, gradient or activations are multiplied by ``value`` in some steps."""

    def times(*arguments):
        return arguments[-1] * value

    def losses(model, step):
        if step not in steps:
            yield from micro_losses(model, step, micro=4)
        elif site == "loss":
            yield from (loss * value for loss in micro_losses(model, step, micro=4))
        else:
            hook = model.outer.bias.register_hook if site == "gradient" else model.inner.register_forward_hook
            handle = hook(times)
            yield from micro_losses(model, step, micro=4)
            handle.remove()

    return losses


@pytest.mark.parametrize(
    ("site", "value"),
    [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan), ("gradient", math.inf), ("activation", math.nan)],
)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_bad_step_is_skipped_and_touches_no_bit(site, value, step):
    model = Tiny()
    state = TrainState(dict(model.named_parameters()), OPTIMIZER, 20)
    losses = poisoned(site, value, {step})
    for number in range(step):
        state.optimizer_step(losses(model, number))
    before = {g: {n: t.detach().clone() for n, t in ts.items()} for g, ts in state.groups().items()}
    state.optimizer_step(losses(model, step))
    after = state.groups()
    for group in ("weights", "ema"):
        assert_same(before[group], after[group])
    if step:
        assert_same(before["adam"], after["adam"])
    else:
        assert all((t == 0).all() for t in after["adam"].values())
    assert state.meter.read()["skipped"] == 1 and state.step == step + 1
    state.optimizer_step(losses(model, step + 1))
    assert not torch.equal(before["weights"]["inner.weight"], state.parameters["inner.weight"])


def test_skips_are_counted_and_too_many_in_a_row_stop_the_run(tmp_path):
    run = Run(tmp_path / "few", poisoned("loss", math.nan, {4, 6, 7, 9})).go()
    counts = [line["skipped"] for line in run.lines() if "skipped" in line]
    assert counts == [0, 3, 1, 0, 0, 0] and run.events() == ["steps_skipped", "steps_skipped"]
    stopped = Run(tmp_path / "many", poisoned("loss", math.nan, set(range(13, 23))))
    with pytest.raises(TrainingError, match=r"By step 16, 3 steps in a row .*loss nan.*step 12"):
        stopped.go()
    assert stopped.events() == ["diverged"]
    json.loads((tmp_path / "many/events.jsonl").read_text(), parse_constant=pytest.fail)
    assert checkpoint.latest(stopped.dir.checkpoints, pytest.fail).name == "step-00000012"


def test_a_streak_is_remembered_across_a_stop(tmp_path):
    bad = poisoned("loss", math.nan, {8, 9, 10})
    stop = StopAfter(10)

    def bad_and_stopped(model, step):
        stop(model, step)
        return bad(model, step)

    with pytest.raises(Interrupted):
        Run(tmp_path, bad_and_stopped).go()
    with pytest.raises(TrainingError, match="3 steps in a row"):
        Run(tmp_path, bad).go()


def test_a_failed_checkpoint_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    real = checkpoint.save

    def full_at_12(folder, step, *rest):
        if step == 12:
            raise StorageError("The disk is full.", "Free space.")
        return real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full_at_12)
    run = Run(tmp_path).go()
    assert run.events() == ["checkpoint_failed"] and run.state.step == 23
    monkeypatch.setattr(checkpoint, "save", lambda *rest: full_at_12(rest[0], 12))
    with pytest.raises(StorageError, match="disk is full"):
        Run(tmp_path / "last", config=LoopConfig(steps=2, checkpoint_every=5)).go()


def test_another_models_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path).go()
    saved = checkpoint.load(run.dir.checkpoints / "step-00000023")
    del saved.groups["weights"]["inner.bias"]
    with pytest.raises(CheckpointError, match=r"inner\.bias"):
        Run(tmp_path / "b").state.restore(saved)
    saved.groups["weights"]["inner.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"inner\.bias is \[3\] .* \[24\]"):
        Run(tmp_path / "c").state.restore(saved)


def test_learning_rate_schedule():
    def rates(decay):
        return [learning_rate(OptimizerConfig(lr=2.0, warmup_steps=4, decay=decay), s, 12) for s in range(12)]

    assert rates("constant") == [0.5, 1.0, 1.5, 2.0] + [2.0] * 8
    assert rates("linear")[4:] == pytest.approx([2.0 * (1 - i / 8) for i in range(8)])
    assert rates("cosine")[4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])


@pytest.mark.parametrize("name", ["steps", "batch_size", "micro_batch_size", "log_every", "keep_last"])
def test_impossible_lengths_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        LoopConfig(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"), [("ema_decay", 1.0), ("lr", 0.0), ("grad_clip", -1.0), ("max_bad_steps", 0)]
)
def test_impossible_optimizers_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        OptimizerConfig(**{name: value})
