"""Transformer weights: diffusers both ways, original names, and files that cannot be used."""

import json
import struct

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, StorageError
from reelforge.engine.core.files import staged_folder
from reelforge.engine.io.model_files import read_json
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import (
    diffusers_name,
    load_transformer,
    original_name,
    save_transformer,
    storage_dtype,
)

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_dim": 16,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def noisy_model(seed: int = 0) -> WanTransformer:
    """Every parameter random, so that no mix-up hides behind zeros and ones."""
    model = WanTransformer.from_config(TINY)
    for name, parameter in model.named_parameters():
        parameter.data = 0.1 * rng.normal([rng.key(name, seed)], parameter.shape)[0]
    return model


@pytest.fixture
def folder(tmp_path):
    save_transformer(noisy_model(), tmp_path / "transformer")
    return tmp_path / "transformer"


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text = rng.normal([rng.key("text")], (12, 16))
    return rng.normal([rng.key("latents")], (4, 2, 16, 16)), torch.tensor([500.0]), text


@torch.no_grad()
def test_diffusers_reads_what_we_write(folder) -> None:
    from diffusers import WanTransformer3DModel

    theirs, info = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    latents, timestep, text = inputs()
    expected = theirs(latents, timestep, text, return_dict=False)[0]
    torch.testing.assert_close(load_transformer(folder)(latents, timestep, text), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_we_read_what_diffusers_writes_in_its_types(tmp_path, dtype, shards: int) -> None:
    from diffusers import WanTransformer3DModel

    source = WanTransformer3DModel(**TINY)
    source.save_pretrained(tmp_path, max_shard_size="10GB" if shards == 1 else "50KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
    ours = load_transformer(tmp_path, dtype)
    assert not ours.training and all(not p.is_meta for p in ours.parameters())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs.pop(name)), name
    assert not theirs


def test_bfloat16_keeps_modulation_norms_and_time_in_float32() -> None:
    state = noisy_model().state_dict()
    kept = [name for name in state if storage_dtype(name, torch.bfloat16) == torch.float32]
    assert len(kept) == 4 + 1 + 2 * 3  # time embedder, head's table; table, norm2 weight and bias per block
    assert all(storage_dtype(name, torch.float64) in (torch.float64, torch.float32) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_whatever_the_shards(tmp_path, dtype) -> None:
    save_transformer(noisy_model(), tmp_path / "a")
    model = load_transformer(tmp_path / "a", dtype)
    save_transformer(model, tmp_path / "b", shard_bytes=30_000)
    files = sorted(file.name for file in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for name, tensor in load_transformer(tmp_path / "b", dtype).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "b" / file).values()) <= 30_000


def test_saving_replaces_the_whole_folder(folder) -> None:
    save_transformer(noisy_model(1), folder, shard_bytes=20_000)
    save_transformer(noisy_model(2), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS]
    assert [entry.name for entry in folder.parent.iterdir()] == ["transformer"]
    assert torch.equal(load_transformer(folder).proj_out.weight, noisy_model(2).proj_out.weight)


def test_a_failed_write_leaves_the_old_folder(folder) -> None:
    with pytest.raises(StorageError, match="No space left"), staged_folder(folder) as staging:
        (staging / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")
    assert torch.equal(load_transformer(folder).proj_out.weight, noisy_model().proj_out.weight)
    assert [entry.name for entry in folder.parent.iterdir()] == ["transformer"]


# --- names ---


@pytest.mark.parametrize(("layers", "count"), [(30, 825), (40, 1095)])
def test_key_map_is_a_bijection(layers: int, count: int) -> None:
    names = list(WanTransformer.from_config({**TINY, "num_layers": layers}, device="meta").state_dict())
    originals = [original_name(name) for name in names]
    assert len(names) == len(set(originals)) == count
    assert [diffusers_name(name) for name in originals] == names
    assert [diffusers_name(name) for name in names] == names


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("blocks.7.self_attn.o.bias", "blocks.7.attn1.to_out.0.bias"),
        ("blocks.7.cross_attn.norm_q.weight", "blocks.7.attn2.norm_q.weight"),
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.12.modulation", "blocks.12.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
        ("time_projection.1.bias", "condition_embedder.time_proj.bias"),
        ("model.blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("model._fsdp_wrapped_module.blocks.0.ffn.2.bias", "blocks.0.ffn.net.2.bias"),
        ("generator.model.blocks.0._fsdp_wrapped_module.self_attn.q.weight", "blocks.0.attn1.to_q.weight"),
        ("net.text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
        ("_orig_mod.patch_embedding.weight", "patch_embedding.weight"),
    ],
)
def test_known_names(original: str, ours: str) -> None:
    assert diffusers_name(original) == ours


@pytest.mark.parametrize("wrapper", ["", "model.", "model._fsdp_wrapped_module.", "generator_ema.model."])
def test_an_original_checkout_loads(tmp_path, wrapper: str) -> None:
    state = noisy_model().state_dict()
    save_file({wrapper + original_name(name): tensor for name, tensor in state.items()}, tmp_path / WEIGHTS)
    config = {
        "_class_name": "WanModel",
        "dim": 24,
        "num_heads": 2,
        "in_dim": 4,
        "out_dim": 4,
        "ffn_dim": 32,
        "freq_dim": 256,
        "num_layers": 2,
        "text_dim": 16,
        "model_type": "t2v",
        "text_len": 512,
        "eps": 1e-6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_transformer(tmp_path)
    assert model.config == noisy_model().config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    del config["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks 'num_heads'"):
        load_transformer(tmp_path)


# --- files that cannot be used ---


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("blocks.1.attn1.to_q.bias"),
            r"lacks tensor 'blocks\.1\.attn1\.to_q\.bias' \[24\].*Did you mean",
        ),
        (
            lambda t: t.update({"blocks.2.norm2.bias": torch.zeros(24)}),
            r"holds 'blocks\.2\.norm2\.bias' \[24\], which the model does not have",
        ),
        (
            lambda t: t.update({"proj_out.weight": torch.zeros(16, 48)}),
            r"'proj_out\.weight' is \[16, 48\], the config asks for \[16, 24\]",
        ),
        (
            lambda t: t.update({"proj_out.weight": torch.zeros(16, 24, dtype=torch.int8)}),
            r"'proj_out\.weight' is stored as I8.*Dequantise",
        ),
        (
            lambda t: t.update({"model.head.head.weight": torch.zeros(16, 24)}),
            r"'model\.head\.head\.weight' .* are both 'proj_out\.weight'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder)


HEADER = {"proj_out.weight": {"dtype": "F32", "shape": [16, 24], "data_offsets": [0, 1536]}}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**7) + b"{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + bytes(8),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
    ids=["empty", "pickle", "huge-header", "truncated", "no-object", "offsets-outside", "nested"],
)
def test_hostile_safetensors_are_refused(folder, payload: bytes) -> None:
    (folder / WEIGHTS).write_bytes(payload)
    with pytest.raises(CheckpointError, match="is no sound safetensors file"):
        load_transformer(folder)


def expected_shapes(folder) -> dict[str, torch.Size]:
    model = WanTransformer.from_config(read_json(folder / "config.json"), device="meta")
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_the_header_is_a_checkpoint_error(folder, edits: list[tuple[int, int]]) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    damaged = bytearray(sound)
    for position, value in edits:
        damaged[position] = value
    (folder / WEIGHTS).write_bytes(damaged)
    try:
        loaded = load_transformer(folder).state_dict()
    except CheckpointError as error:
        assert error.what and error.hint
    else:  # the edits left the header's meaning alone: every tensor is still of the model's own shape
        assert {name: t.shape for name, t in loaded.items()} == expected_shapes(folder)
    (folder / WEIGHTS).write_bytes(sound)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"proj_out.weight": "../../secret.safetensors"}}, r"lists .*secret.*not a file beside it"),
        ({"weight_map": {"proj_out.weight": "part-2.safetensors"}}, r"lists .*part-2.*not a file beside it"),
        ({"weight_map": {"proj_out.weight": "/etc/passwd"}}, r"lists /etc/passwd"),
        ({"weight_map": {"proj_out.weight": {}}}, "not a file beside it"),
        ({"weight_map": [1]}, "holds no safetensors file"),
        ({"weight_map": {}}, "holds no safetensors file"),
        ({}, "holds no safetensors file"),
        ([], "holds a list, not an object"),
    ],
)
def test_hostile_indices_are_refused(folder, index, message: str) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\xff"])
def test_damaged_config_is_named(folder, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_transformer(folder)


def test_other_folders_say_what_is_missing(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*diffusers' layout"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="describes a FluxTransformer2DModel"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **TINY}))
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled \.pt, \.pth or \.bin files are not read"):
        load_transformer(tmp_path)
