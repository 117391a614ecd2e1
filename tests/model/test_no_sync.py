"""The hot path never makes the host wait: one forward, one chunk step, one rollout, on fake CUDA tensors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from parity import every_op
from sync_guard import CONFIG, SIZE, HostSync, SyncGuard, fake_cuda

from reelforge.engine.core import rng
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model import generation
from reelforge.engine.model.layout import chunk_causal, packed_teacher_forcing
from reelforge.engine.model.precision import Fp8Policy, fp8_copy
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig

# What each way of running must show the guard, or it guarded nothing.
SEEN = {"torch": "aten.native_layer_norm", "triton": "reelforge.norm_modulate"}


@pytest.fixture(params=SEEN, autouse=True)
def seen(request: pytest.FixtureRequest) -> Iterator[str]:
    """An operator that a forward consists of; the references run, and then every Triton kernel."""
    with torch.no_grad(), every_op(request.param):
        yield SEEN[request.param]


def model() -> WanTransformer:
    with torch.device("cuda"):
        return WanTransformer(WanConfig.from_dict(CONFIG))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda")


def guidance(batch: int, scale: float) -> generation.Guidance:
    return generation.Guidance(randn(batch, 6, 32), randn(batch, 6, 32), scale)


@pytest.mark.parametrize("layout", [None, chunk_causal((2, 2)), packed_teacher_forcing((1, 1))])
def test_a_forward(layout: object, seen: str) -> None:
    with fake_cuda():
        transformer, latents = model(), randn(1, 16, 4 if layout is None else len(layout.frame_index), *SIZE)
        timestep, text = randn(1), randn(1, 6, 32)
        with SyncGuard() as guard:
            velocity = transformer(latents, timestep, text, layout=layout)
    assert velocity.shape == latents.shape and velocity.device.type == "cuda"
    assert any(name.startswith(seen) for name in guard.watched)


def test_a_forward_with_linears_in_e4m3(seen: str) -> None:
    with fake_cuda():
        transformer, latents = fp8_copy(model(), Fp8Policy(spared=0)), randn(1, 16, 4, *SIZE)
        timestep, text = randn(1), randn(1, 6, 32)
        with SyncGuard() as guard:
            velocity = transformer(latents, timestep, text)
    assert velocity.shape == latents.shape and velocity.device.type == "cuda"
    rounded = {"aten.native_layer_norm": "aten.clamp", "reelforge.norm_modulate": "reelforge.fp8_residual_norm"}[seen]
    assert any(name.startswith(rounded) for name in guard.watched)


@contextmanager
def guarded_after_first_step(seen: str) -> Iterator[Callable[[int], None]]:
    """An ``on_step`` that guards a sampling run from its second step on: the grid is uploaded in the first.

    The guard must have seen the operator ``seen``.
    """
    with ExitStack() as stack:
        guards: list[SyncGuard] = []

        def on_step(_: int) -> None:
            if not guards:
                guards.append(stack.enter_context(SyncGuard()))

        yield on_step
        assert any(name.startswith(seen) for name in guards[0].watched)


def test_chunk_steps_and_clean_passes(seen: str) -> None:
    grid = FlowSchedule("unipc_flow", 3.0).few_step((1000, 750, 500))
    with fake_cuda(), guarded_after_first_step(seen) as on_step:
        transformer, noise, keys = model(), randn(1, 16, 6, *SIZE), torch.arange(3, device="cuda")[:, None]

        def renoise(k: int) -> torch.Tensor:
            return rng.normal(keys[k], noise.shape[1:])

        x0 = generation.sample_chunks(transformer, guidance(1, 3.0), noise, grid, (2, 2, 2), renoise, on_step)
    assert x0.shape == noise.shape and x0.device.type == "cuda"


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_ode_sampling_with_guidance(solver: str, seen: str) -> None:
    grid = FlowSchedule("unipc_flow", 3.0).grid(4)
    with fake_cuda(), guarded_after_first_step(seen) as on_step:
        transformer, noise = model(), randn(2, 16, 4, *SIZE)
        x0 = generation.sample_latents(transformer, guidance(2, 4.5), noise, grid, solver, on_step)
    assert x0.shape == noise.shape and x0.device.type == "cuda"


FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(4, device="cpu").to("cuda"),
    "from a list": lambda x: torch.tensor([1, 2, 3], device="cuda"),
    "a scalar to the host": lambda x: x.sum().cpu(),
    "a scalar from the host": lambda x: torch.tensor(3.0, device="cuda"),
    "written through a mask": lambda x: x.__setitem__(x > 0, x.sum().reshape(1)),
    "copied out": lambda x: torch.zeros((), device="cpu").copy_(x.sum()),
    "copied in": lambda x: x.copy_(torch.zeros(8, device="cpu")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_synchronisation_is_caught(fault: str) -> None:
    with fake_cuda():
        x = randn(8)
        with SyncGuard(), pytest.raises(HostSync):
            FAULTS[fault](x)
