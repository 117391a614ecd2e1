"""The hot path never makes the host wait: one forward, one chunk step, one rollout, on fake CUDA tensors."""

from collections.abc import Callable

import pytest
import torch
from sync_guard import HostSync, SyncGuard, fake_cuda

from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model import generation
from reelforge.engine.model.layout import chunk_causal, packed_teacher_forcing
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 2,
}
SIZE = (8, 8)


def model() -> WanTransformer:
    return WanTransformer(WanConfig.from_dict(CONFIG))


def guidance(scale: float) -> generation.Guidance:
    return generation.Guidance(torch.randn(1, 6, 32), torch.randn(1, 6, 32), scale)


@pytest.mark.parametrize("layout", [None, chunk_causal((2, 2)), packed_teacher_forcing((1, 1))])
def test_a_forward(layout: object) -> None:
    with fake_cuda():
        transformer, latents = model(), torch.randn(1, 16, 4 if layout is None else len(layout.frame_index), *SIZE)
        timestep, text = torch.full((1,), 500.0), torch.randn(1, 6, 32)
        with SyncGuard():
            transformer(latents, timestep, text, layout=layout)


def test_chunk_steps_and_clean_passes() -> None:
    with fake_cuda():
        transformer, noise = model(), torch.randn(1, 16, 4, *SIZE)
        grid = FlowSchedule("unipc_flow", 3.0).few_step((1000, 500))
        fresh = torch.randn(1, 16, 4, *SIZE)
        with SyncGuard():
            generation.sample_chunks(transformer, guidance(3.0), noise, grid, (2, 2), lambda k: fresh)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_ode_sampling_with_guidance(solver: str) -> None:
    with fake_cuda():
        transformer, noise = model(), torch.randn(2, 16, 4, *SIZE)
        grid = FlowSchedule("unipc_flow", 3.0).grid(3)
        with SyncGuard():
            generation.sample_latents(transformer, guidance(4.5), noise, grid, solver)


FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(4, device="cpu").to("cuda"),
    "from a list": lambda x: torch.tensor([1, 2, 3], device="cuda"),
    "copied in": lambda x: x.copy_(torch.zeros(8, device="cpu")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_synchronisation_is_caught(fault: str) -> None:
    with fake_cuda():
        x = torch.randn(8)
        with SyncGuard(), pytest.raises(HostSync):
            FAULTS[fault](x)
