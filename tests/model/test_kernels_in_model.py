"""The whole model on its fused kernels equals the model on the references: forward, backward, cached chunks."""

import pytest
import torch
from parity import DEVICE, every_op, randn
from torch import Tensor

from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model import generation
from reelforge.engine.model.layout import chunk_causal
from reelforge.engine.model.wan import WanTransformer

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
LATENTS = (2, 16, 3, 4, 6)


@pytest.fixture
def model() -> WanTransformer:
    model = WanTransformer.from_config(CONFIG, seed=3, device=DEVICE)
    model.proj_out.weight.data.copy_(randn(9, *model.proj_out.weight.shape) * 0.1)
    return model


def inputs(timesteps: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, *LATENTS), 500 + 200 * randn(1, *timesteps), randn(2, 2, 5, 16)


@pytest.mark.parametrize("timesteps", [(2,), (2, 3)], ids=["one a sample", "one a frame"])
@pytest.mark.parametrize("precision", ["fast", "reference"])
def test_forward(model: WanTransformer, precision: str, timesteps: tuple[int, ...]) -> None:
    model.precision = precision
    with torch.no_grad():
        expected = model(*inputs(timesteps))
        with every_op("triton"):
            torch.testing.assert_close(model(*inputs(timesteps)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients(model: WanTransformer, checkpointing: bool) -> None:
    upstream = randn(5, *LATENTS)
    model.gradient_checkpointing = checkpointing

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(*inputs(), layout=chunk_causal((1, 2))).backward(upstream)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with every_op("triton"):
        fused = gradients()
    assert fused.keys() == expected.keys()
    for name, gradient in fused.items():
        scale = expected[name].abs().max().clamp_min(1e-6)
        assert ((gradient - expected[name]).abs().max() / scale).item() < 1e-4, name


@torch.no_grad()
def test_cached_chunks_write_the_cache_in_the_fused_kernel(model: WanTransformer) -> None:
    def rollout() -> Tensor:
        x, timestep, text = inputs()
        context = model.text_context(text)
        cache = model.new_cache(2, 1, 3, *LATENTS[-2:])
        tokens = cache.scratch_tokens
        outputs = []
        for frame in range(3):
            outputs.append(model(x[:, :, frame : frame + 1], timestep, context, chunk=cache.denoising(1, tokens)))
            clean = cache.clean(1, tokens)
            model(x[:, :, frame : frame + 1], torch.zeros_like(timestep), context, chunk=clean)
            cache.commit(clean)
        return torch.cat(outputs, dim=2)

    expected = rollout()
    with every_op("triton"):
        torch.testing.assert_close(rollout(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("few_step", [False, True], ids=["euler", "few steps"])
def test_chunked_sampling_on_fused_steps(model: WanTransformer, few_step: bool) -> None:
    schedule, noise, text = FlowSchedule("unipc_flow", 3.0), randn(0, *LATENTS), randn(2, 2, 5, 16)
    grid = schedule.few_step((1000, 500)) if few_step else schedule.grid(2)
    guidance = generation.Guidance(text, torch.zeros_like(text), 2.0)

    def sample() -> Tensor:
        renoise = (lambda k: randn(7 + k, *LATENTS)) if few_step else None
        return generation.sample_chunks(model, guidance, noise, grid, (1, 2), renoise)

    with torch.no_grad():
        expected = sample()
        with every_op("triton"):
            torch.testing.assert_close(sample(), expected, rtol=1e-4, atol=1e-5)
