"""CLIP and PickScore against transformers, on a tiny random model with a tokenizer made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards import clip_score
from reelforge.engine.rewards.clip_score import ClipScore, PickScore
from reelforge.engine.rewards.registry import build_scorer

WIDE = VideoSpec(num_frames=9, height=48, width=83, fps=8.0)
SIDE, PATCH, LONGEST = 16, 8, 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole CLIP folder: bytes are its tokens, prompts of 12 its longest."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(tmp_path)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    start, end = len(tokens) - 2, len(tokens) - 1
    marks = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**size, **marks, "vocab_size": len(tokens), "max_position_embeddings": LONGEST},
        vision_config={**size, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(tmp_path)
    return tmp_path


def noisy_videos(count: int) -> torch.Tensor:
    """Three times CLIP's side: what is not smoothed before it is sampled shows."""
    shape = (count, WIDE.num_frames, WIDE.height, WIDE.width, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


PROMPTS = ["red circle", "a b", "it", "a b"]


def test_equals_transformers_logits(folder: Path) -> None:
    videos = noisy_videos(4)
    found = ClipScore(WIDE, str(folder)).score(videos, PROMPTS)["clip"].values
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for clip, prompt, score in zip(videos, PROMPTS, found, strict=True):
        images = processor([frame.numpy() for frame in clip[::4]], return_tensors="np")["pixel_values"]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=torch.from_numpy(np.stack(images))).logits_per_image
        assert logits.shape == (3, 1) and logits.abs().max() < 100
        assert score.item() == pytest.approx(logits.mean().item(), abs=0.2)  # PIL rounds between its two passes: 0.1
    assert found.std() > 1


def test_a_clip_scores_the_same_in_any_batch(folder: Path) -> None:
    scorer, videos = ClipScore(WIDE, str(folder)), noisy_videos(4)
    together = scorer.score(videos, PROMPTS)["clip"].values
    for index in range(4):
        alone = scorer.score(videos[index : index + 1], PROMPTS[index : index + 1])["clip"].values
        assert torch.equal(alone, together[index : index + 1])
    turned = scorer.score(videos.flip(0), PROMPTS[::-1])["clip"].values
    assert torch.equal(turned.flip(0), together)


def test_a_long_prompt_is_cut_before_its_end_mark_and_said_so_once(folder: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(clip_score, "say", said.append)
    scorer, videos = ClipScore(WIDE, str(folder)), noisy_videos(2)
    fits = "abcdefghij"  # ten tokens and two marks
    exact = scorer.score(videos, [fits, fits])["clip"].values
    assert not said
    longer = scorer.score(videos, [fits + "klm", fits + " and so on"])["clip"].values
    assert len(said) == 1 and f"{LONGEST} tokens" in said[0]
    ids = [scorer._tokens(prompt)[0].tolist() for prompt in (fits, fits + "klm")]
    assert len(ids[1]) == LONGEST and ids[1][-1] == ids[0][-1] and ids[1][:-2] == ids[0][:-2]
    assert torch.equal(scorer.score(videos, [fits + "klm", fits + "kxyz"])["clip"].values[:1], longer[:1])
    assert not torch.equal(exact[:1], longer[:1])  # the tenth letter no longer ends its word


def test_pick_is_the_same_on_its_own_axis(folder: Path) -> None:
    videos = noisy_videos(2)
    pick, clip = build_scorer(f"pick={folder}", WIDE), build_scorer(f"clip={folder}", WIDE)
    assert isinstance(pick, PickScore) and pick.axes == ("pick",)
    found = [scorer.score(videos, PROMPTS[:2])[scorer.axes[0]].values for scorer in (pick, clip)]
    assert torch.equal(*found)


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_half(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    CLIPTextModel(CLIPConfig.from_pretrained(folder).text_config).save_pretrained(folder)
    (folder / "config.json").write_text(config)


def damage_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def damage_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 8}))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_tokenizer, "tokenizer .* knows .* tokens, the model 514"),
        (damage_half, "has no weight"),
        (damage_weights, "does not load"),
        (damage_size, "does not load"),
        (remove_weights, r"does not load \(.*model\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage, what: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=what):
        ClipScore(WIDE, str(folder))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        ClipScore(WIDE, str(tmp_path / "nowhere"))
