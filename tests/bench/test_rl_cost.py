"""The arithmetic of an RLHF iteration gives the planning figures that were worked out on paper, and what is counted."""

import itertools
import random
import statistics

import pytest
import torch

from reelforge.bench import rl_cost, rl_cost_table, wan_cost
from reelforge.bench.cases.case import Shape
from reelforge.bench.rl_cost import Calls, Layout, independent, units
from reelforge.bench.rl_training import saved_bytes
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.lora import LoraConfig, inject
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rl.plan import Group, PlanConfig, Planner, evaluations
from reelforge.stages.cli import main

SIZES = [(17, 480, 832), (33, 480, 832), (49, 480, 832), (81, 480, 832), (33, 240, 416), (81, 720, 1280)]
ATTENTION_LORA = LoraConfig(16, 32.0, ("to_q", "to_k", "to_v", "to_out.0"))


def at(model: str, size: tuple[int, int, int]) -> Shape:
    return rl_cost.shape(model, *size)


# -- evaluations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "percent"),
    [(4, (13.1, 20.6, 39.4)), (8, (15.3, 24.1, 45.9)), (12, (16.0, 25.2, 48.1)), (24, (16.8, 26.4, 50.3))],
)
def test_share_of_the_rollout_that_sharing_saves(group: int, percent: tuple[float, ...]) -> None:
    for choices, expected in zip((6, 10, 20), percent, strict=True):
        saved = rl_cost.saving(Layout(group, 20, choices))
        assert round(100 * saved, 1) == expected
        assert saved == pytest.approx((choices + 1) / 2 * (group - 1) / (group * 20))


@pytest.mark.parametrize("noises", [1, 2, 8])
def test_evaluations_are_those_that_the_plan_counts(noises: int) -> None:
    layout = Layout(8, 20, 10, noises)
    for k in range(10):
        planned = evaluations(Group(0, (k,), (k,)), PlanConfig(8, noises, (0, 10)), 20)
        assert layout.evaluations(k) == planned == noises * (k + 1) + 8 * (19 - k)


def test_units_of_a_group() -> None:
    layout = Layout(8, 20, 10)
    assert independent(layout).mean(units()) == 384
    assert layout.mean(units()) == pytest.approx(251) and layout.training(units()) == 8
    assert independent(layout).mean(units()) / layout.mean(units()) == pytest.approx(1.53, abs=5e-3)
    assert rl_cost_table.arms(layout)["every step stochastic, 0.6 trained"].mean(units()) == 1088
    assert layout.rollout(0, units()) == 2 * 153 and layout.rollout(9, units()) == 2 * 90


def test_seconds_follow_calls_and_batches() -> None:
    calls = Calls(call=1.0, state=10.0, decision=100.0, train=1000.0)
    layout = Layout(4, 5, 5)
    # k = 2: two prefix forwards of one state, the decision, then two steps of four states.
    assert layout.rollout(2, calls) == 2 * 11 + 100 + 2 * 41
    assert layout.rollout(2, calls, batch=3) == 2 * 11 + 100 + 2 * (31 + 11)
    assert layout.training(calls) == 1000 and independent(layout).training(calls) == 4000
    assert independent(layout).rollout(2, calls) == 4 * 41 + 4 * 100


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="choices is 11, there are 10 steps"):
        Layout(8, 10, 11)
    with pytest.raises(ConfigError, match="group_size"):
        Layout(0)


# -- FLOPs -------------------------------------------------------------------------------------------------------------

PFLOP = {
    "1.3B": [".0316", ".0729", ".129", ".283", ".0115", "1.25"],
    "14B": [".242", ".505", ".832", "1.68", ".0976", "6.52"],
}
ROLLOUT_S = {"1.3B": ["3.2", "7.4", "13.0", "28.6", "1.2", "126"], "14B": ["24", "51", "84", "170", "9.9", "659"]}


def rounded(value: float, printed: str) -> float:
    """``value`` to the decimals of a printed number."""
    return round(value, len(printed.partition(".")[2]))


