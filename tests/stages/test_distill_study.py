"""The study of distilled students on a tiny demo: arms are made and judged once; acceptance fails where it must."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from tiny_rlhf import PROMPTS

from reelforge.bench import distill_study
from reelforge.bench.distill_study import Arm, Outcome, arms, checks, markdown
from reelforge.bench.evaluation import ACCURACIES, FRECHET, MEASURES, REWARDS, VOTERS
from reelforge.bench.examiner import Verdict
from reelforge.bench.judge.bootstrap import Interval
from reelforge.bench.judge.gsb import Gsb
from reelforge.bench.judge.results import Score
from reelforge.engine.core import config as configuration
from reelforge.engine.distill.trainer import RolloutConfig
from reelforge.stages.cli import main
from reelforge.stages.distill_config import DistillConfig

SHORT = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "log_every": 1}
WANTED = ("teacher, few steps, causal, untrained", "student seed 0", "initialisation alone", "1 step")


@pytest.fixture(scope="module")
def demo(tmp_path_factory, model_folder: Path) -> Path:
    """What the study reads of a demo's folder; all models are the tiny one."""
    root = tmp_path_factory.mktemp("demo")
    (root / "rl_prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in ("base_model", "rlhf_model"):
        (root / name).symlink_to(model_folder)
    evaluation = {"prompts": 8, "samples": 1, "batch_size": 8}
    (root / "config.resolved.toml").write_text(tomli_w.dumps({"seed": 0, "evaluation": evaluation}))
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    pairs = {"count": 4, "substeps": 1, "batch_size": 4, "guidance_scale": 1.5}
    begin = {"init": {"method": "teacher_forcing"}, "pairs": pairs, "train": SHORT, "optimizer": {"warmup_steps": 0}}
    forced = {"dmd": {"critic_steps": 1}, "rollout": {"context": {"kind": "last_step"}}, "train": SHORT}
    table = {"teacher": "nowhere", "prompts": "nowhere", "output": "nowhere", "chunk_frames": 1, "device": "cpu",
             "denoising_steps": [1000, 500], "previews": 0, "causal_init": begin, "self_forcing": forced}  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def run(out: Path, demo: Path, recipe: Path) -> dict:
    places = ["--demo", str(demo), "--out", str(out), "--recipe", str(recipe)]
    assert main(["bench", "distill-study", *places]) == 0
    return json.loads((out / "study.json").read_text())


@pytest.fixture
def few(monkeypatch) -> None:
    every = distill_study.arms
    monkeypatch.setattr(distill_study, "arms", lambda *given: [arm for arm in every(*given) if arm.name in WANTED])


def test_arms_are_distilled_and_judged_once(tmp_path: Path, demo, recipe, few, monkeypatch) -> None:
    found = run(tmp_path, demo, recipe)
    rows = {outcome["arm"]["name"]: outcome for outcome in found["arms"]}
    assert tuple(rows) == ("teacher", *WANTED)
    student, alone, one = rows["student seed 0"], rows["initialisation alone"], rows["1 step"]
    assert set(student["seconds"]) == {"causal_init", "self_forcing"} and set(alone["seconds"]) == {"causal_init"}
    # Two steps over T frames, no pass in between; the teacher is guided; one step is half of two.
    assert student["verdict"]["token_forwards"] == alone["verdict"]["token_forwards"] - _written(alone)
    assert 2 * one["verdict"]["token_forwards"] == student["verdict"]["token_forwards"]
    begun = configuration.load(DistillConfig, tmp_path / "1-step/config.resolved.toml")
    assert begun.student == tmp_path / "student-seed-0/causal_init" and begun.causal_init is None
    assert begun.denoising_steps == (1000.0,)
    assert len(found["checks"]) >= 3 and all(check[0] == "student seed 0" for check in found["checks"])
    page = (tmp_path / "study.md").read_text()
    assert all(f"| {name} |" in page for name in rows)

    def never(*arguments: object) -> None:
        raise AssertionError("trained or sampled again")

    monkeypatch.setattr("reelforge.stages.distill._train", never)
    monkeypatch.setattr("reelforge.bench.exam.evaluate", never)
    assert run(tmp_path, demo, recipe)["arms"] == found["arms"]


def _written(outcome: dict) -> int:
    """Tokens of the clean passes over two of the tiny clip's three chunks: the initialisation alone takes them."""
    return outcome["verdict"]["token_forwards"] * 2 // (2 * 3 + 2)


def test_every_arm_is_a_recipe(demo: Path, recipe: Path, tmp_path: Path) -> None:
    made = [arm for arm in arms("[1000, 500]", 1.5, 3) if arm.overrides]
    tables = {arm.name: configuration.load(DistillConfig, recipe, arm.overrides) for arm in made}
    assert tables["initialisation alone"].self_forcing is None and tables["no initialisation"].causal_init is None
    assert {arm.name for arm in made if arm.candidate} == {f"student seed {seed}" for seed in (0, 1, 2)}
    assert [tables[f"student seed {seed}"].self_forcing.train.seed for seed in (0, 1, 2)] == [0, 1, 2]
    assert tables["ODE initialisation"].causal_init.init.method == "ode"
    assert tables["clean context"].self_forcing.rollout == RolloutConfig()
    assert tables["noisy context"].self_forcing.rollout.context.noise == 0.1
    assert {arm.begins_with for arm in made} == {"", "student seed 0"}


# --- acceptance ---


def verdict(kept: float = 1.0, tokens: int = 100, **means: float) -> Verdict:
    scores = {
        v.name: Score(means.get(v.name, 1.0), 0.9, 1.1, v.target, "", v.better)
        for v in (*REWARDS, *VOTERS, *MEASURES, *ACCURACIES, FRECHET)
    }
    gsb = Gsb("rlhf", 6, 4, 0, 0.1, 0.0, 0.2, 1.0, 0.8, 0.01, 0.01, 0.1, ("strangeness",))
    recovery = {"ta": Interval(kept, kept - 0.1, kept + 0.1)}
    return Verdict(10, tokens, 0.1, scores, 0.5, {"held-out voters": gsb}, 1.0, recovery)


@pytest.mark.parametrize(
    ("judged", "failing"),
    [
        (verdict(), []),
        (verdict(kept=0.89), ["recovery of ta >= 0.9"]),
        (verdict(accuracy_colour=0.97), ["accuracy_colour at most 0.02 below"]),
        (verdict(accuracy_motion=0.97), ["accuracy_motion at most 0.02 below"]),
        (verdict(accuracy_motion=0.985), []),
        (verdict(tokens=101), ["token-forwards at most 1/8"]),
    ],
)
def test_acceptance(judged: Verdict, failing: list[str]) -> None:
    teacher = Outcome(Arm("teacher"), verdict(tokens=800), {})
    candidate, other = Outcome(Arm("student", ("x",), candidate=True), judged, {"self_forcing": 2.0}), teacher
    found = checks([teacher, replace(other, arm=Arm("ablation", ("x",))), candidate])
    assert {name for name, *_ in found} == {"student"} and len(found) == 4
    assert [criterion for _, criterion, _, passed in found if not passed] == failing
    page = markdown([teacher, candidate], found, "lead")
    assert page.count("**fail**") == len(failing) and "+0.10 [+0.00, +0.20]" in page
