"""The SFT stage on a real (small) Wan transformer and a real cache."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from two_processes import in_two_processes

from reelforge.engine.core import config as configuration
from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError, DataError, Interrupted
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data import latents as latent_cache
from reelforge.engine.data.latents import LatentCache
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.io import checkpoint
from reelforge.engine.io.shards import ShardWriter
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import GenerationDefaults
from reelforge.engine.model.lora import LoraConfig, load_adapter, lora_parameters
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.start import load_for_training
from reelforge.engine.train.state import OptimizerConfig
from reelforge.stages import sft
from reelforge.stages.cache import CacheConfig
from reelforge.stages.sft import SftConfig, SftTask, ValidationConfig

SHAPES = [(3, 4, 4)] * 7 + [(2, 4, 6)] * 5
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 6,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


def write_cache(folder: Path, channels: int = 4) -> Path:
    header = {"codec": "none", "text": "none", "max_tokens": 5}
    with ShardWriter(folder, header) as writer:
        for number, shape in enumerate(SHAPES):
            tones = torch.linspace(-2, 2, channels).view(-1, 1, 1, 1)  # what all clips share and can be learnt
            clip = (tones + 0.3 * rng.normal([rng.key("clip", number)], (channels, *shape))[0]).bfloat16()
            writer.add(latent_cache._clip_key(str(number)), {"shape": list(clip.shape)}, {"latents": clip})
        for caption in ["", *(f"{tone} {n}" for n in range(len(SHAPES)) for tone in ("long", "short"))]:
            embedding = rng.normal([rng.key(caption)], (3, 6))[0]
            writer.add(latent_cache._text_key(caption), {"caption": caption}, {"embedding": embedding})
    clips = [{"id": str(n), "captions": [f"long {n}", f"short {n}"]} for n in range(len(SHAPES))]
    (folder / latent_cache.SELECTION).write_text(json.dumps({"clips": clips}))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    model = WanTransformer.from_config(WAN, seed=1)
    head = model.proj_out.weight  # zero at first, which would keep every gradient from the blocks
    head.data = 0.1 * rng.normal([rng.key("head")], head.shape)[0]
    save_transformer(model, root / "model" / "transformer")
    write_cache(root / "cache")
    return root


def config_of(inputs: Path, output: Path, **changes) -> SftConfig:
    train = {"steps": 10, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 4}
    train |= {"checkpoint_every": 4, **changes.pop("train", {})}
    defaults = {
        "schedule": FlowSchedule("unipc_flow", 3.0),
        "train": LoopConfig(**train),
        "optimizer": OptimizerConfig(lr=3e-3, warmup_steps=2, ema_decay=0.8),
        "validation": ValidationConfig(clips=2),
    }
    return SftConfig(inputs / "model", inputs / "cache", output, **(defaults | changes))


def newest(output: Path) -> checkpoint.Checkpoint:
    path = checkpoint.latest(output / "checkpoints", pytest.fail)
    assert path is not None
    return checkpoint.load(path)


def lines(output: Path) -> list[dict]:
    records = read_jsonl(output / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in records]


def stop_during(monkeypatch, at: int) -> None:
    real = SftTask.losses

    def losses(self, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)

    monkeypatch.setattr(SftTask, "losses", losses)


def test_trains_writes_averaged_weights_and_knows_when_it_is_finished(inputs, tmp_path, capfd):
    config = config_of(inputs, tmp_path, train={"steps": 60, "log_every": 10, "checkpoint_every": 30})
    result = sft.run(config)
    assert (result.weights, result.steps, result.first_step) == (tmp_path / "transformer", 60, 0)
    written = load_transformer(result.weights).state_dict()
    averaged = newest(tmp_path).groups["ema"]
    assert written.keys() == averaged.keys()
    assert all(torch.equal(written[name], averaged[name]) for name in written)
    validation = [line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line]
    assert len(validation) == 2 and validation[1] < validation[0]
    histograms = [line["sigma_histogram"] for line in lines(tmp_path) if "sigma_histogram" in line]
    assert [sum(histogram) for histogram in histograms] == [40] * 6
    again = sft.run(config)
    assert again == replace(result, first_step=60) and "is finished" in capfd.readouterr().err


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=("to_q", "ffn.net.2"))])
def test_interrupted_and_continued_equals_uninterrupted(inputs, tmp_path, monkeypatch, lora):
    sft.run(config_of(inputs, tmp_path / "whole", lora=lora))
    parts = config_of(inputs, tmp_path / "whole", lora=lora)
    # The folder's name is part of the config, hence of its hash: continue in a folder of the same name elsewhere.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").rename(tmp_path / "reference")
    for at in (2, 5):
        with monkeypatch.context() as patch:
            stop_during(patch, at)
            with pytest.raises(Interrupted, match=f"SIGINT after step {at + 1} of 10"):
                sft.run(parts)
    result = sft.run(parts)
    assert result.first_step == 6
    ours, theirs = newest(tmp_path / "whole"), newest(tmp_path / "reference")
    for group, tensors in theirs.groups.items():
        assert all(torch.equal(ours.groups[group][name], tensor) for name, tensor in tensors.items()), group
    assert lines(tmp_path / "whole") == lines(tmp_path / "reference")


def test_micro_batches_do_not_change_what_is_learnt(inputs, tmp_path):
    results = []
    for rows in (4, 1, 3):
        output = tmp_path / str(rows)
        sft.run(config_of(inputs, output, train={"micro_batch_size": rows, "steps": 3}))
        results.append(newest(output).groups["adam"])
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-7)


def test_two_ranks_learn_what_one_learns(inputs, tmp_path):
    train = {"steps": 4, "micro_batch_size": 1, "log_every": 1}
    sft.run(config_of(inputs, tmp_path / "one", train=train))
    two = config_of(inputs, tmp_path / "two", train=train, validation=ValidationConfig(2))

    def work(rank: int) -> None:
        sft.run(two)

    assert in_two_processes(work, tmp_path) == [0, 0]
    moments = newest(tmp_path / "two").groups["adam"]
    for name, tensor in newest(tmp_path / "one").groups["adam"].items():
        torch.testing.assert_close(moments[name], tensor, rtol=0, atol=1e-6)
    for one, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == pytest.approx(value, rel=1e-5) for name, value in one.items())
    assert sorted(load_transformer(tmp_path / "two/transformer").state_dict()) == sorted(
        load_transformer(tmp_path / "one/transformer").state_dict()
    )


def test_lora_trains_the_adapter_alone(inputs, tmp_path):
    targets = ("to_q", "to_v", "to_out.0")
    config = config_of(
        inputs, tmp_path, lora=LoraConfig(rank=2, alpha=4.0, targets=targets), train={"precision": "bf16"}
    )
    result = sft.run(config)
    assert result.weights == tmp_path / "adapter" and not (tmp_path / "transformer").exists()
    model = load_transformer(inputs / "model" / "transformer")
    assert load_adapter(model, result.weights).rank == 2
    averaged = newest(tmp_path).groups["ema"]
    adapter = dict(lora_parameters(model))
    assert adapter.keys() == averaged.keys() == newest(tmp_path).groups["weights"].keys()
    assert all(torch.equal(adapter[name], averaged[name]) for name in adapter)
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_those_of_the_whole_batch_by_hand(inputs, tmp_path, precision, checkpointing):
    config = config_of(inputs, tmp_path, train={"precision": precision}, gradient_checkpointing=checkpointing)
    device = torch.device("cpu")
    model = load_for_training(config.model, config.lora, config.train, config.gradient_checkpointing, device)
    cache = LatentCache.open(config.cache)
    task = SftTask(config, model, cache, torch.device("cpu"))
    assert model.gradient_checkpointing is checkpointing
    for step in range(3):
        total = sum(loss.item() for loss in task.losses(step))
        batch = [task.clips[i] for i in task.sampler.batch(step)]
        sigma = sft.flow_loss.draw_sigmas(config.loss, task.schedule, 0, step, 4).float().view(-1, 1, 1, 1, 1)
        x0 = cache.latents(batch)
        noise = rng.normal([rng.key("sft_noise", 0, step, slot) for slot in range(4)], x0.shape[1:])
        dropped = sft.flow_loss.draw_text_dropout(config.loss, 0, step, 4).tolist()
        choices = [None if d else rng.key("caption", 0, step, slot) for slot, d in enumerate(dropped)]
        with torch.no_grad():
            velocity = model((1 - sigma) * x0 + sigma * noise, 1000 * sigma.flatten(), cache.text(batch, choices))
        by_hand = (velocity - (noise - x0)).square().mean().item()
        assert total == pytest.approx(by_hand, rel=1e-5 if precision == "fp32" else 2e-2)


def test_every_step_has_one_shape_and_never_a_held_out_clip(inputs, tmp_path):
    config = config_of(inputs, tmp_path)
    cache = LatentCache.open(config.cache)
    task = SftTask(config, WanTransformer.from_config(WAN), cache, torch.device("cpu"))
    held_out = set(task.held_out[1])
    assert len(held_out) == 2 and held_out.isdisjoint(task.clips)
    assert held_out | set(task.clips) == set(range(len(SHAPES)))
    seen = set()
    for step in range(40):
        batch = [task.clips[i] for i in task.sampler.batch(step)]
        assert len({SHAPES[index] for index in batch}) == 1
        seen |= set(batch)
    assert seen == set(task.clips)


def test_caption_dropout_and_choice(inputs, tmp_path):
    config = config_of(inputs, tmp_path)
    task = SftTask(config, WanTransformer.from_config(WAN), LatentCache.open(config.cache), torch.device("cpu"))
    choices = [c for step in range(300) for c in task._captions(step, range(4), [False, True, False, True])]
    assert choices[1::2] == [None] * 600
    odd = sum(choice % 2 for choice in choices[::2])
    assert abs(odd - 300) < 4 * 150**0.5  # both captions equally often, within 4 standard deviations


def test_misfits_are_named(inputs, tmp_path):
    write_cache(tmp_path / "other", channels=5)
    with pytest.raises(DataError, match="5 latent channels and text of width 6.*takes 4 and 6"):
        sft.run(replace(config_of(inputs, tmp_path / "a"), cache=tmp_path / "other"))
    with pytest.raises(DataError, match="has 12 clips and validation.clips is 12"):
        sft.run(config_of(inputs, tmp_path / "b", validation=ValidationConfig(clips=12)))
    separate = config_of(inputs, tmp_path / "d", validation=ValidationConfig(3, inputs / "cache"))
    task = SftTask(separate, WanTransformer.from_config(WAN), LatentCache.open(inputs / "cache"), torch.device("cpu"))
    assert len(task.clips) == 12 and len(task.validate()["validation_bins"]) == 8
    sft.run(config_of(inputs, tmp_path / "c", train={"steps": 1}))
    with pytest.raises(ConfigError, match="another config"):
        sft.run(config_of(inputs, tmp_path / "c", train={"steps": 2}))


class PatchCodec:
    """Latent channels 0 to 2 shown as colours, a pixel 16 wide."""

    latent_channels, temporal_stride, spatial_stride, fingerprint = 4, 1, 16, "none"

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(16, 3).repeat_interleave(16, 4).tanh()


class WordEncoder:
    width, max_tokens, fingerprint = 6, 5, "none"

    def encode(self, prompts):
        return [rng.normal([rng.key(prompt)], (2, 6))[0] for prompt in prompts]


@pytest.fixture(autouse=True)
def stand_in_codec(monkeypatch):
    """The latents here are drawn, not encoded: their codec has a fingerprint and little more."""
    monkeypatch.setattr(sft, "load_codec", lambda *_: PatchCodec())


def test_a_cache_of_another_codec_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(PatchCodec, "fingerprint", "other")
    with pytest.raises(DataError, match="built with codec none, not other"):
        sft.run(config_of(inputs, tmp_path))


def test_previews_show_the_averaged_weights_and_are_repeatable(inputs, tmp_path, monkeypatch):
    defaults = GenerationDefaults(VideoSpec(3, 64, 64, 8.0), FlowSchedule("unipc_flow", 3.0), 4, 2.0, "bad")
    monkeypatch.setattr(sft, "load_text_encoder", lambda *_: WordEncoder())
    monkeypatch.setattr(sft, "load_generation_defaults", lambda *_: defaults)
    for name in ("one", "two"):
        sft.run(config_of(inputs, tmp_path / name, preview_prompts=("a", "b"), train={"steps": 6}))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one/samples").rglob("*.mp4"))
    assert [str(f) for f in files] == [f"samples/step-0000000{s}/0{p}.mp4" for s in (4, 6) for p in (0, 1)]
    clips = [[read_video(tmp_path / name / file) for file in files] for name in ("one", "two")]
    for first, again in zip(*clips, strict=True):
        assert first.frames.shape == (3, 64, 64, 3) and first.fps == 8.0
        assert (first.frames == again.frames).all()
    assert (clips[0][0].frames != clips[0][2].frames).any() and (clips[0][0].frames != clips[0][1].frames).any()
    # The last preview, from the weights that were written.
    model = load_transformer(tmp_path / "one/transformer")
    config = config_of(inputs, tmp_path / "one", preview_prompts=("a", "b"))
    previews = sft.Previews(config, model, LatentCache.open(config.cache), torch.device("cpu"))
    previews.make(tmp_path / "again")
    assert (read_video(tmp_path / "again/01.mp4").frames == clips[0][3].frames).all()
    monkeypatch.setattr(PatchCodec, "fingerprint", "other")
    with pytest.raises(DataError, match="built with codec none, not other"):
        sft.Previews(config, model, LatentCache.open(config.cache), torch.device("cpu"))


@pytest.mark.parametrize("name", ["sft_miniature", "sft_wan2.1_1.3b"])
def test_recipes_are_valid(name):
    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    config = configuration.load(SftConfig, recipe, ["train.steps=7", "lora.rank=4"])
    assert config.train.steps == 7 and config.lora == LoraConfig(rank=4)
    assert configuration.load(SftConfig, recipe).lora is None


@pytest.mark.parametrize("name", ["cache_miniature", "cache_wan2.1_480p"])
def test_cache_recipes_are_valid(name):
    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    assert configuration.load(CacheConfig, recipe, ["data=elsewhere"]).data == Path("elsewhere")
