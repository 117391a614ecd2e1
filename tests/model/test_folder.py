"""Model folders: diffusers' pipeline both ways, defaults, derived folders, and what is said when a part is missing."""

import dataclasses
import json
import shutil

import pytest
import torch

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.codec import CodecConfig, ReelforgeCodec
from reelforge.engine.model.folder import (
    WAN_NEGATIVE_PROMPT,
    GenerationDefaults,
    ModelFolder,
    derive_model_folder,
    load_codec,
    load_generation_defaults,
    load_text_encoder,
)
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder, Umt5TextEncoder
from reelforge.engine.model.vae_diffusers import DiffusersWanVae
from reelforge.engine.model.wan import WanTransformer

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_dim": 32,
}
DEFAULTS = GenerationDefaults(VideoSpec(5, 16, 24, 8.0), FlowSchedule("unipc_flow", 5.0), 4, 3.0, "blurry")


def noisy_transformer(seed: int = 0) -> WanTransformer:
    model = WanTransformer.from_config(TINY)
    for name, parameter in model.named_parameters():
        parameter.data = 0.1 * rng.normal([rng.key(name, seed)], parameter.shape)[0]
    return model.eval()


def umt5(root) -> Umt5TextEncoder:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "cat"])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return Umt5TextEncoder(UMT5EncoderModel(config).eval(), fast, root)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder with all of Wan's parts, tiny."""
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("models") / "wan"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
        vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)
        parts = noisy_transformer(), DiffusersWanVae(vae.eval(), root / "vae"), umt5(root / "text_encoder")
    ModelFolder(*parts, DEFAULTS).save(root)
    return root


@pytest.fixture
def copy(wan, tmp_path):
    return shutil.copytree(wan, tmp_path / "copy")


def tree(root) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_diffusers_pipeline_runs_from_our_folder(wan) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(wan)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.flow_shift == 5.0 and pipeline.scheduler.config.use_flow_sigmas
    size = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    frames = pipeline("cat", **size, guidance_scale=1.0, max_sequence_length=16).frames
    assert frames.shape == (1, 5, 3, 16, 16) and frames.isfinite().all()


def test_a_pipeline_that_diffusers_saved_loads_with_wans_defaults(wan, tmp_path) -> None:
    from diffusers import WanPipeline

    WanPipeline.from_pretrained(wan).save_pretrained(tmp_path / "theirs")
    ours, theirs = ModelFolder.load(wan), ModelFolder.load(tmp_path / "theirs")
    assert theirs.defaults == GenerationDefaults(schedule=FlowSchedule("unipc_flow", 5.0))
    assert theirs.defaults.video == VideoSpec(81, 480, 832, 16.0)
    assert theirs.defaults.negative_prompt == WAN_NEGATIVE_PROMPT
    pairs = zip(ours.transformer.state_dict().items(), theirs.transformer.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(tensor, value) for (name, tensor), (other, value) in pairs)
    clip = rng.normal([rng.key("clip")], (3, 5, 16, 16)).clamp(-1, 1)
    assert torch.equal(ours.codec.encode(clip), theirs.codec.encode(clip))
    assert ours.codec.fingerprint == theirs.codec.fingerprint
    assert torch.equal(ours.text_encoder.encode(["cat"])[0], theirs.text_encoder.encode(["cat"])[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_brings_everything_back(wan, dtype) -> None:
    model = ModelFolder.load(wan, dtype)
    assert model.defaults == DEFAULTS
    assert model.transformer.proj_out.weight.dtype == (dtype or torch.float32)
    assert model.transformer.scale_shift_table.dtype == torch.float32
    assert (model.codec.latent_channels, model.text_encoder.width) == (4, 32)


def test_saving_is_deterministic_and_leaves_nothing_beside(wan, tmp_path) -> None:
    ModelFolder.load(wan).save(tmp_path / "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]
    # Paths and bookkeeping of diffusers and transformers; UMT5 came back in bfloat16.
    ignore = {"vae/config.json", "tokenizer/tokenizer_config.json"}
    ignore |= {"text_encoder/config.json", "text_encoder/model.safetensors"}
    ours, again = tree(wan), tree(tmp_path / "again")
    assert ours.keys() == again.keys()
    assert all(ours[name] == again[name] for name in ours.keys() - ignore)


def test_the_miniatures_folder_round_trips(tmp_path) -> None:
    codec = ReelforgeCodec(CodecConfig(latent_channels=4))
    for name, tensor in codec.state_dict().items():
        tensor.copy_(0.2 * rng.normal([rng.key(name)], tensor.shape)[0])
    encoder = SeededTextEncoder(SeededTextConfig(width=32, max_tokens=16, seed=5))
    ModelFolder(noisy_transformer(), codec, encoder, DEFAULTS).save(tmp_path / "mini")
    model = ModelFolder.load(tmp_path / "mini")
    assert isinstance(model.codec, ReelforgeCodec) and model.codec.fingerprint == codec.fingerprint
    assert isinstance(model.text_encoder, SeededTextEncoder)
    assert model.text_encoder.fingerprint == encoder.fingerprint and model.defaults == DEFAULTS
    index = json.loads((tmp_path / "mini" / "model_index.json").read_text())
    assert index["vae"] == ["reelforge", "ReelforgeCodec"] and "tokenizer" not in index
    derive_model_folder(tmp_path / "mini", tmp_path / "tuned", noisy_transformer(1))
    before, after = tree(tmp_path / "mini"), tree(tmp_path / "tuned")
    assert {name for name in before if before[name] != after[name]} == {
        "transformer/diffusion_pytorch_model.safetensors"
    }


# --- defaults ---


@pytest.mark.parametrize("kind", ["unipc_flow", "euler"])
def test_defaults_round_trip_and_diffusers_builds_the_scheduler(wan, tmp_path, kind) -> None:
    import diffusers

    defaults = dataclasses.replace(DEFAULTS, schedule=FlowSchedule(kind, 7.0))
    derive_model_folder(wan, tmp_path / "model", noisy_transformer(), defaults)
    assert load_generation_defaults(tmp_path / "model") == defaults
    library, name = json.loads((tmp_path / "model" / "model_index.json").read_text())["scheduler"]
    assert library == "diffusers"
    scheduler = getattr(diffusers, name).from_pretrained(tmp_path / "model" / "scheduler")
    if kind == "euler":
        u = torch.linspace(1, 0, 6)[:-1]
        scheduler.set_timesteps(sigmas=u.tolist())
        expected = 7.0 * u / (1 + 6.0 * u)
        torch.testing.assert_close(scheduler.sigmas[:-1], expected.float(), atol=1e-6, rtol=0)
    else:
        assert (scheduler.config.flow_shift, scheduler.config.prediction_type) == (7.0, "flow_prediction")


def test_a_wrong_key_in_our_file_names_the_right_one(copy) -> None:
    path = copy / "reelforge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance": 3.0}))
    with pytest.raises(ConfigError, match=r"reelforge\.json: guidance.*Did you mean 'guidance_scale'"):
        load_generation_defaults(copy)


