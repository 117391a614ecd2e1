"""``reelforge generate``: files, frame rate, independence of batch and order, cached decoding, resume."""

import dataclasses
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.io.video import read_video
from reelforge.engine.model import generation
from reelforge.engine.model.folder import ModelFolder, load_generation_defaults
from reelforge.engine.model.generator import Generator, Job, resolve
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters, save_adapter
from reelforge.stages.cli import main

PROMPTS = ["a red circle moving left", "a blue square moving up"]


def generate(model: Path, out: Path, *extra: str, prompts: list[str] = PROMPTS) -> int:
    chosen = [word for prompt in prompts for word in ("--prompt", prompt)]
    return main(["generate", str(model), "--out", str(out), *chosen, *extra])


def test_writes_clips_with_the_true_frame_rate(model_folder: Path, tmp_path: Path, capsys) -> None:
    assert generate(model_folder, tmp_path, "--set", "samples=2") == 0
    files = sorted(tmp_path.glob("*.mp4"))
    assert len(files) == 4 and "a-red-circle-moving-left" in files[-1].name
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16 and (stream.width, stream.height) == (16, 16)
    assert read_video(files[0]).frames.shape == (9, 16, 16, 3)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(2)]
    assert summary == "4 videos made, 0 were there, 2 network evaluations each"


def test_makes_only_what_is_missing(model_folder: Path, tmp_path: Path, capsys) -> None:
    generate(model_folder, tmp_path)
    first, second = sorted(tmp_path.glob("*.mp4"))
    before = second.read_bytes()
    second.unlink()
    kept = first.stat().st_mtime_ns
    capsys.readouterr()
    generate(model_folder, tmp_path)
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == before
    assert "1 videos made, 1 were there" in capsys.readouterr().out


def test_other_settings_weights_or_prompts_are_other_videos(model_folder: Path, tmp_path: Path) -> None:
    """Names must not collide: the second of each pair would never be made."""
    out, other = tmp_path / "out", tmp_path / "transformer"
    shutil.copytree(model_folder / "transformer", other)
    generate(model_folder, out, prompts=["一只猫", "一只狗"])
    generate(model_folder, out, "--set", "num_steps=3", prompts=["一只猫"])
    generate(model_folder, out, "--transformer", str(other), prompts=["一只猫"])
    assert len(list(out.glob("*.mp4"))) == 4


def test_an_adapter_is_merged_in(model_folder: Path, tmp_path: Path) -> None:
    model = ModelFolder.load(model_folder).transformer
    inject(model, LoraConfig(rank=2, alpha=4), seed=0)
    for name, parameter in lora_parameters(model):
        if parameter.abs().sum() == 0:
            parameter.data.normal_(0, 1, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, tmp_path / "adapter")
    generate(model_folder, tmp_path, prompts=PROMPTS[:1])
    generate(model_folder, tmp_path, "--adapter", str(tmp_path / "adapter"), prompts=PROMPTS[:1])
    plain, adapted = (read_video(path).frames for path in sorted(tmp_path.glob("*.mp4")))
    assert not np.array_equal(plain, adapted)


def test_prompts_come_from_a_file_too(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    arguments = [
        "generate",
        str(model_folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 0
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 2


def generator(folder: Path, **changes: object) -> Generator:
    config = dataclasses.replace(resolve(load_generation_defaults(folder), ()), precision="fp32", **changes)
    return Generator(ModelFolder.load(folder), config, seed=3)


def test_a_sample_depends_on_its_prompt_and_member_alone(model_folder: Path) -> None:
    maker = generator(model_folder, guidance_scale=2.0)
    jobs = [Job(prompt, member) for prompt in PROMPTS for member in range(2)]
    together = maker.latents(jobs)
    for index in (3, 0, 2):
        torch.testing.assert_close(maker.latents([jobs[index]]), together[index : index + 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("few", [(), (1000.0, 500.0)])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_decoding_in_one_chunk_is_sampling_at_once(
    model_folder: Path, few: tuple[float, ...], guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached decoder with a single chunk against the bidirectional sampler, ODE and few-step."""
    changes = {"guidance_scale": guidance_scale, "solver": "euler"}
    maker = generator(model_folder, chunk_frames=3, denoising_steps=few, **changes)
    jobs = [Job(prompt, 0) for prompt in PROMPTS]
    cached = maker.latents(jobs)
    if few:

        def whole(model, guidance, noise, grid, pattern, renoise, on_step, context):
            from reelforge.engine.flow.sampler import sample_few_step

            text = model.text_context(guidance.rows)
            return sample_few_step(generation._velocity(model, guidance, text), noise, grid, renoise)

        monkeypatch.setattr(generation, "sample_chunks", whole)
        expected = maker.latents(jobs)
    else:
        expected = generator(model_folder, **changes).latents(jobs)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)


def test_later_chunks_see_earlier_ones_and_not_the_reverse(model_folder: Path) -> None:
    """Chunk by chunk against the cache: other noise in the last chunk changes that chunk only."""
    maker = generator(model_folder, chunk_frames=1, solver="euler")
    model, jobs = maker.folder.transformer, [Job(PROMPTS[0], 0)]
    noise = torch.randn(1, *maker.shape, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    guidance = generation.Guidance(text, text, 1.0)
    base = generation.sample_chunks(model, guidance, noise, maker.grid, (1, 1, 1))
    touched = noise.clone()
    touched[:, :, 2] += 1
    late = generation.sample_chunks(model, guidance, touched, maker.grid, (1, 1, 1))
    assert torch.equal(late[:, :, :2], base[:, :, :2]) and not torch.equal(late[:, :, 2], base[:, :, 2])
    touched = noise.clone()
    touched[:, :, 0] += 1
    early = generation.sample_chunks(model, guidance, touched, maker.grid, (1, 1, 1))
    assert all(not torch.equal(early[:, :, frame], base[:, :, frame]) for frame in range(3))
    assert maker.num_evaluations == 2 * 3 + 2
    assert maker.latents(jobs).shape == (1, *maker.shape)


def test_cached_few_step_clips_reach_the_disk(model_folder: Path, tmp_path: Path) -> None:
    settings = ["chunk_frames=1", "denoising_steps=[1000, 750, 500, 250]", "guidance_scale=1.0"]
    assert generate(model_folder, tmp_path, *(w for s in settings for w in ("--set", s))) == 0
    clips = [read_video(path).frames for path in sorted(tmp_path.glob("*.mp4"))]
    assert all(clip.shape == (9, 16, 16, 3) and clip.std() > 0 for clip in clips)
    assert not np.array_equal(*clips)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("chunk_frames=2", "3 latent frames do not split into chunks of 2.*Use 2 or 4"),
        ("video.num_frames=10", "num_frames is 10; the codec needs 1 . 4 k. Use 9 or 13"),
        ("video.height=18", "height is 18. It must be a multiple of 4"),
        ("denoising_steps=[1000]", "chunk_frames is 0. Set chunk_frames"),
        ("num_steps=0", "num_steps is 0"),
        ("batch_size=0", "batch_size is 0. It must be above 0"),
        ("video.fps=0", "fps is 0"),
        ("guidance=2", "Unknown key 'guidance'. Did you mean 'guidance_scale'"),
    ],
)
def test_impossible_settings_are_named(model_folder: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = resolve(load_generation_defaults(model_folder), [setting])
        Generator(ModelFolder.load(model_folder), config, 0).latents([Job(PROMPTS[0], 0)])