@pytest.mark.parametrize("model", ["1.3B", "14B"])
def test_petaflops_of_a_forward_and_seconds_of_a_rollout(model: str) -> None:
    for size, forward, seconds in zip(SIZES, PFLOP[model], ROLLOUT_S[model], strict=True):
        flops = rl_cost.forward_flops(at(model, size), wan_cost.LAYERS[model])
        assert rounded(flops / 1e15, forward) == float(forward)
        rollout = independent(Layout(2, 20, 1)).rollout(0, units()) / 2 * flops / 396e12
        assert rounded(rollout, seconds) == float(seconds)


def test_tokens_and_attention_share() -> None:
    assert [at("1.3B", size).tokens for size in SIZES] == [7800, 14040, 20280, 32760, 3510, 75600]
    shares = [round(100 * rl_cost.attention_share(at("1.3B", size), 30)) for size in SIZES]
    assert shares == [35, 50, 59, 70, 20, 84]


@pytest.mark.parametrize("model", ["1.3B", "14B"])
def test_the_blocks_model_leaves_out_keys_and_values_of_the_text_and_nothing_else(model: str) -> None:
    size, layers = at(model, SIZES[0]), wan_cost.LAYERS[model]
    cached = rl_cost.forward_flops(size, layers, text_cached=True)
    assert cached == layers * wan_cost.block_flops(size, size.tokens).block
    tokens, width = size.tokens, size.width
    formula = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width**2 + 4 * tokens * 512 * width
    formula += 4 * 512 * width**2 + 4 * tokens * width * size.ffn_dim
    assert rl_cost.forward_flops(size, layers) == pytest.approx(layers * formula, rel=1e-12)
    assert rl_cost.forward_flops(size, layers) - cached == pytest.approx(layers * 4 * 512 * width**2, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "prompts", "group", "hours"),
    [
        ("1.3B", 48, 8, ("10.4", "3.66", "2.39", ".08")),
        ("1.3B", 64, 4, ("6.9", "2.44", "1.72", ".10")),
        ("1.3B", 12, 8, ("2.6", ".91", ".60", ".02")),
        ("14B", 48, 8, ("61.5", "21.7", "14.2", ".45")),
        ("14B", 64, 4, ("41.0", "14.5", "10.2", ".60")),
    ],
)
def test_gpu_hours_of_an_iteration(model: str, prompts: int, group: int, hours: tuple[str, ...]) -> None:
    forward = rl_cost.forward_flops(at(model, SIZES[3]), wan_cost.LAYERS[model])
    dense, flash, _, ours = rl_cost_table.arms(Layout(group, 20, 10)).values()
    costs = (dense.mean(units()), flash.mean(units()), ours.mean(units()), ours.training(units()))
    for cost, printed in zip(costs, hours, strict=True):
        assert rounded(prompts * cost * forward / 396e12 / 3600, printed) == float(printed)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_mirrored_pair_always_costs_the_same() -> None:
    layout = Layout(8, 20, 10)
    assert layout.evaluations(0) / layout.evaluations(9) == pytest.approx(1.7)
    assert {layout.evaluations(k) + layout.evaluations(9 - k) for k in range(10)} == {243}
    assert rl_cost.slowest(layout, 24, 2, paired=True) == pytest.approx(1.0)


def test_the_engines_plan_loads_all_ranks_alike() -> None:
    planner = Planner(PlanConfig(8, 1, (0, 10)), seed=0, prompts=100, groups=48, num_steps=20)
    for number in range(4):
        plan = planner.iteration(number)
        loads = {
            sum(evaluations(plan[slot], planner.config, 20) for slot in planner.share(number, rank, 8))
            for rank in range(8)
        }
        assert loads == {3 * 243}


def test_the_busiest_rank_by_enumeration() -> None:
    layout = Layout(3, 6, 4)
    costs = [layout.evaluations(k) for k in range(4)]
    one_each = [max(pair) for pair in itertools.product(costs, repeat=2)]
    assert rl_cost.slowest(layout, 2, 1, False) == pytest.approx(statistics.mean(one_each) / statistics.mean(costs))
    two_each = [max(a + b, c + d) for a, b, c, d in itertools.product(costs, repeat=4)]
    assert rl_cost.slowest(layout, 2, 2, False) == pytest.approx(statistics.mean(two_each) / statistics.mean(costs) / 2)


