"""DiT forward and SFT step against diffusers' own model at equal shapes and weights, in one run.

Each pair is timed alternately, so a load on the machine meets both; ``extra_info.ratio`` is ours / diffusers of the
medians, below 1 where ours is faster.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from reelforge.bench.miniature import CASES, Case
from reelforge.engine.model.wan import WanTransformer

ROUNDS = 15
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    ours = WanTransformer.from_config(case.config)
    theirs = WanTransformer3DModel(**case.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def forward(model: nn.Module, network: Network, case: Case, precision: str) -> Callable[[], None]:
    inputs = case.inputs()

    @torch.no_grad()
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            network(*inputs)

    return run


def sft_step(model: nn.Module, network: Network, case: Case, precision: str) -> Callable[[], None]:
    inputs = case.inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(*inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("work", [forward, sft_step], ids=lambda work: work.__name__)
def bench_against_diffusers(benchmark: BenchmarkFixture, work: Callable, case: Case, precision: str) -> None:
    ours, theirs = pair(case)
    our_run = work(ours, ours, case, precision)
    their_run = work(theirs, lambda *inputs: theirs(*inputs).sample, case, precision)
    their_run()
    their_seconds: list[float] = []

    def time_theirs() -> None:
        start = time.perf_counter()
        their_run()
        their_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(our_run, setup=time_theirs, rounds=ROUNDS, warmup_rounds=1)
    median = statistics.median(their_seconds)
    benchmark.extra_info["diffusers_ms"] = round(median * 1e3, 2)
    benchmark.extra_info["ratio"] = round(benchmark.stats.stats.median / median, 3)
