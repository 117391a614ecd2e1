"""The plan's bytes are those of real tensors: on the meta device, in autograd's hands, and in a whole cycle."""

import gc
from functools import cache

import pytest
import torch
from torch import Tensor

from reelforge.bench import wan_cost
from reelforge.bench.cases.case import Shape
from reelforge.bench.distill_forecast import Forecast, Ledger, forward_flops, network, price_dmd, simulated
from reelforge.bench.rl_training import saved_bytes
from reelforge.engine.distill.dmd import DmdConfig
from reelforge.engine.distill.self_forcing import replay, roll_out
from reelforge.engine.distill.trainer import DmdTask, RolloutConfig, Student
from reelforge.engine.distill.turns import Turns
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.generation import ChunkDecoder, Guidance, half_precision
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.lora import LoraConfig, inject
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig
from reelforge.engine.model.weights import storage_dtype
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig, TrainState
from reelforge.kernels import dispatch

# The miniature's widths.
MINIATURE = WanConfig(num_attention_heads=4, attention_head_dim=32, text_dim=64, ffn_dim=512, num_layers=2)
LARGE = WanConfig(num_attention_heads=6, attention_head_dim=32, text_dim=64, ffn_dim=640, num_layers=3)
WAN_1_3B = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
SHAPE, PATTERN, WORDS = (16, 4, 16, 24), (1, 1, 1, 1), 24
SCHEDULE = FlowSchedule("unipc_flow", 5.0)
GRID = SCHEDULE.few_step((1000.0, 500.0))
KEPT, NONE = OptimizerConfig(ema_decay=0.9, warmup_steps=0), OptimizerConfig(ema_decay=0.0, warmup_steps=0)


def task(student: WanTransformer, critic: WanTransformer, teacher: WanTransformer, text: Tensor, **train) -> DmdTask:
    rolled = Student(student, GRID, PATTERN, SHAPE)
    loop = LoopConfig(**{"batch_size": 1, "micro_batch_size": 1, "precision": "bf16", **train})
    dmd = DmdConfig(critic_steps=1)
    return DmdTask(rolled, critic, teacher, text, range(len(text) - 1), dmd, RolloutConfig("last"), SCHEDULE, loop)


@cache
def forecast(checkpointing: bool = False, device: str = "cpu", rows: int = 1, **train) -> Forecast:
    with simulated(device) as ledger:
        models = [network(config) for config in (MINIATURE, MINIATURE, LARGE)]
        for model in models:
            model.gradient_checkpointing = checkpointing
        models[2].requires_grad_(False)
        text = torch.empty(rows + 1, WORDS, MINIATURE.text_dim)
        return price_dmd(ledger, task(*models, text, micro_batch_size=rows, **train), KEPT, NONE)


def part(found: Forecast, moment: str, name: str) -> int:
    return found.moments[moment][name][0]


# -- weights and what is learnt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [WAN_1_3B, WanConfig()], ids=["1.3B", "14B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_meta_device(config: WanConfig, dtype: torch.dtype) -> None:
    meta = WanTransformer.from_config(config.to_dict(), device="meta").named_parameters()
    expected = sum(p.numel() * storage_dtype(name, dtype).itemsize for name, p in meta)
    with simulated("cpu"):
        made = list(network(config, dtype).parameters())
        found, count = sum(p.nbytes for p in made), sum(p.numel() for p in made)
    assert found == expected
    assert count == pytest.approx({12: 1.419e9, 40: 14.29e9}[config.num_attention_heads], rel=1e-3)


def test_student_and_critic_by_hand() -> None:
    size = 4 * sum(p.numel() for p in WanTransformer(MINIATURE).parameters())
    found = forecast().always
    for who, averages in (("student", 1), ("critic", 0)):
        assert found[f"{who}: weights"] == found[f"{who}: gradients"] == (size, "float32")
        assert found[f"{who}: Adam's moments"] == (2 * size, "float32")
        assert (f"{who}: average" in found) == bool(averages)
    assert found["teacher: weights"][0] == 4 * sum(p.numel() for p in WanTransformer(LARGE).parameters())


