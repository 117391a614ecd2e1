"""``reelforge bench sensitivity`` on a small model folder, whole and in chunks."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from tiny_model import TINY_VIDEO, make_model_folder

from reelforge.bench import sensitivity
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import Generator, Job, resolve
from reelforge.engine.model.precision import Fp8Policy
from reelforge.engine.model.wan import WanTransformer
from reelforge.stages.cli import main

WIDE = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny folder with a transformer whose sizes e4m3 takes."""
    root = make_model_folder(tmp_path_factory.mktemp("model"))
    made = ModelFolder.load(root)
    transformer = WanTransformer.from_config(WIDE, seed=1)
    transformer.proj_out.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    dataclasses.replace(made, transformer=transformer).save(root / "wide")
    (root / "prompts.txt").write_text("a red ball\na blue box\na green kite\n")
    return root


def measured(folder: Path, *overrides: str) -> dict[str, sensitivity.Result]:
    loaded = ModelFolder.load(folder / "wide")
    config = resolve(loaded.defaults, ["precision=fp32", *overrides])
    return {each.name: each for each in sensitivity.measure(loaded, config, ["a red ball", "a blue box"])}


def test_every_class_is_measured_alone_and_together(folder: Path) -> None:
    found = measured(folder)
    whole = Fp8Policy()
    names = [f"{name}, rows" for name in whole.rows] + [f"{name}, groups" for name in whole.groups]
    assert list(found) == [*names, "the policy", "the policy, no block spared"]
    assert [found[name].linears for name in names] == [1] * 8, "three blocks, the first and the last spared"
    assert found["the policy"].linears == 8 and found["the policy, no block spared"].linears == 24
    for each in found.values():
        assert 0 < each.distance.rel_l2 < 0.2 and 20 < each.distance.worst_psnr < 100
        assert each.distance.by_chunk == (each.distance.rel_l2,)
    alone = [found[name].distance.rel_l2 for name in names]
    assert max(alone) < found["the policy, no block spared"].distance.rel_l2


def test_chunks_are_compared_one_by_one(folder: Path) -> None:
    found = measured(folder, "chunk_frames=1", "solver=euler")["the policy"].distance
    assert len(found.by_chunk) == 3 and min(found.by_chunk) > 0
    assert min(found.by_chunk) < found.rel_l2 < max(found.by_chunk)


def test_the_chunk_furthest_off_decides(folder: Path) -> None:
    """Against a copy in which only the last chunk is moved."""
    loaded = ModelFolder.load(folder / "wide")
    config = resolve(loaded.defaults, ["precision=fp32", "chunk_frames=1", "solver=euler"])
    clips = sensitivity._Clips.sample(loaded, config, ["a red ball"])
    latents, pixels = clips.latents.clone(), clips.pixels.clone()
    latents[:, :, 2] *= 1.5
    pixels[:, :, 5:] += 0.2  # 1 + 4 + 4 frames
    found = dataclasses.replace(clips, latents=latents, pixels=pixels).distance(clips)
    assert found.by_chunk == (0, 0, pytest.approx(0.5)) and found.worst_psnr == pytest.approx(20 * math.log10(2 / 0.2))
    assert clips.distance(clips).worst_psnr == math.inf


def test_as_it_is_typed(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "table.md"
    arguments = ["--model", str(folder / "wide"), "--prompts", str(folder / "prompts.txt"), "--count", "1"]
    assert main(["bench", "sensitivity", *arguments, "--out", str(out), "--set", "num_steps=1"]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed and printed.count("\n") == 12
    assert printed.startswith("| in e4m3 | linears | latent rel. L2 |")


def test_a_model_too_small_for_fp8_is_one_sentence(folder: Path, capsys) -> None:
    arguments = ["--model", str(folder), "--prompts", str(folder / "prompts.txt")]
    assert main(["bench", "sensitivity", *arguments]) == 2
    assert "fp8 would quantise nothing: the model has 2 blocks" in capsys.readouterr().err


def test_videos_in_fp8(folder: Path) -> None:
    """``precision=fp8`` samples by the policy: near bf16's videos, and not them."""
    loaded = ModelFolder.load(folder / "wide")
    latents = {}
    for precision in ("bf16", "fp8"):
        generator = Generator(loaded, resolve(loaded.defaults, [f"precision={precision}"]), 0)
        latents[precision] = generator.latents([Job("a red ball", 0)])
    moved = (latents["fp8"] - latents["bf16"]).norm() / latents["bf16"].norm()
    assert 0 < moved < 0.1 and latents["fp8"].shape[2] == 1 + (TINY_VIDEO.num_frames - 1) // 4
