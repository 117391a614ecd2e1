"""Studies of RLHF arms on a tiny demo: every arm is trained and judged once, and acceptance fails where it must."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from tiny_rlhf import PROMPTS, TOY_REWARDS, lines, recipe_table

from reelforge.bench import rl_study
from reelforge.bench.evaluation import ACCURACIES, FRECHET, MEASURES, REWARDS, VOTERS
from reelforge.bench.examiner import Examiner, Verdict
from reelforge.bench.judge.bootstrap import Interval
from reelforge.bench.judge.gsb import Gsb
from reelforge.bench.judge.results import Score
from reelforge.bench.rl_study import PROOF, Study, ablation_arms, iterations_within, training_nfe
from reelforge.bench.rl_study_report import Arm, Outcome, Training, acceptance, best_guided, markdown
from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.stages import cache, sft
from reelforge.stages.bench import drive
from reelforge.stages.cli import main
from reelforge.stages.sft import SftConfig

VERBS = {"rl-study": [], "rl-ablation": ["--nfe", "300", "--samples", "1"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory, model_folder: Path, clips_folder: Path) -> Path:
    """What a study reads of a demo's folder, of the tiny model; its base and fine-tuned weights are the same."""
    root = tmp_path_factory.mktemp("demo")
    (root / "rl_prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in ("base_model", "sft_model"):
        (root / name).symlink_to(model_folder)
    table = {"data": str(clips_folder), "model": str(model_folder), "output": str(root / "cache/curated")}
    size = {"num_frames": 9, "height": 16, "width": 16, "fps": 16.0}
    cache.run(configuration.build(cache.CacheConfig, {**table, "video": size, "precision": "float32", "device": "cpu"}))
    short = {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
    table = {"model": str(model_folder), "cache": str(root / "cache/curated"), "output": str(root / "sft")}
    sft.run(configuration.build(SftConfig, {**table, "train": short, "validation": {"clips": 4}, "device": "cpu"}))
    evaluation = {"prompts": 8, "samples": 1, "batch_size": 8}
    (root / "config.resolved.toml").write_text(tomli_w.dumps({"seed": 0, "evaluation": evaluation}))
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, model_folder, rewards=[TOY_REWARDS])))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory, demo: Path, recipe: Path) -> Path:
    return run("rl-study", tmp_path_factory.mktemp("study") / "out", demo, recipe)


def run(verb: str, out: Path, demo: Path, recipe: Path, *more: str) -> Path:
    places = ["--demo", str(demo), "--out", str(out), "--recipe", str(recipe)]
    assert main(["bench", verb, *places, *VERBS[verb], *more]) == 0
    return out


