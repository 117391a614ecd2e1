"""The hot path never makes the host wait, by CUDA's own account: on a GPU torch raises where it would.

What a run uploads, compiles or plans once, it does in a first pass outside the watch; the second pass must not wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from parity import every_op
from sync_guard import CONFIG, SIZE

from reelforge.engine.core import rng
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.solver import SolverName
from reelforge.engine.model import generation
from reelforge.engine.model.layout import Layout, chunk_causal, packed_teacher_forcing
from reelforge.engine.model.wan import WanTransformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = torch.device("cuda")


@pytest.fixture(params=["chosen", "triton"])
def model(request: pytest.FixtureRequest) -> Iterator[WanTransformer]:
    """A model on the kernels that capability chooses, or on every Triton kernel, in the precision of a rollout."""
    with torch.no_grad(), every_op(request.param), generation.half_precision(DEVICE, True):
        yield WanTransformer.from_config(CONFIG, seed=1, device=DEVICE)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def guidance(batch: int, scale: float) -> generation.Guidance:
    return generation.Guidance(randn(batch, 6, 32), randn(batch, 6, 32), scale)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_twice(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The second run's result; a host that waits in it is an error."""
    work()
    with no_waiting():
        return work()


@pytest.mark.parametrize("layout", [None, chunk_causal((2, 2)), packed_teacher_forcing((1, 1))])
def test_a_forward(model: WanTransformer, layout: Layout | None) -> None:
    latents = randn(1, 16, 4 if layout is None else len(layout.frame_index), *SIZE)
    timestep, text = randn(1), randn(1, 6, 32)
    assert run_twice(lambda: model(latents, timestep, text, layout=layout)).isfinite().all()


def test_a_chunk_step_and_its_clean_pass(model: WanTransformer) -> None:
    x, timestep = randn(1, 16, 2, *SIZE), torch.full((1,), 500.0, device=DEVICE)
    context = model.text_context(randn(1, 6, 32))
    cache = model.new_cache(1, 2, 4, *SIZE)

    def two_chunks() -> torch.Tensor:
        cache.reset()
        for _ in range(2):
            velocity = model(x, timestep, context, chunk=cache.denoising(2, cache.scratch_tokens))
            clean = cache.clean(2, cache.scratch_tokens)
            model(x - velocity, torch.zeros_like(timestep), context, chunk=clean)
            cache.commit(clean)
        return velocity

    assert run_twice(two_chunks).isfinite().all()


def test_few_step_chunks(model: WanTransformer) -> None:
    grid = FlowSchedule("unipc_flow", 3.0).few_step((1000, 750, 500))
    noise, keys, text = randn(1, 16, 4, *SIZE), torch.arange(3, device=DEVICE)[:, None], guidance(1, 3.0)

    def renoise(k: int) -> torch.Tensor:
        return rng.normal(keys[k], noise.shape[1:])

    assert run_twice(lambda: generation.sample_chunks(model, text, noise, grid, (2, 2), renoise)).isfinite().all()


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_ode_sampling_with_guidance(model: WanTransformer, solver: SolverName) -> None:
    grid, noise, text = FlowSchedule("unipc_flow", 3.0).grid(4), randn(2, 16, 4, *SIZE), guidance(2, 4.5)
    assert run_twice(lambda: generation.sample_latents(model, text, noise, grid, solver)).isfinite().all()


@pytest.mark.parametrize("fault", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x[x > 0]])
def test_planted_waiting_is_caught(fault: Callable[[torch.Tensor], object]) -> None:
    x = randn(8)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        fault(x)