def test_an_adapter_learns_little_on_frozen_bf16_weights() -> None:
    lora = LoraConfig(rank=8)
    real = WanTransformer.from_config(MINIATURE.to_dict())
    for name, parameter in real.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, torch.bfloat16))
    inject(real, lora, 0)
    with simulated("cpu"):
        made = network(MINIATURE, torch.bfloat16, lora)
        sizes = {name: (p.nbytes, p.requires_grad) for name, p in made.named_parameters()}
    assert sizes == {name: (p.nbytes, p.requires_grad) for name, p in real.named_parameters()}


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_what_autograd_saves(precision: str, checkpointing: bool) -> None:
    """The last chunk's replay and the critic's step, with real tensors."""
    found = forecast(checkpointing, precision=precision)
    half = half_precision(torch.device("cpu"), precision == "bf16")
    with Ledger() as ledger:
        model = WanTransformer.from_config(MINIATURE.to_dict())
        model.gradient_checkpointing = checkpointing
        text, noise = torch.randn(1, WORDS, 64), torch.randn(1, *SHAPE)
        with half:
            decoder = ChunkDecoder(model, Guidance(text, text[:0], 1.0), 1, SHAPE[1], SHAPE[2:])
            rolled = roll_out(decoder, noise, GRID, lambda k: noise, PATTERN, [1] * 4)

        def replayed() -> Tensor:
            with half:
                return replay(model, rolled, rolled.exits[-1], text, GRID).square().mean()

        def criticised() -> Tensor:
            with half:
                return model(noise, torch.full((1,), 500.0), text).float().square().mean()

        # Checkpointing also holds tensors in closures, which no hook of autograd's sees.
        real = [ledger.cost(call)[1] if checkpointing else saved_bytes(call, model) for call in (replayed, criticised)]
    assert found.moments["replay"]["KV cache"][0] == decoder.cache.num_bytes
    replayed = found.moments["replay"]
    copies = replayed.get("copies of its past", (0, ""))[0]
    assert copies == (0 if checkpointing else 2 * 2 * 3 * 96 * 128 * {"bf16": 2, "fp32": 4}[precision])
    assert replayed["replayed chunk activations"][0] + copies == pytest.approx(real[0], rel=0.03)
    assert part(found, "critic", "critic's activations") == pytest.approx(real[1], rel=0.03)


def test_a_video_that_goes_on_keeps_its_cache() -> None:
    with simulated("cpu") as ledger:
        models = [network(MINIATURE) for _ in range(3)]
        made = task(*models, torch.empty(2, WORDS, 64))
        made.rollout = RolloutConfig("last", segments=3)
        found = price_dmd(ledger, made, KEPT, NONE)
    once = forecast()
    frame = once.moments["rollout"]["KV cache"][0] / 5
    assert found.moments["critic"]["KV cache"][0] == 13 * frame, "12 frames and the scratch slot"
    assert "KV cache" not in once.moments["critic"]


def test_checkpointing_trades_activations_for_little() -> None:
    kept, recomputed = (part(forecast(ck), "critic", "critic's activations") for ck in (False, True))
    assert recomputed < kept / 3


def test_rows_scale_what_is_not_weights() -> None:
    one, three = forecast(precision="fp32"), forecast(rows=3, batch_size=3, precision="fp32")
    assert three.moments["replay"]["KV cache"][0] == 3 * one.moments["replay"]["KV cache"][0]
    assert part(three, "critic", "critic's activations") == pytest.approx(
        3 * part(one, "critic", "critic's activations"), rel=0.02
    )
    assert {name: size for name, size in one.always.items() if ":" in name} == {
        name: size for name, size in three.always.items() if ":" in name
    }


