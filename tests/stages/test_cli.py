"""The command as a user types it: cache, sft and generate on real files, and one sentence for whatever is wrong."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from diffusers import WanTransformer3DModel

from reelforge.engine.core.metrics import read_jsonl
from reelforge.stages.cli import VERBS, main

COMMAND = [sys.executable, "-m", "reelforge.stages.cli"]


def recipe(path: Path, table: dict) -> str:
    path.write_text(tomli_w.dumps(table))
    return str(path)


def cache_recipe(root: Path, data: Path, model: Path) -> str:
    video = {"num_frames": 9, "height": 16, "width": 16, "fps": 16.0}
    table = {"data": str(data), "model": str(model), "output": str(root / "cache"), "video": video}
    return recipe(root / "cache.toml", table)


def sft_recipe(root: Path, model: Path, steps: int = 6) -> str:
    table = {
        "model": str(model),
        "cache": str(root / "cache"),
        "output": str(root / "run"),
        "train": {
            "steps": steps,
            "batch_size": 4,
            "micro_batch_size": 4,
            "log_every": 1,
            "checkpoint_every": 3,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "validation": {"clips": 2},
        "preview_prompts": ["a red circle moving left"],
    }
    return recipe(root / "sft.toml", table)


def test_clips_to_cache_to_sft_to_diffusers(clips_folder: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["cache", cache_recipe(tmp_path, clips_folder, model_folder)]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 24
    assert main(["sft", sft_recipe(tmp_path, model_folder)]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["steps"] == 6 and len(done["validation_bins"]) == 8
    steps = [line["step"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "run/samples").glob("step-*/00.mp4"))) == 2
    assert WanTransformer3DModel.from_pretrained(done["weights"]).config.num_layers == 2
    assert main(["sft", sft_recipe(tmp_path, model_folder)]) == 0
    assert "is finished" in capsys.readouterr().err


def test_resume_takes_another_rhythm_and_refuses_another_cache(
    clips_folder: Path, model_folder: Path, tmp_path: Path, capsys
) -> None:
    main(["cache", cache_recipe(tmp_path, clips_folder, model_folder)])
    arguments = ["sft", sft_recipe(tmp_path, model_folder)]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "run/transformer")  # as if it had stopped right before the end
    rhythm = ["--set", "train.micro_batch_size=2", "--set", "train.log_every=2", "--set", "device=cpu"]
    assert main([*arguments, *rhythm]) == 0
    assert main([*arguments, "--set", "optimizer.lr=0.5"]) == 2
    shutil.rmtree(tmp_path / "run/transformer")
    main(["cache", cache_recipe(tmp_path, clips_folder, model_folder), "--set", "filters.brightness={max=40}"])
    assert main(arguments) == 2
    assert "was written under config" in capsys.readouterr().err


def test_help_of_every_verb(capsys) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0
        assert f"usage: reelforge {verb}" in capsys.readouterr().out


def test_doctor_names_what_runs_and_what_is_missing(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for heading in ("Machine", "Versions", "Kernels", "Optional packages", "Video encoders"):
        assert f"{heading}\n" in out
    assert "torch" in out and "attention" in out and "CUDA library" in out


BAD = {
    "missing recipe": (lambda c, m, t: ["sft", str(t / "none.toml")], "none.toml cannot be read"),
    "unknown key": (
        lambda c, m, t: ["sft", sft_recipe(t, m), "--set", "optimizer.learning_rate=1"],
        "Unknown key 'optimizer.learning_rate'",
    ),
    "no cache": (lambda c, m, t: ["sft", sft_recipe(t, m)], "cache"),
    "no clips": (lambda c, m, t: ["cache", cache_recipe(t, t, m)], "holds no clip"),
    "no model": (
        lambda c, m, t: ["cache", cache_recipe(t, c, t / "nowhere")],
        "vae/config.json cannot be read",
    ),
    "wrong frames": (
        lambda c, m, t: ["cache", cache_recipe(t, c, m), "--set", "video.num_frames=10"],
        "10",
    ),
    "no prompt": (lambda c, m, t: ["generate", str(m)], "There is no prompt"),
    "no prompts file": (lambda c, m, t: ["generate", str(m), "--prompts", str(t / "none")], "cannot be read"),
    "other recipe in the folder": (
        lambda c, m, t: ["demo", "--out", str(occupied(t))],
        "another config",
    ),
}


def occupied(root: Path) -> Path:
    (root / "demo").mkdir()
    (root / "demo/run.json").write_text('{"config_hash": "of another run"}')
    return root / "demo"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_two_sentences(
    name: str, clips_folder: Path, model_folder: Path, tmp_path: Path, capsys
) -> None:
    arguments, message = BAD[name]
    assert main(arguments(clips_folder, model_folder, tmp_path)) == 2
    error = capsys.readouterr().err
    what, hint = error.splitlines()[-2:]
    assert message in error and ": error: " in what and "Traceback" not in error
    assert hint.startswith("  ") and len(hint.split()) >= 3


def start(*arguments: str) -> subprocess.Popen:
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *arguments], **pipes, text=True, preexec_fn=heard)


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path}/{pattern} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_cache_is_continued(
    number: signal.Signals, clips_folder: Path, model_folder: Path, tmp_path: Path, capsys
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for copy in range(40):
        for source in clips_folder.glob("*"):
            (many / f"{copy}-{source.name}").symlink_to(source)
    arguments = ["cache", cache_recipe(tmp_path, many, model_folder)]
    process = start(*arguments)
    wait_for(tmp_path, "cache/header.json", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 960


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_generate_is_continued(number: signal.Signals, model_folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["generate", str(model_folder), "--prompt", "a red circle", "--out", str(tmp_path)]
    arguments += ["--set", "samples=12", "--set", "num_steps=40"]
    process = start(*arguments)
    wait_for(tmp_path, "*.mp4", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    made = len(list(tmp_path.glob("*.mp4")))
    assert process.returncode == 130 and number.name in error and "Traceback" not in error
    assert main([*arguments]) == 0
    assert f"{12 - made} videos made, {made} were there" in capsys.readouterr().out