def test_the_busiest_rank_by_drawing() -> None:
    layout, draw = Layout(8, 20, 10), random.Random(0)
    loads = [[sum(layout.evaluations(draw.randrange(10)) for _ in range(3)) for _ in range(16)] for _ in range(4000)]
    drawn = statistics.mean(map(max, loads)) / (3 * layout.mean_evaluations)
    assert rl_cost.slowest(layout, 16, 3, False) == pytest.approx(drawn, rel=3e-3)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "half", "full", "adapter", "boundary"),
    [("1.3B", "2.8", "22.7", "11.8", "3.0"), ("14B", "28", "229", "52.4", "13.4")],
)
def test_weights_optimizer_and_adapter(model: str, half: str, full: str, adapter: str, boundary: str) -> None:
    size, layers = at(model, SIZES[3]), wan_cost.LAYERS[model]
    count = rl_cost.parameter_count(size, layers)
    assert rl_cost.memory(size, layers, 1, ATTENTION_LORA).weights / 1e9 == pytest.approx(float(half), rel=0.03)
    trained = rl_cost.memory(size, layers, 1, None)
    assert rounded((trained.weights + trained.learnt - 4 * count) / 1e9, full) == float(full), "the average apart"
    assert rounded(rl_cost.lora_count(size, layers, ATTENTION_LORA) / 1e6, adapter) == float(adapter)
    # On paper a checkpointed block keeps one tensor; ours takes and returns two.
    kept = rl_cost.memory(size, layers, 1, ATTENTION_LORA).boundaries / 2
    assert rounded(kept / 1e9, boundary) == float(boundary)


def test_a_group_at_once_keeps_a_groups_activations() -> None:
    size = at("1.3B", SIZES[3])
    collapsed, at_once = (rl_cost.memory(size, 30, rows, LoraConfig()) for rows in (2, 16))
    assert at_once.boundaries == 8 * collapsed.boundaries and at_once.block == 8 * collapsed.block
    assert at_once.weights == collapsed.weights and at_once.learnt == collapsed.learnt


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_activations_are_what_the_backward_keeps(adapted: bool, checkpointed: bool) -> None:
    """One layer more, at two lengths: what is constant in either drops out, the text's keys and values too."""

    def kept(frames: int, layers: int) -> int:
        config = rl_cost.transformer_config(size, layers)
        model = WanTransformer.from_config(config)
        model.gradient_checkpointing = checkpointed
        if adapted:
            inject(model.to(torch.bfloat16), LoraConfig(), 0)
        latents, text = torch.zeros(1, 16, frames, 16, 16), torch.zeros(1, 512, 4096)
        with torch.autocast("cpu", torch.bfloat16, enabled=not adapted):
            return saved_bytes(lambda: model(latents, torch.full((1,), 500.0), text), model)

    size = Shape("", 256, 2, 640, 256)
    tokens = (9 - 5) * 64
    layer = (kept(9, 2) - kept(9, 1) - kept(5, 2) + kept(5, 1)) / tokens
    predicted = rl_cost.memory(size, 1, 1, LoraConfig() if adapted else None)
    assert layer == (predicted.boundaries if checkpointed else predicted.block) / size.tokens


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_both_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rl-cost"]) == 0
    text = capsys.readouterr().out
    assert "1.3B at 480 x 832 x 81: 32760 tokens, 0.283 PFLOP a forward, 70% of them self-attention" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["shared prefix, collapsed training"][-3:] == ["20220", "14.2", "1.53"], "the last is 14B's"
    assert rows["G = 8"][-3:] == ["15.3%", "24.1%", "45.9%"]
    assert "a pair with steps k and 9 - k always 243" in text


def test_the_command_refuses_more_choices_than_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rl-cost", "--steps", "8"]) == 2
    assert "choices is 10, there are 8 steps" in capsys.readouterr().err
