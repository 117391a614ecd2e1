"""The arithmetic model gives the project's planning figures from its formulas."""

import pytest
import torch

from reelforge.bench import cost, wan_cost
from reelforge.bench.cases.case import MODELS, Shape, Work
from reelforge.bench.wan_cost import PLANS, block_flops, block_ops, predicted_block


def shape(model: str, tokens: int) -> Shape:
    return Shape(model, *MODELS[model], tokens)


@pytest.mark.parametrize(
    ("model", "tokens", "kv_tokens", "linears", "self_attention", "cross", "block", "forward"),
    [
        ("1.3B", 32760, 32760, 2.731, 6.594, 0.103, 9.428, 282.8),
        ("1.3B", 4680, 4680, 0.390, 0.135, 0.015, 0.539, 16.2),
        ("1.3B", 4680, 32760, 0.390, 0.942, 0.015, 1.347, 40.4),
        ("14B", 32760, 32760, 19.58, 21.98, 0.344, 41.90, 1676),
        ("14B", 4680, 32760, 2.797, 3.140, 0.049, 5.986, 239.4),
    ],
)
def test_flops_of_a_block(
    model: str, tokens: int, kv_tokens: int, linears: float, self_attention: float, cross: float, block: float,
    forward: float,
) -> None:  # fmt: skip
    flops = block_flops(shape(model, tokens), kv_tokens)
    assert flops.linears / 1e12 == pytest.approx(linears, rel=2e-3)
    assert flops.self_attention / 1e12 == pytest.approx(self_attention, rel=4e-3)
    assert flops.cross_attention / 1e12 == pytest.approx(cross, rel=3e-2)
    assert flops.block / 1e12 == pytest.approx(block, rel=1e-3)
    assert flops.block * wan_cost.LAYERS[model] / 1e12 == pytest.approx(forward, rel=3e-3)


# Microseconds at the roof of each op, in the order of block_ops.
FULL = [35, 234, 105, 3475, 78, 82, 78, 47, 54, 78, 82, 456, 205, 456, 47]
CHUNK = [5, 34, 15, 496, 11, 12, 11, 7, 8, 11, 12, 65, 29, 65, 7]


@pytest.mark.parametrize(("tokens", "each", "total"), [(32760, FULL, 5512), (4680, CHUNK, 787)])
def test_fused_fp8_block_at_the_roof(tokens: int, each: list[int], total: int) -> None:
    ops = block_ops(shape("1.3B", tokens), 32760, torch.float8_e4m3fn)
    micros = [cost.floor(op.work, cost.PLAN).seconds * 1e6 for op in ops]
    assert micros == pytest.approx(each, abs=0.6)
    assert sum(micros) == pytest.approx(total, abs=2)
    bounds = [cost.floor(op.work, cost.PLAN).bound for op in ops]
    assert bounds.count("bytes") == 7 and bounds.count("tensor cores") == 6
    assert cost.floor(ops[3].work, cost.PLAN).bound == "exponentials"


def test_products_and_attention_of_that_block_move_their_bytes() -> None:
    works = {op.name: op.work for op in block_ops(shape("1.3B", 32760), 32760, torch.float8_e4m3fn)}
    megabytes = {"q, k, v projection": 359, "self-attention": 252, "FFN up": 651, "FFN down": 408, "GELU": 881}
    assert {name: round(works[name].bytes / 1e6) for name in megabytes} == megabytes
    assert sum(work.flops for work in works.values()) == pytest.approx(9.428e12, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "columns", "percent"),
    [
        (1560, 4608, 83), (1560, 1536, 72), (1560, 8960, 85),
        (4680, 4608, 93), (4680, 1536, 83), (4680, 8960, 97),
        (9360, 4608, 93), (9360, 1536, 87), (9360, 8960, 97),
        (32760, 4608, 100), (32760, 1536, 97), (32760, 8960, 100),
    ],
)  # fmt: skip
def test_waves_of_matrix_products(tokens: int, columns: int, percent: int) -> None:
    assert round(100 * cost.gemm_efficiency(tokens, columns)) == percent


@pytest.mark.parametrize(
    ("tokens", "percent"), [(1560, (74, 55, 74)), (4680, (95, 83, 74)), (9360, (95, 95, 89)), (32760, (99, 97, 97))]
)
def test_waves_of_attention_with_12_heads(tokens: int, percent: tuple[int, int, int]) -> None:
    assert tuple(round(100 * cost.attention_waves(tokens, 12, rows).efficiency) for rows in (64, 128, 192)) == percent


def test_a_grid_is_counted_in_ctas_and_waves() -> None:
    assert cost.attention_waves(4680, 12)[:2] == (444, 4)
    assert cost.waves(4680, 1536, (128, 256))[:2] == (222, 2)


@pytest.mark.parametrize(
    ("plan", "milliseconds"),
    [
        ("eager, flash", (27.1, 1.66, 4.40, 2.12, 100.4)),
        ("compiled, cuDNN", (16.1, 1.00, 2.62, 1.22, 64.2)),
        ("compiled, flash 3", (14.9, 0.97, 2.43, 1.12, 60.3)),
    ],
)
def test_predicted_block_times(plan: str, milliseconds: tuple[float, ...]) -> None:
    small = [(32760, 32760), (4680, 4680), (4680, 32760), (1560, 32760)]
    blocks = [(shape("1.3B", tokens), keys) for tokens, keys in small] + [(shape("14B", 32760), 32760)]
    predicted = [predicted_block(size, keys, PLANS[plan]) * 1e3 for size, keys in blocks]
    assert predicted == pytest.approx(milliseconds, rel=0.06)


def test_a_block_cannot_beat_its_floor() -> None:
    for plan in PLANS.values():
        for model, tokens, keys in (("1.3B", 4680, 32760), ("14B", 32760, 32760)):
            size = shape(model, tokens)
            assert predicted_block(size, keys, plan) > wan_cost.block_floor(size, keys, cost.H200)


def test_the_largest_part_binds() -> None:
    copy = Work(bytes=4.3e9)
    assert cost.floor(copy, cost.PLAN) == (pytest.approx(1e-3), "bytes")
    assert cost.rates(copy, 2e-3).gbps == pytest.approx(2150)
    product = cost.gemm(8192, 8192, 8192, torch.bfloat16)
    assert cost.floor(product, cost.H200) == (pytest.approx(2 * 8192**3 / 989e12), "tensor cores")
    assert cost.floor(product, cost.H200).seconds == pytest.approx(
        2 * cost.floor(cost.gemm(8192, 8192, 8192, torch.float8_e4m3fn), cost.H200).seconds, rel=1e-3
    )