def test_fused_kernels_are_counted_where_they_would_run() -> None:
    """Pinned as for a GPU that proved them; nothing is launched, so this machine needs none."""
    plain = part(forecast.__wrapped__(device="cuda"), "replay", "replayed chunk activations")
    with dispatch.pinned("gated_residual_norm", "triton"), dispatch.pinned("qk_norm_rope", "triton"):
        fused = part(forecast.__wrapped__(device="cuda"), "replay", "replayed chunk activations")
    assert fused < 0.9 * plain


# -- a whole cycle -----------------------------------------------------------------------------------------------------


def test_a_real_cycle_peaks_where_the_plan_says() -> None:
    """Two cycles of the trainer itself, two micro-batches a step: the second cycle's peaks, turn by turn."""
    found = forecast(batch_size=2)
    ledger, peaks = Ledger(), {}
    with ledger:
        models = [WanTransformer.from_config(config.to_dict()) for config in (MINIATURE, MINIATURE, LARGE)]
        models[2].requires_grad_(False)
        real = task(*models, torch.randn(4, WORDS, 64), batch_size=2)
        states = [TrainState(dict(m.named_parameters()), o, 2) for m, o in zip(models, (KEPT, NONE), strict=False)]
        turns = Turns(*states, critic_steps=1)
        for step in range(4):
            gc.collect()
            ledger.peak = ledger.now
            turns.optimizer_step(real.losses(step))
            peaks[step] = ledger.peak
    critic, student = (
        max(map(found.total, ("rollout", "critic"))),
        max(map(found.total, found.moments.keys() - {"critic"})),
    )
    assert peaks[2] == pytest.approx(critic, rel=0.05)
    assert peaks[3] == pytest.approx(student, rel=0.05)


def test_the_ledger_forgets_what_is_freed() -> None:
    with Ledger() as ledger:
        x = torch.zeros(1000)
        view, other = x[10:], x + 1
        assert ledger.now == 8000
        del other
        assert (ledger.now, ledger.peak) == (4000, 8000)
        _, kept, peak = ledger.cost(lambda: (view + 1).sum())
        assert (kept, peak) == (4, 3964)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_flops_are_the_benchmarks() -> None:
    tokens, past = 4680, 28080
    shape = Shape("1.3B", 1536, 12, 8960, tokens)
    block = wan_cost.block_flops(shape, past + tokens).block
    counted = forward_flops(WAN_1_3B, tokens, tokens * (past + tokens), 512, text_cached=True)
    assert counted == pytest.approx(30 * block)
    assert (
        forward_flops(WAN_1_3B, tokens, 1, 512) - forward_flops(WAN_1_3B, tokens, 1, 512, True)
        == 30 * 4 * 512 * 1536**2
    )


def test_a_cycles_flops_by_hand() -> None:
    """Chunks of 96 tokens behind 0 to 3 others, every step, all but the last committed; critic_steps is 1."""

    def chunk(config: WanConfig, number: int, **how: bool) -> float:
        return forward_flops(config, 96, 96 * 96 * (number + 1), WORDS, **how)

    rolled = sum((2 + (n < 3)) * chunk(MINIATURE, n, text_cached=True) for n in range(4))
    whole = {config.num_layers: forward_flops(config, 384, 384 * 384, WORDS) for config in (MINIATURE, LARGE)}
    assert forecast().flops == pytest.approx({
        "rollout": 2 * rolled,
        "teacher": 2 * whole[3],
        "replay": 3 * sum(chunk(MINIATURE, n) for n in range(4)),
        "critic": 4 * whole[2],
    })  # fmt: skip


def test_without_a_clean_pass_a_rollout_is_its_steps() -> None:
    with simulated("cpu") as ledger:
        models = [network(MINIATURE) for _ in range(3)]
        made = task(*models, torch.empty(2, WORDS, 64))
        made.rollout = RolloutConfig("last", ContextConfig("last_step"))
        found = price_dmd(ledger, made, KEPT, NONE).flops["rollout"]
    steps = sum(2 * forward_flops(MINIATURE, 96, 96 * 96 * (n + 1), WORDS, text_cached=True) for n in range(4))
    assert found == pytest.approx(2 * steps)
