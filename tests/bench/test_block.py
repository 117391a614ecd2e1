"""The plain block computes what ours does, with and without a cache; gaps are what kernels leave of a replay."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reelforge.bench import block, cost, gaps
from reelforge.bench.arms import EAGER, Arm
from reelforge.bench.block import Setting
from reelforge.bench.cases.case import Shape
from reelforge.bench.records import OURS
from reelforge.engine.model.fp8_linear import Fp8Linear
from reelforge.kernels import dispatch
from reelforge.kernels.fp8 import quantise

CPU = torch.device("cpu")
LATENT = (16, 4, 6)


def setting(frames: int, cached: int | None) -> Setting:
    return Setting(Shape("tiny", 256, 2, 384, 6 * frames), frames, cached, LATENT)


SETTINGS = [setting(3, 6), setting(5, None), setting(3, 0)]


@pytest.mark.parametrize("made", SETTINGS, ids=lambda made: made.label)
def test_plain_block_is_ours(made: Setting) -> None:
    ours, (x, h) = block.build(made, CPU, torch.float32)
    arms = {arm.name: arm for arm in block.arms(ours, ours, CPU)}
    exact = run(Arm("exact", "exact", ours.double(), pins=block.pins("torch", "torch")), x.double(), h.double())
    for name in (EAGER, OURS):
        error = (run(arms[name], x, h).double() - exact).norm() / exact.norm()
        assert error < 1e-6, f"{name} is off by {error}"
    assert (exact - x.double()).norm() > 0.1 * exact.norm(), "the block does something"


def run(arm: Arm, *operands: Tensor) -> Tensor:
    with arm.active(False):
        return arm.op(*operands)


@pytest.mark.parametrize("made", SETTINGS, ids=lambda made: made.label)
def test_a_block_with_linears_in_e4m3(made: Setting) -> None:
    """Near the wide one, whose weights its peers keep; h comes and goes rounded."""
    wide, (x, h) = block.build(dataclasses.replace(made, fp8=True), CPU, torch.float32)
    ours = wide.rounded()
    assert len([each for each in ours.block.modules() if isinstance(each, Fp8Linear)]) == 8
    assert not any(isinstance(each, Fp8Linear) for each in wide.block.modules())
    arms = {arm.name: arm for arm in block.arms(ours, wide, CPU)}
    exact = run(arms[EAGER], x, *quantise(h))
    assert torch.equal(exact, run(arms[EAGER], x)), "a peer has its own norm"
    error = (run(arms[OURS], x, *quantise(h)) - exact).norm() / exact.norm()
    assert 1e-3 < error < block._FP8_TOLERANCE
    assert isinstance(ours.block(x, quantise(h), *ours.rest)[1], tuple)


def test_labels_and_visible_tokens() -> None:
    assert [(made.label, made.kv_tokens) for made in SETTINGS] == [
        ("tiny 18 x 54 cached", 54), ("tiny 30 x 30", 30), ("tiny 18 x 18", 18),
    ]  # fmt: skip
    full = {made.label for made in block.settings()}
    assert {"1.3B 4680 x 32760 cached", "1.3B 32760 x 32760", "14B 4680 x 4680 fp8 linears"} <= full


def test_a_cached_block_reads_the_whole_cache() -> None:
    ours, _ = block.build(setting(3, 6), CPU, torch.float32)
    chunk = ours.sequence.chunk
    assert chunk is not None and chunk.read[1] - chunk.read[0] == 54
    assert chunk.cache.keys[0, :, slice(*chunk.read)].std() > 0.5, "its past is random, not zero"


def test_fused_pins_name_every_op_and_leave_attention_to_the_library() -> None:
    dispatch.load()
    chosen = dict(block.pins("triton", "cudnn"))
    assert chosen["attention"] == "cudnn" and chosen["norm_modulate"] == "triton"
    assert chosen["fp8_linear"] == "scaled_mm" and dict(block.pins("torch", "torch"))["fp8_linear"] == "torch"
    assert set(chosen) == set(dispatch.implementations())


def test_the_work_of_a_block_is_its_ops() -> None:
    large = next(made for made in block.settings() if made.label == "1.3B 32760 x 32760")
    work = block.case(large).work
    assert work.flops == pytest.approx(9.428e12, rel=1e-3)
    assert cost.floor(work, cost.H200).bound == "tensor cores"


def test_predictions_are_printed_beside_the_times() -> None:
    large = next(made for made in block.settings() if made.label == "1.3B 32760 x 32760")
    assert "compiled, cuDNN 16.2 ms" in block.predictions(large)


def test_gaps_of_a_replay() -> None:
    names = ("void at::native::copy_kernel<float>(float*)", "norm_kernel", "norm_kernel")
    spans = ((0.0, 10.0), (12.0, 42.0), (40.0, 70.0))  # two overlap
    launches = [
        gaps.Launch(name, 75.0 * replay + start, 75.0 * replay + end)
        for replay in range(3)
        for name, (start, end) in zip(names, spans, strict=True)
    ]
    found = gaps.summarise(launches[::-1], replay_s=80e-6, replays=3)
    assert found.holes_us == pytest.approx((3 * 2.0 + 2 * 5.0) / 3)
    assert "5.3 us lie between one's end and the next one's start" in found.markdown("a block")
    assert [(kernel.name, kernel.launches, kernel.us) for kernel in found.kernels] == [
        ("norm_kernel", 2, 60.0), ("copy_kernel", 1, 10.0),
    ]  # fmt: skip
    assert found.gap == pytest.approx(0.125) and found.launches == 3
    assert "12.5 % of a replay" in found.markdown(
        "a block"
    ) and "| `norm_kernel` | 2 | 60.0 | 75.0 % |" in found.markdown("b")


def test_time_and_trace_are_of_bursts_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    bursts: list[tuple[int, bool]] = []
    profiling: list[bool] = []

    class Profile:
        def __init__(self, activities: list) -> None:
            profiling.append(True)

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list:
            span = SimpleNamespace(start=0.0, end=30.0)
            device = gaps.DeviceType.CUDA
            return [
                SimpleNamespace(name="spin_kernel(long)", device_type=device, time_range=span),
                SimpleNamespace(name="norm_kernel", device_type=device, time_range=span),
            ]

    def burst(replay: object, replays: int, lead_s: float) -> float:
        bursts.append((replays, bool(profiling)))
        return 2e-3

    monkeypatch.setattr(gaps, "profile", Profile)
    monkeypatch.setattr(gaps.samplers, "between_events", burst)
    monkeypatch.setattr(gaps.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gaps.breakdown(lambda: None, 2.5e-3)
    assert bursts == [(8, False), (8, True)]
    assert found is not None and found.replay_us == 2e3
    assert [kernel.name for kernel in found.kernels] == ["norm_kernel"], "the lead is no part of it"


def test_a_replayed_op_is_captured_once_for_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []

    class Graph:
        def __init__(self, call: object) -> None:
            captures.append(call)
            self.replay = call

    monkeypatch.setattr(block.samplers, "capture", Graph)
    op = block.Replayed(lambda x: x + 1)
    x, y = torch.zeros(2), torch.ones(2)
    assert torch.equal(op(x), y) and torch.equal(op(x), y) and len(captures) == 1
    assert torch.equal(op(y), y + 1) and len(captures) == 2
