"""``reelforge demo --quick``, stopped in the middle and continued: every part of the chain on real files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from reelforge.bench.evaluation import held_out_prompts
from reelforge.bench.judge import results
from reelforge.bench.toy.world import captions, scenes
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.stages.cli import main
from reelforge.stages.demo import load_config

COLUMNS = [
    "base", "sft", "sft, longer", "rlhf", "student", "rlhf, raw request", "rlhf + PE", "student, raw request",
    "student + PE",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--quick"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reelforge.stages.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while len(list(read_jsonl(out / "base/metrics.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGTERM" in error and "Run the same command" in error
    assert main(arguments) == 0
    return out


def test_a_stopped_demo_went_on_where_it_was(demo: Path) -> None:
    assert [event["event"] for event in read_jsonl(demo / "base/events.jsonl")] == ["stopped"]
    config = load_config(quick=True, overrides=[])
    for stage, budget in (("base", config.base), ("sft", config.sft)):
        lines = [line for line in read_jsonl(demo / stage / "metrics.jsonl") if "loss" in line]
        every = budget.train.log_every
        assert [line["step"] for line in lines] == list(range(every, budget.train.steps + 1, every))


def test_the_student_is_causal_and_generates_by_its_folder(demo: Path, tmp_path: Path) -> None:
    folder = demo / "distill/model"
    defaults = load_generation_defaults(folder)
    assert (defaults.chunk_frames, defaults.guidance_scale, defaults.context.kind) == (1, 1.0, "last_step")
    assert main(["generate", str(folder), "--prompt", "a red circle moving up", "--out", str(tmp_path)]) == 0
    assert read_video(next(tmp_path.glob("*.mp4"))).frames.shape == (17, 32, 32, 3)


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        ("base", "loss"),
        ("sft", "loss"),
        ("enhance/cold_start", "loss"),
        ("distill/causal_init", "loss"),
        ("distill/self_forcing", "critic_loss"),
    ],
)
def test_the_loss_falls(demo: Path, stage: str, loss: str) -> None:
    losses = [line[loss] for line in read_jsonl(demo / stage / "metrics.jsonl") if loss in line]
    last = losses[-max(1, len(losses) // 4) :]
    assert sum(last) / len(last) < 0.8 * losses[0]


def test_what_was_held_out_of_pretraining_improves(demo: Path) -> None:
    validation = [r["validation_loss"] for r in read_jsonl(demo / "base/metrics.jsonl") if "validation_loss" in r]
    assert validation[-1] < validation[0]


@pytest.mark.parametrize(
    "stage", ["base", "sft", "longer", "rlhf", "enhance/cold_start", "enhance/grpo", "distill/causal_init"]
)
def test_every_stage_has_gradients(demo: Path, stage: str) -> None:
    norms = [line["grad_norm"] for line in read_jsonl(demo / stage / "metrics.jsonl") if "grad_norm" in line]
    assert norms and all(0 < norm < float("inf") for norm in norms)


def test_the_student_and_its_critic_have_gradients(demo: Path) -> None:
    lines = [line for line in read_jsonl(demo / "distill/self_forcing/metrics.jsonl") if "dmd" in line]
    assert lines and all(0 < line[name] < float("inf") for line in lines for name in ("grad_norm", "critic_grad_norm"))


def test_results_hold_every_stage_and_the_truth(demo: Path) -> None:
    found = results.read(demo / "results.json")
    assert [stage.name for stage in found.stages] == COLUMNS
    base, tuned, longer, aligned, student, raw, rewritten, *students = found.stages
    assert base.gsb == () and tuned.gsb[0].reference == "base"
    assert [vote.reference for vote in aligned.gsb] == ["sft", "sft, longer"]
    assert aligned.seconds_train and aligned.steps == 4 and longer.steps
    assert [vote.reference for vote in student.gsb] == ["rlhf"]
    assert student.seconds_train and student.steps == 120
    # 5 frames of 16 tokens: six steps of the teacher, two of the student, whose past costs no pass.
    assert (aligned.token_forwards, student.token_forwards) == (6 * 80, 2 * 80)
    # Requests are compared among themselves.
    assert raw.gsb == () and raw.seconds_train is None and all(score.change is None for score in raw.scores.values())
    assert [vote.reference for vote in rewritten.gsb] == ["rlhf, raw request"] and rewritten.seconds_train
    assert [vote.reference for vote in students[1].gsb] == ["student, raw request", "rlhf + PE"]
    assert all(score.change is not None for score in rewritten.scores.values())
    assert "100 % are the request itself" in raw.note and "still name all that the request names" in rewritten.note
    assert "of the way from clean clips of other prompts" in student.note and " ms" in student.note
    vote = tuned.gsb[0]
    assert vote.good + vote.same + vote.bad == found.clips == 48 and found.prompts == 48
    assert base.nfe == tuned.nfe == aligned.nfe == 6 and base.seconds_per_video > 0
    assert not {"vq", "mq", "ta"} & set(vote.voters)
    for name, truth in found.truth.scores.items():
        assert truth.low <= truth.mean <= truth.high, name
    better_than_untrained = {"vq", "ta", "frechet", "manifold", "background"}
    for name in better_than_untrained:
        sign = 1 if found.truth.scores[name].better == "higher" else -1
        assert sign * found.truth.scores[name].mean > sign * tuned.scores[name].mean, name
    assert json.loads((demo / "results.json").read_text())["versions"]["torch"]


def test_the_report_opens_from_disk_alone(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "student: self-forcing" in page and "student: flow-matching loss" not in page
    assert page.count("data:image/webp") > 20 and len(page) < 5_000_000


def test_models_load_in_diffusers_and_generate(demo: Path, tmp_path: Path) -> None:
    assert WanTransformer3DModel.from_pretrained(demo / "sft_model/transformer").config.ffn_dim == 512
    assert (
        main(["generate", str(demo / "sft_model"), "--prompt", "a red circle moving up", "--out", str(tmp_path)]) == 0
    )
    assert read_video(next(tmp_path.glob("*.mp4"))).frames.shape == (17, 32, 32, 3)


def test_no_training_caption_describes_a_held_out_scene(demo: Path) -> None:
    written = {line for path in (demo / "videos").rglob("*.txt") for line in path.read_text().splitlines()}
    judged = {prompt for _, prompt in held_out_prompts(72)}
    every = {caption for scene in scenes("held_out") for caption in captions(scene)}
    assert len(judged) == 72 and judged <= every
    assert len(written) > 1000 and not written & every


def test_rejected_clips_are_listed(demo: Path) -> None:
    report = json.loads((demo / "cache/curated/reject_report.json").read_text())
    assert report["accepted"] + len(report["rejects"]) == report["total"] == 96
    assert report["accepted"] >= 40 and report["counts"].keys() == {"filter:motion"}
