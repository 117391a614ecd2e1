"""The RLHF stage as a user runs it: recipes in, one sentence or a trained model out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import WanTransformer3DModel
from planted_scorers import Failing
from tiny_rlhf import PROMPTS, TOY_REWARDS, config_of, lines, recipe_table, watched, weights

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import CheckpointError, ConfigError, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.io import checkpoint
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import Generator, Job, decode_uint8, resolve
from reelforge.engine.model.lora import load_adapter, lora_parameters
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.picture import PictureStatistics
from reelforge.engine.rl.plan import PlanConfig, Planner
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.stages import rlhf
from reelforge.stages.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
KEYS = {
    "step", "loss", "grad_norm", "skipped", "lr", "step_s", "nfe", "rollout_s", "decode_s", "score_s", "wait_s",
    "train_s", "lambda_weight", "reward", "within_group", "rho", "zero_std_share", "missing_share", "counted_share",
    "correlation", "ratio", "kl", "clipped_low", "clipped_high", "kl_reference", "gradient_cosine",
}  # fmt: skip


def recipe_file(root: Path, model: Path, **changes: object) -> str:
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, model, **changes)))
    return str(path)


# --- what a run does ---

# Rows of an iteration by hand: T = 4, range [0, 2), P = 4; stratified pairs put two groups on either step.
ROWS = {
    "ours": sum((k + 1) + 4 * (3 - k) for k in (0, 1, 0, 1)),
    "flash": 4 * 8 * 4,
    "flow": 4 * 8 * 4,
    "dance": 4 * (1 + 4 * 3),
    "mix": 4 * (1 + 4 * 3),
}
STATES = {"ours": 4, "flash": 32, "flow": 64, "mix": 4 * (1 + 4)}


@pytest.mark.parametrize("preset", ["ours", "flash", "flow", "dance", "mix"])
def test_every_preset_runs(model_folder, tmp_path, capsys, preset):
    arguments = [
        "rlhf",
        recipe_file(tmp_path, model_folder, rewards=[TOY_REWARDS]),
        "--preset",
        preset,
    ]
    assert main(arguments) == 0
    told = capsys.readouterr()
    done = json.loads(told.out)
    assert done["steps"] == 2 and Path(done["weights"]) == tmp_path / "run/transformer"
    assert WanTransformer3DModel.from_pretrained(done["weights"]).config.num_layers == 2
    found = lines(tmp_path / "run")
    assert [set(line) for line in found] == [KEYS] * 2
    assert [line["nfe"] for line in found] == [ROWS[preset]] * 2
    assert all(line["ratio"] == 1 and line["counted_share"] == 1 and line["missing_share"] == 0 for line in found)
    assert set(found[0]["reward"]) == {"vq", "mq", "ta"} and np.shape(found[0]["correlation"]) in ((3, 3), (0,))
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["work"]["rows"] == ROWS[preset]
    if preset == "dance":  # one of two steps, drawn for each prompt: its group is one state at the first, four after
        planner = Planner(PlanConfig(4, steps=(0, 2), stochastic="all", trained_share=0.6), 0, 6, 4, 4)
        drawn = [group.trained for number in range(2) for group in planner.iteration(number)]
        STATES["dance"] = sum({(0,): 1, (1,): 4}[steps] for steps in drawn) / 2
    assert plan["work"]["trained_states"] == STATES[preset]
    before, after = weights(model_folder / "transformer"), weights(tmp_path / "run/transformer")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().err


def test_all_weights_some_weights_or_an_adapter(model_folder, tmp_path):
    before = weights(model_folder / "transformer")
    moved = {}
    for name, changes in {"all": {}, "some": {"trainable": ["blocks.*.attn1.to_q.weight", "blocks.*.ffn.*"]}}.items():
        root = tmp_path / name
        root.mkdir()
        after = weights(rlhf.run(config_of(root, model_folder, **changes)).weights)
        moved[name] = {key for key in before if not torch.equal(before[key], after[key])}
    some = {key for key in before if key.endswith("attn1.to_q.weight") or ".ffn." in key}
    assert moved["some"] == some and len(some) == 2 * (1 + 4)
    assert moved["all"] == before.keys()
    root = tmp_path / "adapter"
    root.mkdir()
    lora = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v"]}
    result = rlhf.run(config_of(root, model_folder, lora=lora, loss__kl__weight=0.1))
    assert result.weights == root / "run/adapter" and not (root / "run/transformer").exists()
    model = load_transformer(model_folder / "transformer")
    assert load_adapter(model, result.weights).rank == 2
    adapter = {name: value.detach() for name, value in lora_parameters(model)}
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert result.metrics["kl_reference"] >= 0 and lines(root / "run")[0]["kl_reference"] == 0
    stored = checkpoint.load(root / "run/checkpoints/step-00000002").groups["ema"]
    assert stored.keys() == adapter.keys() and all(torch.equal(stored[name], adapter[name]) for name in stored)


def test_equal_rewards_leave_every_weight_as_it_was(model_folder, tmp_path):
    result = rlhf.run(config_of(tmp_path, model_folder, rewards=["planted_scorers:Even"]))
    before, after = weights(model_folder / "transformer"), weights(result.weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(line["zero_std_share"], line["counted_share"]) for line in lines(tmp_path / "run")] == [(1, 0)] * 2


def test_a_clip_size_of_ones_own(model_folder, tmp_path):
    video = {"num_frames": 5, "height": 32, "width": 16, "fps": 8.0}
    config = config_of(tmp_path, model_folder, video=video, held_out=watched(tmp_path))
    rlhf.run(config)
    shown = read_video(tmp_path / "run/samples/step-00000002/01.mp4")
    assert shown.frames.shape == (5, 32, 16, 3) and shown.fps == 8


# --- the plan ---


def test_the_plan_is_said_and_nothing_is_written(model_folder, tmp_path, capsys):
    changes = {"rollout__path": {"guidance_scale": 3.0}, "held_out": watched(tmp_path), "train__checkpoint_every": 1}
    assert main(["rlhf", recipe_file(tmp_path, model_folder, **changes), "--plan"]) == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    rows = 2 * ROWS["ours"]
    assert facts["work"]["rows"] == rows and facts["work"]["independent_rows"] == 2 * 4 * 4 * 4
    assert facts["saved"] == pytest.approx(1 - rows / 128) and facts["work"]["steps"] == {"0": 2, "1": 2}
    assert (facts["work"]["trained_states"], facts["work"]["trained_samples"]) == (4, 16)
    assert facts["held_out_rows"] == 3 * 6 * 2  # start and two checkpoints, 3 prompts x 2, two steps without guidance
    parameters = sum(value.nbytes for value in weights(model_folder / "transformer").values())
    latent = 16 * 3 * 4 * 4
    assert facts["memory"] == {
        "weights": parameters, "gradients": parameters, "adam": 2 * parameters, "average": parameters,
        "reference": 0, "states": 4 * 2 * 4 * latent,
    }  # fmt: skip
    rates = facts["rates"]
    seconds = rows * rates["row_s"] + 4 * rates["train_s"] + 16 * rates["decode_s"]
    assert facts["iteration_s"] == pytest.approx(seconds) and min(rates["row_s"], rates["train_s"]) > 0
    assert facts["device_hours"] == pytest.approx((2 * seconds + 36 * rates["row_s"]) / 3600)
    for words in ("2 iterations of 4 prompts x 4 samples", "0 (2), 1 (2) of 4", "trunc, eta 1, cap 0.45",
                  f"{rows} network evaluations", "4 forwards and backwards", "device-hours"):  # fmt: skip
        assert words in told.err
    assert not (tmp_path / "run").exists()


def test_a_plan_without_a_monitor_says_so(model_folder, tmp_path, capsys):
    facts = rlhf.plan(config_of(tmp_path, model_folder, loss__kl__weight=0.1, updates_per_rollout=2))
    assert "nothing is watched" in capsys.readouterr().err
    assert facts["iterations"] == 1 and facts["updates"] == 2
    assert facts["memory"]["reference"] == facts["memory"]["weights"] and facts["reference_rows"] == 4


# --- bad input: one sentence, and nothing written ---

BAD = {
    "has no such prompts": ({"prompts": "nowhere.txt"}, "Prompts nowhere.txt cannot be read", "one prompt a line"),
    "no held-out prompts": ({"held_out__prompts": "nowhere.txt"}, "Prompts nowhere.txt cannot be read", ""),
    "fewer prompts than groups": ({"train__batch_size": 8}, "There are 6 prompts for 8 groups", "to 6 or less"),
    "steps outside the schedule": ({"plan__steps": [0, 5]}, "plan.steps is [0, 5]", "may end at 4"),
    "a falling range": ({"plan__steps": [2, 1]}, "plan.steps is [2, 1]", "rising range"),
    "noises that do not divide": ({"plan__distinct_noise": 3}, "is 3 and group_size 4", "that does is 2"),
    "an unknown scorer": ({"rewards": ["clop"]}, "There is no scorer 'clop'", "Did you mean 'clip'?"),
    "no scorer": ({"rewards": []}, "rewards is empty", "Name a scorer"),
    "a missing module": ({"rewards": ["nowhere:Mine"]}, "'nowhere:Mine'", ""),
    "one scorer twice": ({"rewards": ["planted_scorers:Bright"] * 2}, "bright, bright", "one scorer"),
    "a weight for nobody": ({"fusion__weights": [{"axis": "ta", "weight": 2.0}]}, "names 'ta'", "bright"),
    "half an iteration": ({"train__steps": 7, "updates_per_rollout": 2}, "train.steps is 7", "6 or 8 steps"),
    "a pattern for nothing": ({"trainable": ["blocks.*", "bocks.*"]}, "'bocks.*' matches no weight", "A weight is"),
    "an adapter and weights": ({"trainable": ["*"], "lora": {"rank": 2}}, "beside [lora]", "choose one"),
    "frames that do not fit": (
        {"video": {"num_frames": 8, "height": 16, "width": 16, "fps": 8.0}}, "num_frames is 8", "Use 5 or 9"),
    "steps without noise": ({"rollout__noise": {"eta": 0.0}}, "adds no noise", ""),
    "an unknown key": ({"plan__group": 4}, "Unknown key 'plan.group'", "'group_size'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(model_folder, tmp_path, capsys, case):
    changes, what, hint = BAD[case]
    assert main(["rlhf", recipe_file(tmp_path, model_folder, **changes)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and what in said[0] and hint in said[1]
    assert not (tmp_path / "run").exists()


def test_what_is_optimised_cannot_be_held_out(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="'planted_scorers:Bright' is optimised and held out"):
        config_of(tmp_path, model_folder, held_out=watched(tmp_path, scorers=["planted_scorers:Bright"]))


# --- scorers that fail ---


def test_missing_scores_are_recorded_and_train_nothing_false(model_folder, tmp_path):
    changes = {"rewards": ["planted_scorers:Bright", "planted_scorers:Choosy"], "scoring__missing_limit": 1.0}
    result = rlhf.run(config_of(tmp_path, model_folder, **changes))
    records = list(read_jsonl(tmp_path / "run/bad_samples.jsonl"))
    assert records and {record["iteration"] for record in records} <= {0, 1}
    assert all(record["missing"] == ["choosy"] and record["prompt"] in PROMPTS for record in records)
    assert all(0 <= record["member"] < 4 for record in records)
    missing = sum(line["missing_share"] * 2 * 16 for line in lines(tmp_path / "run"))
    assert missing == pytest.approx(len(records))
    assert all(value.isfinite().all() for value in weights(result.weights).values())


def test_a_scorer_that_breaks_down_ends_the_run_with_its_words(model_folder, tmp_path, monkeypatch):
    changes = {"rewards": ["planted_scorers:Failing"], "train__steps": 3, "train__checkpoint_every": 1}
    # An iteration is two batches; the first one is scored again, clip by clip, to see whether a clip scores alone
    # what it scored in the batch.
    monkeypatch.setattr(Failing, "good", 2 + 3)
    config = config_of(tmp_path, model_folder, **changes)
    with pytest.raises(TrainingError, match="100% of the iteration's samples lack a score.*reward server is down"):
        rlhf.run(config)
    assert len(list(read_jsonl(tmp_path / "run/bad_samples.jsonl"))) == 16
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]
    monkeypatch.setattr(Failing, "good", 10**6)
    mended = weights(rlhf.run(config).weights)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    shutil.rmtree(tmp_path / "run")
    whole = weights(rlhf.run(config).weights)
    assert all(torch.equal(mended[name], whole[name]) for name in whole)


def test_a_scorer_that_hangs_is_missing(model_folder, tmp_path):
    changes = {"rewards": ["planted_scorers:Hanging"], "scoring__timeout_s": 0.1}
    with pytest.raises(TrainingError, match="no answer within 0.1 s"):
        rlhf.run(config_of(tmp_path, model_folder, **changes))
    errors = {record["error"] for record in read_jsonl(tmp_path / "run/bad_samples.jsonl")}
    assert errors and all("Hanging: no answer within 0.1 s" in error for error in errors)


# --- continuing ---


def test_a_run_continues_under_its_own_settings_only(model_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    recipe = recipe_file(tmp_path, folder)
    assert main(["rlhf", recipe]) == 0

    def refused(*sets: str) -> str:
        capsys.readouterr()
        assert main(["rlhf", recipe, *(part for each in sets for part in ("--set", each))]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        return said[-2]

    assert "was started with optimizer.lr = 0.001, now it is 0.5" in refused("optimizer.lr=0.5")
    shutil.rmtree(tmp_path / "run/transformer")  # as if it had stopped right before the end
    assert "was started with optimizer.lr = 0.001, now it is 0.5" in refused("optimizer.lr=0.5")
    assert "was started with plan.steps = [0, 2], now it is [1, 3]" in refused("plan.steps=[1, 3]")
    assert "was started with plan.group_size = 4, now it is 2" in refused("plan.group_size=2")
    assert "rollout.noise.kind = 'trunc', now it is 'wan'" in refused("rollout.noise.kind=wan")
    assert "train.batch_size = 4, now it is 2" in refused("train.batch_size=2")
    prompts = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text(prompts.replace("red", "pink"))
    assert "Since this run was started, the prompts changed" in refused()
    (tmp_path / "prompts.txt").write_text(prompts + "\n\n")  # the same prompts
    scheduler = folder / "scheduler/scheduler_config.json"
    schedule = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(schedule | {"flow_shift": 5.0}))
    assert "the sampler's sigmas changed" in refused()
    scheduler.write_text(json.dumps(schedule))
    other = ModelFolder.load(model_folder).transformer
    torch.nn.init.normal_(other.proj_out.weight)
    shutil.rmtree(folder / "transformer")
    save_transformer(other, folder / "transformer")
    assert "the model's weights changed" in refused()
    shutil.rmtree(folder)
    shutil.copytree(model_folder, folder)
    free = ("scoring.timeout_s=5", "scoring.missing_limit=0.5", "train.log_every=2", "train.checkpoint_every=7",
            "device=auto", "gradient_checkpointing=true")  # fmt: skip
    assert main(["rlhf", recipe, *(part for each in free for part in ("--set", each))]) == 0


def test_a_checkpoint_of_another_schedule_is_refused_without_the_plan_too(model_folder, tmp_path):
    config = config_of(tmp_path, model_folder)
    rlhf.run(config)
    shutil.rmtree(tmp_path / "run/transformer")
    (tmp_path / "run/plan.json").unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    with pytest.raises(CheckpointError, match="was written under config"):
        rlhf.run(config)


# --- what is held out ---


def by_generate(model: Path, transformer: Path, seed: int) -> torch.Tensor:
    """Mean level of each held-out clip, made as ``generate`` makes it."""
    folder = replace(ModelFolder.load(model), transformer=load_transformer(transformer))
    generator = Generator(folder, resolve(folder.defaults, ["precision=fp32"]), seed)
    jobs = [Job(prompt, member) for prompt in PROMPTS[:3] for member in range(2)]
    clips = decode_uint8(folder.codec, generator.latents(jobs))
    return torch.from_numpy(clips).float().mean((1, 2, 3, 4)).double() / 255


def test_held_out_clips_are_those_of_generate_against_the_start(model_folder, tmp_path):
    held_out = watched(tmp_path, scorers=["planted_scorers:Dim"], max_fall=100.0)
    changes = {"held_out": held_out, "train__checkpoint_every": 1, "train__seed": 3, "optimizer__lr": 1e-2}
    result = rlhf.run(config_of(tmp_path, model_folder, **changes))
    found = lines(tmp_path / "run", "held_out")
    assert [line["step"] for line in found] == [0, 1, 2]
    start = by_generate(model_folder, model_folder / "transformer", 3)
    now = by_generate(model_folder, result.weights, 3)
    bright, dim = found[2]["held_out"]["bright"], found[2]["held_out"]["dim"]
    assert (bright["kind"], dim["kind"], found[2]["held_out"]["motion"]["kind"]) == ("reward", "held_out", "picture")
    assert bright["mean"] == pytest.approx(now.mean().item(), abs=1e-4)
    assert bright["start"] == pytest.approx(start.mean().item(), abs=1e-4)
    spread, difference = start.numpy().std(), (now - start).numpy()
    assert bright["drift"] == pytest.approx(difference.mean() / spread, abs=1e-2)
    assert bright["error"] == pytest.approx(difference.std(ddof=1) / 6**0.5 / spread, abs=1e-2)
    assert dim["drift"] == pytest.approx(-bright["drift"], abs=1e-5)
    assert {facts["drift"] for facts in found[0]["held_out"].values()} <= {0.0, None}
    shown = {path.relative_to(tmp_path / "run/samples").as_posix() for path in tmp_path.glob("run/samples/*/*")}
    steps = [f"step-{step:08d}" for step in range(3)]
    assert shown == {f"{step}/{clip:02d}.mp4" for step in steps for clip in range(2)} | {
        f"{step}/sheet.webp" for step in steps[1:]
    }


def test_the_start_is_measured_once(model_folder, tmp_path):
    config = config_of(tmp_path, model_folder, held_out=watched(tmp_path))
    rlhf.run(config)
    known = json.loads((tmp_path / "run/held_out.json").read_text())
    shutil.rmtree(tmp_path / "run/transformer")
    marked = known | {"scores": {axis: [row[0] + 9, *row[1:]] for axis, row in known["scores"].items()}}
    (tmp_path / "run/held_out.json").write_text(json.dumps(marked))
    rlhf.run(config)
    assert json.loads((tmp_path / "run/held_out.json").read_text()) == marked
    shutil.rmtree(tmp_path / "run/transformer")
    (tmp_path / "held_out.txt").write_text("\n".join(PROMPTS[3:]))
    rlhf.run(config)
    again = json.loads((tmp_path / "run/held_out.json").read_text())
    assert again["identity"] != known["identity"] and again["scores"] != known["scores"]


def test_a_statistic_that_does_not_exist_for_these_clips_is_none(model_folder, tmp_path, monkeypatch):
    real = PictureStatistics.score

    def flat(self, videos, prompts):
        return real(self, videos, prompts) | {"grid_2": Scores.missing(len(videos))}

    monkeypatch.setattr(PictureStatistics, "score", flat)
    rlhf.run(config_of(tmp_path, model_folder, held_out=watched(tmp_path)))
    facts = lines(tmp_path / "run", "held_out")[-1]["held_out"]["grid_2"]
    assert facts == {"kind": "picture", "mean": None, "start": None, "missing": 1, "drift": None, "error": None}


def test_a_gamed_reward_ends_the_run_after_the_checkpoint(model_folder, tmp_path, capsys):
    held_out = watched(tmp_path, scorers=["planted_scorers:Dim"], max_fall=0.6)
    changes = {"held_out": held_out, "train__steps": 12, "train__checkpoint_every": 2, "train__keep_last": 3}
    changes |= {"optimizer__lr": 1e-3, "plan__group_size": 8}
    config = config_of(tmp_path, model_folder, **changes)
    with pytest.raises(TrainingError) as stopped:
        rlhf.run(config)
    told = lines(tmp_path / "run", "held_out")
    drifts = [line["held_out"]["dim"]["drift"] for line in told]
    errors = [line["held_out"]["dim"]["error"] for line in told]
    last = told[-1]["step"]
    fell = [drift + 2 * error < -0.6 for drift, error in zip(drifts, errors, strict=True)]
    assert fell == [False] * (len(fell) - 1) + [True] and 4 <= last < 12
    what, hint = stopped.value.what, stopped.value.hint
    assert f"By step {last} the held-out dim has fallen by {-drifts[-1]:.2f}" in what and "the rewards rose by" in what
    assert (tmp_path / f"run/checkpoints/step-{last:08d}").exists()
    sound = tmp_path / f"run/sound-step-{last - 2:08d}"
    assert f"The last sound checkpoint is {tmp_path}/run/checkpoints/step-{last - 2:08d}" in hint and str(sound) in hint
    stored = checkpoint.load(tmp_path / f"run/checkpoints/step-{last - 2:08d}").groups["ema"]
    exported = weights(sound)
    assert all(torch.equal(stored[name], exported[name]) for name in stored)
    with pytest.raises(TrainingError, match="has fallen by"):  # the same command says the same again
        rlhf.run(config)
    assert lines(tmp_path / "run", "held_out")[-1]["step"] == last
    on = replace(config, held_out=replace(config.held_out, max_fall=100.0))
    assert rlhf.run(on).metrics["step"] == 12


def test_a_scorer_that_cannot_fall_is_refused_at_the_start(model_folder, tmp_path):
    for name, words in {"Even": "score 0.1 on even", "Raising": "the reward server is down"}.items():
        root = tmp_path / name
        root.mkdir()
        held_out = watched(root, scorers=[f"planted_scorers:{name}"])
        with pytest.raises(TrainingError, match=words):
            rlhf.run(config_of(root, model_folder, held_out=held_out))
        assert not list(root.glob("run/checkpoints/*"))


@pytest.mark.parametrize("name", ["rlhf_miniature", "rlhf_wan2.1_1.3b"])
@pytest.mark.parametrize("preset", [None, "ours", "flash", "flow", "dance", "mix"])
def test_recipes_are_valid(name, preset):
    overlays = [RECIPES / f"presets/{preset}.toml"] if preset else []
    config = configuration.load(RlhfConfig, RECIPES / f"{name}.toml", ["train.seed=7"], overlays)
    assert config.train.seed == 7 and config.held_out is not None and config.iterations == config.train.steps