def test_every_arm_of_the_study_is_trained_and_judged(study: Path) -> None:
    found = json.loads((study / "study.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == [arm.name for arm in PROOF] and len(arms) == 11
    assert arms["sft"]["verdict"]["gain"] == 0 and arms["sft"]["verdict"]["frechet_ratio"] == 1
    assert arms["sft"]["verdict"]["gsb"]["held-out voters"]["same"] == 8
    assert [arms[f"sft, guidance {g}"]["verdict"]["nfe"] for g in ("1.5", "2", "3")] == [4] * 3
    for seed in (0, 1, 2):
        arm = arms[f"rlhf seed {seed}"]
        log = lines(study / f"rlhf-seed-{seed}")
        assert arm["training"]["seconds"] == pytest.approx(sum(line["step_s"] for line in log))
        assert arm["training"]["within_group"]["vq"] == np.mean([line["within_group"]["vq"] for line in log])
        assert arm["verdict"]["scores"]["vq"]["change"]["mean"] != 0
        # Four states an iteration, a forward and a backward each, on top of the rollouts that the log counts.
        assert arm["training"]["nfe"] == sum(line["nfe"] for line in log) + 2 * 4 * len(log)
    panels = arms["shuffled"]["verdict"]["gsb"]
    assert panels["held-out voters"]["voters"] == [voter.name for voter in VOTERS]
    assert panels["optimised rewards"]["voters"] == ["vq", "mq", "ta"]
    assert len(found["checks"]) == 3 * 7 + 3 * 6
    page = (study / "study.md").read_text()
    assert all(f"| {arm.name}" in page for arm in PROOF) and "best of its kind" in page


def test_arms_differ_in_what_they_say_they_do(study: Path, demo: Path) -> None:
    resolved = {
        name: configuration.load(RlhfConfig, study / name / "config.resolved.toml")
        for name in ("rlhf-seed-0", "rlhf-seed-1", "shuffled")
    }
    assert [resolved[name].train.seed for name in resolved] == [0, 1, 0]
    assert [resolved[name].fusion.shuffled for name in resolved] == [False, False, True]
    pace = sum(line["step_s"] for line in lines(demo / "sft")) / 2
    steps = configuration.load(SftConfig, study / "sft-continued/config.resolved.toml").train.steps
    assert steps == max(1, round(sum(line["step_s"] for line in lines(study / "rlhf-seed-0")) / pace))


def test_a_finished_study_trains_and_samples_nothing_again(study: Path, demo, recipe, monkeypatch) -> None:
    before = json.loads((study / "study.json").read_text())

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr("reelforge.bench.exam.evaluate", never)
    monkeypatch.setattr("reelforge.stages.rlhf._train", never)
    monkeypatch.setattr("reelforge.stages.sft._train", never)
    run("rl-study", study, demo, recipe)
    assert json.loads((study / "study.json").read_text()) == before


def test_kept_scores_are_of_these_weights_and_this_way_of_sampling(study: Path, demo: Path, monkeypatch) -> None:
    examiner = Examiner(demo, study, None)
    seen = []
    monkeypatch.setattr("reelforge.bench.exam.evaluate", lambda folder, *rest: seen.append(rest[-2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        examiner.verdict("rlhf seed 0", study / "rlhf-seed-1/transformer")
    with pytest.raises(ZeroDivisionError):
        examiner.verdict("rlhf seed 0", study / "rlhf-seed-0/transformer", ("guidance_scale=2.0",))
    assert seen == [("guidance_scale=1.0",), ("guidance_scale=2.0",)]


def test_the_ablation_spends_equal_evaluations(tmp_path: Path, demo: Path, recipe: Path, monkeypatch) -> None:
    assert len(ablation_arms(4)) == 2 * 3 * 2 + 5
    noises = {kind: rl_study.NOISES[kind] for kind in ("wan", "flow")}  # in seconds, not all of them
    monkeypatch.setattr(rl_study, "NOISES", noises)
    monkeypatch.setattr(rl_study, "METHODS", ("flash", "dance"))
    out = run("rl-ablation", tmp_path / "out", demo, recipe, "--set", "train.micro_batch_size=8")
    found = json.loads((out / "study.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert len(arms) == 1 + 2 * 2 * 2 + 2 and found["checks"] == []
    study = Study(demo, out, recipe, ["train.micro_batch_size=8"], drive)
    for arm in ablation_arms(4):
        training, config = arms[arm.name]["training"], study.config(arm)
        count = training["iterations"]
        assert training_nfe(config, count) <= 300 < training_nfe(config, count + 1)
        rollouts = sum(line["nfe"] for line in lines(config.output))
        assert rollouts < training["nfe"] <= 300
    independent = configuration.load(RlhfConfig, out / "independent-wan-rectified/config.resolved.toml")
    assert independent.plan.distinct_noise == 4 and independent.loss.rectify
    assert independent.rollout.noise.kind == "wan"
    assert set(found["rho"]) == {"wan", "flow"}
    assert all(0 < rho <= 1 for noise in found["rho"].values() for rho in noise.values())
    assert configuration.load(RlhfConfig, out / "probe-wan/config.resolved.toml").plan.distinct_noise == 2


def test_equal_seconds_come_from_a_calibration(tmp_path: Path, demo: Path, recipe: Path) -> None:
    study, arm = Study(demo, tmp_path, recipe, [], drive), ablation_arms(4)[-1]
    by_nfe, by_seconds = rl_study._at_equal_cost(study, [arm], 300, 7.0)
    second = lines(tmp_path / "calibration-preset-mix")[1]
    assert by_nfe.overrides[-1] == f"train.steps={iterations_within(study.config(arm), 300)}"
    assert by_seconds.name == "preset mix, 7 s"
    assert by_seconds.overrides[-1] == f"train.steps={int(7.0 / second['step_s'])}"
    assert rl_study._at_equal_cost(study, [arm], 300, 7.0) == [by_nfe, by_seconds]


def test_evaluations_by_hand(demo: Path, recipe: Path, tmp_path: Path) -> None:
    config = Study(demo, tmp_path, recipe, ["rollout.path.guidance_scale=2.0"], drive).config(PROOF[4])
    # T = 4, G = 4, steps [0, 2), two groups at either: 2 (1 + 12) + 2 (2 + 8) rows, 4 states; guidance doubles all.
    assert training_nfe(config, 3) == 3 * 2 * (46 + 2 * 4)
    assert iterations_within(config, 3 * 108) == 3 and iterations_within(config, 3 * 108 - 1) == 2
    with pytest.raises(ConfigError, match="--nfe is 107"):
        iterations_within(config, 107)


def test_an_arm_that_diverges_is_a_result(demo: Path, recipe: Path, tmp_path: Path) -> None:
    def diverge(*arguments: object) -> None:
        raise TrainingError("no finite loss", "")

    training = Study(demo, tmp_path, recipe, [], diverge).train(PROOF[4])
    assert training is not None and training.stopped == "no finite loss"
    checks = acceptance([Outcome(PROOF[4], training, None)], {})
    assert [(check.found, check.passed) for check in checks] == [("no finite loss", False)]
    assert "stopped" in markdown([Outcome(PROOF[4], training, None)], checks, {}, [])


def test_no_demo_is_said(tmp_path: Path, capsys) -> None:
    assert main(["bench", "rl-study", "--demo", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no finished demo" in capsys.readouterr().err


# --- acceptance ---


def verdict(net: float = 0.6, ratio: float = 0.5, **changes: tuple[float, float, float]) -> Verdict:
    """One that a candidate passes with: all rewards rise, nothing else moves. ``changes``: mean, low, high."""
    scores = {}
    for verifier in (*REWARDS, *VOTERS, *MEASURES, *ACCURACIES, FRECHET):
        usual = (0.2, 0.1, 0.3) if verifier.target else (0.0, -0.1, 0.1)
        change = Interval(*changes.get(verifier.name, usual))
        scores[verifier.name] = Score(1.0, 0.9, 1.1, verifier.target, "", verifier.better, 0, change)
    gsb = Gsb("sft", 6, 4, 0, net, net - 0.1, net + 0.1, 1.0, 0.8, 0.01, 0.01, 0.1, ("strangeness",))
    return Verdict(10, 800, 0.1, scores, 0.5, {"held-out voters": gsb, "optimised rewards": gsb}, ratio, {})


def failed(role: str, judged: Verdict) -> list[str]:
    outcome = Outcome(Arm("one", role=role), Training(1.0, 1), judged)
    checks = acceptance([outcome], {"vq": 1.0, "mq": 1.0, "ta": 1.0})
    assert len(checks) == (7 if role == "candidate" else 6)
    return [check.criterion for check in checks if not check.passed]


@pytest.mark.parametrize(
    "judged, criterion",
    [
        (verdict(vq=(0.2, 0.0, 0.4)), "vq rises"),
        (verdict(ta=(-0.2, -0.4, -0.1)), "ta rises"),
        (verdict(net=0.49), "net GSB by held-out voters is 0.5 or more"),
        (verdict(ratio=0.61), "Frechet distance is 0.6 of sft's or less"),
        (verdict(rim=(0.2, 0.01, 0.4)), "no held-out verifier gets worse"),
        (verdict(frechet=(0.2, 0.01, 0.4)), "no held-out verifier gets worse"),
        (verdict(accuracy_shape=(-0.2, -0.4, -0.01)), "no accuracy falls"),
    ],
)
def test_a_candidate_fails_on(judged: Verdict, criterion: str) -> None:
    assert failed("candidate", judged) == [criterion]


def test_a_candidate_passes_at_the_limits_and_with_gains_on_held_out() -> None:
    better = dict.fromkeys(("strangeness", "manifold_gap", "flicker_gap", "frechet"), (-0.3, -0.4, -0.2))
    assert failed("candidate", verdict(net=0.5, ratio=0.6, accuracy_colour=(0.1, 0.05, 0.2), **better)) == []


def test_a_control_must_neither_gain_nor_lose() -> None:
    still = dict.fromkeys(("vq", "mq", "ta"), (0.0, -0.1, 0.1))
    assert failed("control", verdict(**still)) == []
    assert failed("control", verdict(**still | {"mq": (0.02, 0.01, 0.03)})) == ["mq does not rise"]
    assert failed("control", verdict(**still | {"ta": (-0.06, -0.2, 0.1)})) == ["ta loses 0.05 of its spread or less"]


def test_the_best_guidance_is_marked() -> None:
    arms = [Arm(name, "given") for name in ("sft", "sft, guidance 2")]
    outcomes = [Outcome(arm, None, replace(verdict(), gain=gain)) for arm, gain in zip(arms, (0.0, 0.4), strict=True)]
    assert best_guided([*outcomes, Outcome(Arm("rlhf"), None, verdict())]) == "sft, guidance 2"