# --- derived folders ---


def test_a_derived_folder_shares_the_other_weights(wan, tmp_path) -> None:
    before = tree(wan)
    derive_model_folder(wan, tmp_path / "tuned", noisy_transformer(1))
    model = ModelFolder.load(tmp_path / "tuned")
    assert torch.equal(model.transformer.proj_out.weight, noisy_transformer(1).proj_out.weight)
    assert model.defaults == DEFAULTS and model.codec.fingerprint == load_codec(wan).fingerprint
    assert model.text_encoder.fingerprint == load_text_encoder(wan).fingerprint
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "tuned" / weights).stat().st_ino == (wan / weights).stat().st_ino
    assert tree(wan) == before


def test_a_folder_may_be_derived_in_place(copy) -> None:
    defaults = dataclasses.replace(DEFAULTS, num_steps=9)
    derive_model_folder(copy, copy, noisy_transformer(2), defaults)
    model = ModelFolder.load(copy)
    assert torch.equal(model.transformer.proj_out.weight, noisy_transformer(2).proj_out.weight)
    assert model.defaults.num_steps == 9


def test_linked_weights_are_resolved_as_in_a_hub_cache(wan, tmp_path) -> None:
    source = shutil.copytree(wan, tmp_path / "snapshot")
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    derive_model_folder(source, tmp_path / "tuned", noisy_transformer())
    copied = tmp_path / "tuned" / "vae" / weights.name
    assert not copied.is_symlink() and copied.read_bytes() == (tmp_path / "blob").read_bytes()


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("transformer", r"transformer/config\.json cannot be read"),
        ("vae", r"vae/config\.json cannot be read"),
        ("text_encoder", r"text_encoder/config\.json cannot be read"),
        ("tokenizer", r"its tokenizer into .*tokenizer"),
        ("scheduler", r"scheduler_config\.json cannot be read"),
    ],
)
def test_a_missing_part_is_named(copy, part: str, message: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        ModelFolder.load(copy)


@pytest.mark.parametrize(
    ("path", "key", "load", "message"),
    [
        ("vae/config.json", "_class_name", load_codec, "vae holds 'Other'.*AutoencoderKLWan"),
        ("text_encoder/config.json", "model_type", load_text_encoder, "text_encoder holds 'Other'.*umt5"),
        ("scheduler/scheduler_config.json", "_class_name", load_generation_defaults, "scheduler holds 'Other'.*UniPC"),
    ],
)
def test_an_unknown_class_is_named(copy, path: str, key: str, load, message: str) -> None:
    table = json.loads((copy / path).read_text())
    (copy / path).write_text(json.dumps({**table, key: "Other"}))
    with pytest.raises(CheckpointError, match=message):
        load(copy)
