"""Adapters: no effect at first, merging, and PEFT and diffusers both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, ConfigError
from reelforge.engine.model.lora import (
    LoraConfig,
    adapted_linears,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
)
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer, save_transformer

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_dim": 16,
}
CONFIG = LoraConfig(rank=3, alpha=12.0)
QUERY = "base_model.model.blocks.0.attn1.to_q"


def base(seed: int = 0) -> WanTransformer:
    model = WanTransformer.from_config(TINY)
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * rng.normal([rng.key(name, seed)], parameter.shape)[0]
    return model.eval()


def randomise(model: nn.Module, seed: int = 7) -> nn.Module:
    for name, parameter in lora_parameters(model):
        parameter.data = 0.2 * rng.normal([rng.key(name, seed)], parameter.shape)[0]
    return model


def adapted() -> WanTransformer:
    model = base()
    inject(model, CONFIG, seed=1)
    randomise(model)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = rng.normal([rng.key("latents")], (4, 2, 16, 16))
    return latents, torch.tensor([500.0]), rng.normal([rng.key("text")], (12, 16))


@torch.no_grad()
def velocity(model: nn.Module) -> torch.Tensor:
    return model(*inputs())


def peft_base(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_transformer(base(), tmp_path / "base")
    return diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base")


@torch.no_grad()
def their_velocity(model: nn.Module) -> torch.Tensor:
    return model(*inputs(), return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_bitwise(dtype, tmp_path) -> None:
    save_transformer(base(), tmp_path)
    model = load_transformer(tmp_path, dtype)
    latents, timestep, text = inputs()
    arguments = latents.to(dtype), timestep, text.to(dtype)
    with torch.no_grad():
        before = model(*arguments)
        inject(model, CONFIG, seed=1)
        assert torch.equal(model(*arguments), before)


def test_targets_names_types_and_gradients() -> None:
    model = base()
    names = set(model.state_dict())
    inject(model, CONFIG, seed=1)
    assert len(adapted_linears(model)) == 2 * (4 + 4 + 2)
    parameters = dict(lora_parameters(model))
    assert set(model.state_dict()) == names | set(parameters)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    model(*inputs()).square().mean().backward()
    assert all(p.grad is not None for p in parameters.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_initial_matrices_are_seeded_by_name_and_kaiming() -> None:
    models = [base(), base(), base()]
    inject(models[0], CONFIG, seed=1)
    inject(models[1], LoraConfig(3, 12.0, ("attn2.to_k", "attn1.to_q")), seed=1)
    inject(models[2], CONFIG, seed=2)
    first, fewer, other = (dict(lora_parameters(model)) for model in models)
    assert len(fewer) == 8 and all(torch.equal(tensor, first[name]) for name, tensor in fewer.items())
    name = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("blocks.0", "blocks.1")])
    entries = torch.cat([p.flatten() for name, p in first.items() if "lora_A" in name and p.shape[1] == 24])
    assert entries.abs().max() <= 24**-0.5
    assert entries.std().item() == pytest.approx((24 * 3) ** -0.5, rel=0.05)


def test_merge_equals_the_adapted_model_and_restores_names() -> None:
    model = adapted()
    expected, plain = velocity(model), velocity(base())
    assert (expected - plain).abs().max() > 0.05
    merge(model)
    torch.testing.assert_close(velocity(model), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(base().state_dict())
    assert not adapted_linears(model)


def test_merge_sums_in_float32_and_rounds_once() -> None:
    model = nn.Sequential(nn.Linear(24, 40, dtype=torch.bfloat16))
    weight = model[0].weight.detach().clone()
    inject(model, LoraConfig(2, 5.0, ("0",)), seed=0)
    randomise(model)
    a, b = (tensor.detach().double() for _, tensor in lora_parameters(model))
    merge(model)
    exact = weight.double() + 2.5 * (b @ a)
    step = 2.0 ** (exact.abs().log2().floor() - 8)  # half a unit in bfloat16's last place
    single = 2.0**-22 * (weight.double().abs() + 2.5 * (b.abs() @ a.abs()))  # of the terms: they may cancel
    assert model[0].weight.dtype == torch.bfloat16 and type(model[0]) is nn.Linear
    assert ((model[0].weight.double() - exact).abs() <= step + single).all()


def test_our_adapter_in_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(peft_base(tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(their_velocity(theirs), velocity(model), atol=1e-5, rtol=0)


def test_our_adapter_in_diffusers(tmp_path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    theirs = peft_base(tmp_path)
    theirs.load_lora_adapter(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(their_velocity(theirs), velocity(model), atol=1e-5, rtol=0)


def test_our_adapter_in_a_diffusers_pipeline(tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    theirs = peft_base(tmp_path)
    pipeline = diffusers.WanPipeline(None, None, vae=None, scheduler=None, transformer=theirs)
    pipeline.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(their_velocity(theirs), velocity(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["to_q", "ffn.net.2"], r".*attn2\.to_[kv]"])
def test_a_peft_adapter_in_ours(tmp_path, targets) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(peft_base(tmp_path), peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * rng.normal([rng.key(name)], parameter.shape)[0]
    theirs.save_pretrained(tmp_path / "adapter")
    model = base()
    config = load_adapter(model, tmp_path / "adapter")
    assert (config.rank, config.alpha, len(config.targets)) == (4, 2.0, len(adapted_linears(model)))
    torch.testing.assert_close(velocity(model), their_velocity(theirs), atol=1e-5, rtol=0)
    merge(model)
    torch.testing.assert_close(velocity(model), their_velocity(theirs), atol=1e-5, rtol=0)


def test_a_diffusers_adapter_in_ours(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft_base(tmp_path)
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_k"], init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path / "adapter")
    model = base()
    assert load_adapter(model, tmp_path / "adapter").alpha == 6.0
    torch.testing.assert_close(velocity(model), their_velocity(theirs), atol=1e-5, rtol=0)


def test_without_metadata_alpha_is_the_rank(tmp_path) -> None:
    tensors = {"transformer." + name: tensor.data for name, tensor in lora_parameters(adapted())}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    theirs, model = peft_base(tmp_path), base()
    theirs.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert load_adapter(model, tmp_path).alpha == 3.0
    torch.testing.assert_close(velocity(model), their_velocity(theirs), atol=1e-5, rtol=0)


def test_our_round_trip_is_exact(tmp_path) -> None:
    save_adapter(adapted(), tmp_path / "adapter")
    model = base()
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(velocity(model), velocity(adapted()))
    save_adapter(model, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "adapter" / "adapter_model.safetensors")[name])
    other = base()
    load_adapter(other, tmp_path / "again")
    assert torch.equal(velocity(other), velocity(model))


def test_unmerged_models_are_not_saved_as_plain(tmp_path) -> None:
    with pytest.raises(AssertionError, match="merge the adapters first"):
        save_transformer(adapted(), tmp_path / "transformer")


def test_wrong_targets_and_ranks_are_named() -> None:
    with pytest.raises(ConfigError, match="LoRA target 'to_qkv' names no linear"):
        inject(base(), LoraConfig(targets=("to_q", "to_qkv")), seed=0)
    with pytest.raises(ConfigError, match="rank is 0"):
        LoraConfig(rank=0)


def edit(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"lora_B\.weight' is missing"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(3, 8)}), r"is \[3, 8\], not \[3, 24\]"),
        (lambda t: t.update({f"{QUERY}x.lora_A.weight": torch.zeros(3, 24)}), "which the model lacks"),
        (lambda t: t.update({f"{QUERY}.bias": torch.zeros(24)}), "lora_A.weight and lora_B.weight only"),
        (lambda t: t.clear(), "holds 'nothing'"),
    ],
)
def test_damaged_adapters_are_named(tmp_path, change, message: str) -> None:
    save_adapter(adapted(), tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(base(), tmp_path / "adapter")


@pytest.mark.parametrize("option", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"to_q": 8}}])
def test_other_kinds_of_adapter_are_refused(tmp_path, option) -> None:
    save_adapter(adapted(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **option}))
    with pytest.raises(CheckpointError, match=f"sets {next(iter(option))}"):
        load_adapter(base(), tmp_path / "adapter")


def test_an_empty_folder_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="pytorch_lora_weights.safetensors"):
        load_adapter(base(), tmp_path)
