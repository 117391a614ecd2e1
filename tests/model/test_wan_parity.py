"""WanTransformer against diffusers' own model."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.wan import WanConfig, WanTransformer

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
}
CONFIGS = {
    "head_dim_12": TINY,
    "head_dim_24": {**TINY, "attention_head_dim": 24},
    "head_dim_22_three_heads": {**TINY, "attention_head_dim": 22, "num_attention_heads": 3},
    "patch_2": {**TINY, "patch_size": (2, 2, 2), "ffn_dim": 50},
    "patch_1_odd_channels": {**TINY, "patch_size": (1, 1, 1), "in_channels": 3, "out_channels": 3, "freq_dim": 64},
}
# batch, latent frames, height, width, text tokens
SHAPES = [(1, 2, 16, 16, 12), (2, 4, 6, 10, 7), (3, 2, 2, 14, 1)]


def pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[WanTransformer, WanTransformer3DModel]:
    """Both models with the same random weights, biases and norms away from their neutral values."""
    torch_generator = torch.Generator().manual_seed(7)
    theirs = WanTransformer3DModel(**config)
    for parameter in theirs.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.normal_(0, fan_in**-0.5, generator=torch_generator)
    for module in theirs.modules():
        if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm) and module.weight is not None:
            module.weight.data.add_(1)
    ours = WanTransformer.from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def inputs(config: dict, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    batch, frames, height, width, tokens = shape
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, config["in_channels"], frames, height, width, generator=generator)
    timestep = torch.tensor([999.0, 250.5, 3.0])[:batch]
    return latents.to(dtype), timestep, torch.randn(batch, tokens, config["text_dim"], generator=generator).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["reference", "fast"])
def test_fp32_parity(name: str, shape: tuple[int, ...], precision: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    ours.precision = precision
    latents, timestep, text = inputs(CONFIGS[name], shape)
    expected = theirs(latents, timestep, text).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_single_frame() -> None:
    ours, theirs = pair(TINY)
    latents, timestep, text = inputs(TINY, (2, 1, 4, 6, 5))
    torch.testing.assert_close(
        ours(latents, timestep, text), theirs(latents, timestep, text).sample, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_per_frame_timesteps_equal_the_per_token_path() -> None:
    ours, theirs = pair(TINY)
    latents, _, text = inputs(TINY, (2, 3, 6, 8, 7))
    timestep = torch.tensor([[0.0, 500.0, 999.0], [120.5, 121.0, 40.0]])
    per_token = timestep.repeat_interleave(3 * 4, dim=1)
    torch.testing.assert_close(
        ours(latents, timestep, text), theirs(latents, per_token, text).sample, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_equal_timesteps_per_frame_are_one_timestep() -> None:
    ours, _ = pair(TINY, torch.float64)
    latents, timestep, text = inputs(TINY, (2, 3, 6, 8, 7), torch.float64)
    per_frame = timestep[:, None].expand(-1, 3)
    torch.testing.assert_close(ours(latents, per_frame, text), ours(latents, timestep, text), atol=1e-12, rtol=0)


@torch.no_grad()
def test_text_context_equals_text() -> None:
    ours, _ = pair(TINY)
    latents, timestep, text = inputs(TINY, (2, 2, 6, 8, 7))
    assert torch.equal(ours(latents, timestep, ours.text_context(text)), ours(latents, timestep, text))


def test_gradients_match() -> None:
    ours, theirs = pair(TINY)
    latents, timestep, text = inputs(TINY, (2, 2, 6, 8, 7))
    ours(latents, timestep, text).square().mean().backward()
    theirs(latents, timestep, text).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_checkpointing_changes_no_gradient() -> None:
    latents, timestep, text = inputs(TINY, (1, 2, 4, 4, 3))
    gradients = []
    for recompute in (False, True):
        ours, _ = pair(TINY)
        ours.gradient_checkpointing = recompute
        ours(latents, timestep, text).square().mean().backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def bf16_like_diffusers(model: torch.nn.Module) -> torch.nn.Module:
    """bf16 but for the modules that diffusers keeps in fp32 when it loads a checkpoint."""
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
@pytest.mark.parametrize("precision", ["reference", "fast"])
def test_bf16_error_against_fp64_is_at_most_that_of_diffusers(precision: str) -> None:
    config = {**TINY, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 256, "num_layers": 6}
    ours, theirs = pair(config)
    bf16_like_diffusers(ours)
    bf16_like_diffusers(theirs)
    exact, _ = pair(config)
    exact.load_state_dict(ours.state_dict())
    ours.precision, errors = precision, []
    for index in range(4):
        latents, timestep, text = (t.clone() for t in inputs(config, (2, 3, 10 + 2 * index, 12, 9), torch.bfloat16))
        truth = exact.double()(latents.double(), timestep, text.double())
        errors.append(
            torch.stack(
                [
                    (ours(latents, timestep, text) - truth).square().mean(),
                    (theirs(latents, timestep, text).sample - truth).square().mean(),
                ]
            )
        )
    our_error, their_error = torch.stack(errors).mean(0).sqrt().tolist()
    assert 0 < our_error <= 1.1 * their_error


@pytest.mark.parametrize(
    ("heads", "ffn_dim", "layers", "tensors", "parameters"),
    [(12, 8960, 30, 825, 1.419e9), (40, 13824, 40, 1095, 14.29e9)],
    ids=["1.3B", "14B"],
)
def test_real_sizes_on_the_meta_device(heads: int, ffn_dim: int, layers: int, tensors: int, parameters: float) -> None:
    config = {"num_attention_heads": heads, "ffn_dim": ffn_dim, "num_layers": layers}
    ours = WanTransformer.from_config(config, device="meta")
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**config)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(parameters, rel=1e-3)
    latents = torch.empty(1, 16, 2, 60, 104, device="meta")
    text = torch.empty(1, 512, 4096, device="meta")
    assert ours(latents, torch.empty(1, device="meta"), text).shape == latents.shape


def test_initialisation_is_a_function_of_the_seed() -> None:
    first, again, other = (WanTransformer.from_config(TINY, seed=seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        constant = a.std() == 0 if a.numel() > 1 else True
        assert constant or not torch.equal(a, c), name
    latents, timestep, text = inputs(TINY, (1, 2, 4, 4, 3))
    assert torch.equal(first(latents, timestep, text), torch.zeros_like(latents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 3}, "num_layers"),
        ({"image_dim": 1280}, "T2V"),
        ({"qk_norm": "rms_norm"}, "rms_norm_across_heads"),
        ({"attention_head_dim": 13}, "even"),
    ],
)
def test_other_architectures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WanConfig.from_dict({**TINY, **change})


def test_latents_that_do_not_fit_the_patch_are_refused() -> None:
    model = WanTransformer.from_config(TINY)
    with pytest.raises(ConfigError, match=r"\(1, 4, 2, 5, 4\)"):
        model(torch.zeros(1, 4, 2, 5, 4), torch.zeros(1), torch.zeros(1, 3, 16))
