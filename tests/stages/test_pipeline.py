"""The pipeline as a user runs it: one recipe in, a model folder of every stage out, each made from the one before."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("av")

import tomli_w
import torch
from safetensors.torch import load_file
from tiny_distill import ODE
from tiny_enhance import make_taught_model, rewriter_weights
from tiny_pipeline import LORA, MODELS, STAGES, VIDEO, recipe_table, run, write
from tiny_rlhf import PROMPTS, weights
from torch import Tensor

from reelforge.bench.judge import results
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.metrics import training_time
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.stages import cli, distill, enhance, pipeline, rlhf, sft


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def recipe_in(model_folder: Path, clips_folder: Path, language: Path) -> Callable[..., Path]:
    """Writes a recipe into a folder."""
    return lambda root, **changes: write(root, model_folder, clips_folder, language, **changes)


@pytest.fixture(scope="module")
def finished(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of all five stages, adapters trained where there can be some; its recipe lies beside it."""
    root = tmp_path_factory.mktemp("pipeline")
    assert run(recipe_in(root, sft__lora=LORA, rlhf__lora=LORA)) == 0
    return root / "run"


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def model_of(output: Path, stage: str) -> dict[str, Tensor]:
    return weights(output / MODELS[stage] / "transformer")


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


# --- what it leaves ---


def test_the_record_names_artefacts_hashes_and_seconds(finished, model_folder):
    record = json.loads((finished / "pipeline.json").read_text())
    artefacts = {
        "base": model_folder, "cache": finished / "cache", "sft": finished / "sft_model",
        "rlhf": finished / "rlhf_model", "enhance": finished / "enhance/grpo/rewriter",
        "distill": finished / "distill/model",
    }  # fmt: skip
    assert {name: Path(facts["artefact"]) for name, facts in record.items()} == artefacts
    assert all(artefact.is_dir() for artefact in artefacts.values())
    hashes = [facts["fingerprint"] for facts in record.values()]
    assert len(set(hashes)) == 6 and all(len(name) == 16 and int(name, 16) for name in hashes)
    assert record["base"]["seconds"] == 0 and all(record[name]["seconds"] > 0 for name in STAGES)
    assert {"run.json", "config.resolved.toml", *STAGES} <= {path.name for path in finished.iterdir()}


def test_a_second_call_does_nothing_and_says_so(finished, capsys):
    before = files(finished)
    assert run(finished.parent / "recipe.toml") == 0
    told = capsys.readouterr()
    assert told.err.count("is finished") == len(STAGES)
    assert files(finished) == before
    (line,) = told.out.splitlines()
    facts, record = json.loads(line), json.loads((finished / "pipeline.json").read_text())
    assert facts["models"] == {name: record[name]["artefact"] for name in ("base", "sft", "rlhf", "distill")}
    assert facts["rewriter"] == record["enhance"]["artefact"]
    assert facts["seconds"] == {name: record[name]["seconds"] for name in STAGES}


def test_finished_folders_are_models_that_generate_runs(finished, tmp_path, capsys):
    for stage, folder in MODELS.items():
        arguments = ["generate", str(finished / folder), "--prompt", PROMPTS[0], "--out", str(tmp_path / stage)]
        assert cli.main([*arguments, "--enhance", str(finished / "enhance/grpo/rewriter")]) == 0
        (clip,) = (tmp_path / stage).glob("*.mp4")
        assert read_video(clip).frames.shape == (9, 16, 16, 3)
        record = json.loads(capsys.readouterr().out.splitlines()[0])
        assert record["request"] == PROMPTS[0]
    student = load_generation_defaults(finished / MODELS["distill"])
    assert (student.chunk_frames, student.denoising_steps) == (1, (1000.0, 500.0))


# --- every stage starts from the one before ---


@pytest.mark.parametrize("stage", ["sft", "rlhf"])
def test_an_adapter_is_merged_into_the_next_start(finished, model_folder, stage):
    """W + alpha / r * B A, in fp64 from the files."""
    before = weights(model_folder / "transformer") if stage == "sft" else model_of(finished, "sft")
    after = model_of(finished, stage)
    adapter = load_file(finished / stage / "adapter/adapter_model.safetensors")
    matrices = {name.removeprefix("base_model.model."): value.double() for name, value in adapter.items()}
    adapted = {name.removesuffix(".lora_A.weight") for name in matrices if name.endswith(".lora_A.weight")}
    assert len(adapted) == 2 * 2 * 2  # blocks, attentions, targets
    for name, value in after.items():
        layer = name.removesuffix(".weight")
        if layer not in adapted or name == layer:
            assert torch.equal(value, before[name]), name
            continue
        update = 4.0 / 2 * matrices[f"{layer}.lora_B.weight"] @ matrices[f"{layer}.lora_A.weight"]
        assert update.abs().max() > 1e-6
        torch.testing.assert_close(value.double(), before[name].double() + update, rtol=1e-6, atol=1e-8)


def alone(stage: str, finished: Path, start: Path, output: Path) -> dict[str, Tensor]:
    """What the stage's own verb makes of the pipeline's recipe, started from ``start``."""
    config = pipeline.load(finished.parent / "recipe.toml")
    if stage == "sft":
        done = sft.run(dataclasses.replace(config.sft, model=start, cache=finished / "cache", output=output))
        return load_file(done.weights / "adapter_model.safetensors")
    if stage == "rlhf":
        done = rlhf.run(dataclasses.replace(config.rlhf, model=start, output=output))
        return load_file(done.weights / "adapter_model.safetensors")
    if stage == "enhance":
        grpo = dataclasses.replace(config.enhance.grpo, generator=start)
        return rewriter_weights(enhance.run(dataclasses.replace(config.enhance, grpo=grpo, output=output)).rewriter)
    done = distill.run(dataclasses.replace(config.distill, teacher=start, output=output))
    return weights(done.model / "transformer")


@pytest.mark.parametrize(
    ("stage", "before", "other"),
    [("sft", "base", "rlhf"), ("rlhf", "sft", "base"), ("enhance", "rlhf", "base"), ("distill", "rlhf", "sft")],
)
def test_a_stage_is_its_verb_on_what_the_stage_before_left(finished, model_folder, tmp_path, stage, before, other):
    """Bit for bit; from another start it would be something else."""
    folders = {"base": model_folder, "sft": finished / MODELS["sft"], "rlhf": finished / MODELS["rlhf"]}
    if stage == "enhance":
        left = rewriter_weights(finished / "enhance/grpo/rewriter")
    elif stage == "distill":
        left = model_of(finished, "distill")
    else:
        left = load_file(finished / stage / "adapter/adapter_model.safetensors")
    assert same(left, alone(stage, finished, folders[before], tmp_path / "same"))
    assert not same(left, alone(stage, finished, folders[other], tmp_path / "other"))


# --- stages left out ---


def test_a_stage_that_is_left_out_changes_what_the_next_starts_from(finished, recipe_in, model_folder, tmp_path):
    """Without fine-tuning RLHF starts from the base model, without RLHF the student comes from the base model."""
    recipe = recipe_in(tmp_path, rlhf__lora=LORA)
    assert run(recipe, *(word for name in ("cache", "sft", "enhance", "distill") for word in ("--skip", name))) == 0
    output = tmp_path / "run"
    assert not {"cache", "sft", "sft_model", "enhance", "distill"} & {path.name for path in output.iterdir()}
    made = load_file(output / "rlhf/adapter/adapter_model.safetensors")
    assert same(made, alone("rlhf", finished, model_folder, tmp_path / "alone"))


def test_the_ways_to_leave_a_stage_out_are_one(recipe_in, tmp_path):
    recipe = recipe_in(tmp_path)
    skipped = pipeline.load(recipe, skip=["enhance", "distill"])
    assert skipped.stages == ("cache", "sft", "rlhf")
    assert pipeline.load(recipe, ["enhance=none", "distill=none"]) == skipped
    assert pipeline.load(recipe_in(tmp_path, enhance=None, distill=None)) == skipped
    phase = pipeline.load(recipe_in(tmp_path), ["enhance.grpo=none"]).enhance
    assert phase.grpo is None and tuple(phase.phases) == ("cold_start",)


def test_a_finished_cache_in_place_of_clips(finished, recipe_in, model_folder, tmp_path, capsys):
    """All weights this time; ``sft_model`` is the base model with what training exported."""
    recipe = recipe_in(tmp_path, cache=None, sft__cache=str(finished / "cache"))
    skips = [word for name in ("rlhf", "enhance", "distill") for word in ("--skip", name)]
    assert run(recipe, *skips) == 0
    output = tmp_path / "run"
    assert not (output / "cache").exists()
    assert same(model_of(output, "sft"), weights(output / "sft/transformer"))
    assert not same(model_of(output, "sft"), weights(model_folder / "transformer"))
    facts = json.loads(capsys.readouterr().out)
    assert facts["rewriter"] is None and facts["models"].keys() == {"base", "sft"}
    for part in ("vae/config.json", "scheduler/scheduler_config.json", "reelforge.json", "text_encoder/config.json"):
        assert (output / "sft_model" / part).read_bytes() == (model_folder / part).read_bytes()


def test_the_pipeline_has_the_last_word_on_what_it_hands_on(finished, recipe_in, tmp_path):
    """A stage's recipe may be that of the verb alone, with paths of its own."""
    own = {
        "cache__model": "nowhere", "cache__output": "nowhere", "sft__model": "nowhere", "sft__output": "nowhere",
        "sft__cache": "nowhere",
    }  # fmt: skip
    recipe = recipe_in(tmp_path, sft__lora=LORA, **own)
    assert run(recipe, *(word for name in ("rlhf", "enhance", "distill") for word in ("--skip", name))) == 0
    assert same(model_of(tmp_path / "run", "sft"), model_of(finished, "sft"))


def test_a_rewriter_of_one_phase(recipe_in, tmp_path, capsys):
    recipe = recipe_in(tmp_path)
    skips = [word for name in ("cache", "sft", "rlhf", "distill") for word in ("--skip", name)]
    assert run(recipe, *skips, "--set", "enhance.grpo=none") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rewriter"] == str(tmp_path / "run/enhance/cold_start/rewriter") and Path(facts["rewriter"]).is_dir()
    assert facts["models"].keys() == {"base"}


# --- recipes ---


def test_tables_extend_the_recipes_of_the_verbs(finished, model_folder, clips_folder, language, tmp_path):
    """Relative to the pipeline's own file, wherever it is called from."""
    table = recipe_table(tmp_path, model_folder, clips_folder, language)
    (tmp_path / "verbs").mkdir()
    for name in STAGES:
        verb = table[name] | {"device": "auto"}
        (tmp_path / f"verbs/{name}.toml").write_text(tomli_w.dumps(verb))
        table[name] = {"extends": f"verbs/{name}.toml", "device": "cpu"}
    extended = tmp_path / "extended.toml"
    extended.write_text(tomli_w.dumps(table))
    plain = write(tmp_path, model_folder, clips_folder, language)
    assert pipeline.load(extended) == pipeline.load(plain)


WRONG = {
    "nothing to do": (dict.fromkeys(STAGES), "The pipeline has no stage.", "cache, sft, rlhf"),
    "a cache for nobody": ({"sft": None}, "[cache] and no [sft]", "Only fine-tuning reads a cache"),
    "no latents": ({"cache": None}, "[sft] and no latents", "set sft.cache"),
    "an unknown key": ({"sft__train__stepz": 3}, "Unknown key 'sft.train.stepz'", "Did you mean 'steps'"),
    "a stage that is no table": ({"rlhf": 3}, "Key 'rlhf' is 3", "It is a table"),
    "a missing key": ({"distill__prompts": None}, "Key 'distill.prompts' is missing", "Set it"),
    "a phase of nothing": ({"enhance__cold_start": None, "enhance__grpo": None}, "no phase", "cold_start, grpo"),
    "a model that is not there": ({"model": "nowhere"}, "nowhere is no folder", "diffusers' layout"),
    "a recipe that is not there": ({"sft__extends": "gone.toml"}, "gone.toml cannot be read", "Check the path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_one_sentence(recipe_in, tmp_path, capsys, case):
    changes, what, hint = WRONG[case]
    assert run(recipe_in(tmp_path, **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and what in said[0] and hint in said[1]
    assert not any((tmp_path / "run" / name).exists() for name in STAGES)


def test_a_stage_is_skipped_by_its_name(recipe_in, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(recipe_in(tmp_path), "--skip", "sftt")
    assert left.value.code == 2 and "invalid choice: 'sftt'" in capsys.readouterr().err


def test_python_may_run_it_too(finished, model_folder):
    """What a demo does: a config in hand, told what begins."""
    config, begun = pipeline.load(finished.parent / "recipe.toml"), []
    made = pipeline.Pipeline(config, begun.append).run()
    assert [line.partition(":")[0] for line in begun] == list(STAGES)
    assert list(made.models) == ["base", "sft", "rlhf", "distill"] and made.models["base"] == model_folder
    assert made.rewriter == finished / "enhance/grpo/rewriter" and made.seconds.keys() == set(STAGES)
    with pytest.raises(ConfigError, match="no stage"):
        pipeline.PipelineConfig(model_folder, finished)
    assert config.cache.video == config.cache.video.__class__(**VIDEO) and ODE["train"]["steps"] == 2


# --- what is not built upon ---

LONGER = {
    "train": {"steps": 1, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    "validation": {"clips": 4},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def compared(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned, aligned, fine-tuned for longer, judged."""
    root = tmp_path_factory.mktemp("compared")
    (root / "held_out.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    judge = {"prompts": str(root / "held_out.txt"), "voters": ["planted_scorers:Bright"], "samples": 1, "device": "cpu"}
    assert run(recipe_in(root, longer=LONGER, enhance=None, distill=None, judge=judge)) == 0
    return root / "run"


def test_fine_tuning_goes_on_for_rlhfs_seconds(compared):
    steps, seconds = training_time(compared / "sft/metrics.jsonl")
    done, _ = training_time(compared / "longer/metrics.jsonl")
    assert done == max(1, round(steps * training_time(compared / "rlhf/metrics.jsonl")[1] / seconds)) > 1
    assert not same(model_of(compared, "sft"), weights(compared / "longer_model/transformer"))


def test_fine_tuning_for_longer_starts_from_the_fine_tuned_model_and_nothing_from_it(compared, tmp_path):
    """Restarted by hand from the fine-tuned model it is the same; RLHF's model is none of it."""
    config = pipeline.load(compared.parent / "recipe.toml").longer
    done, _ = training_time(compared / "longer/metrics.jsonl")
    train = dataclasses.replace(config.train, steps=done)
    again = sft.run(
        dataclasses.replace(
            config, model=compared / "sft_model", cache=compared / "cache", output=tmp_path, train=train
        )
    )
    assert same(weights(again.weights), weights(compared / "longer_model/transformer"))
    record = json.loads((compared / "pipeline.json").read_text())
    assert list(record) == ["base", "cache", "sft", "rlhf", "longer"], "a report is no artefact"


def test_a_report_has_a_column_for_every_model(compared):
    found = results.read(compared / "judge/results.json")
    assert [stage.name for stage in found.stages] == ["base", "sft", "sft, longer", "rlhf"]
    references = {stage.name: [vote.reference for vote in stage.gsb] for stage in found.stages}
    assert references == {"base": [], "sft": ["base"], "sft, longer": ["sft"], "rlhf": ["sft", "sft, longer"]}
    assert [stage.steps for stage in found.stages][1::2] == [4, 4] and found.stages[0].steps is None


def test_requests_get_columns_of_the_models_that_are_served(finished, recipe_in, tmp_path):
    """With a rewriter each is asked twice; the student is compared with its teacher."""
    work = pipeline.Pipeline(pipeline.load(finished.parent / "recipe.toml"))
    work.models |= {name: finished / folder for name, folder in MODELS.items()}
    without = [column.name for column in work.columns(requests=False)]
    assert without == ["base", "sft", "rlhf", "student"]
    assert [column.name for column in work.columns(requests=True)][4:] == ["rlhf, raw request", "student, raw request"]
    work.rewriter = finished / "enhance/grpo/rewriter"
    asked = {column.name: (column.asked, column.against) for column in work.columns(requests=True)[4:]}
    assert asked == {
        "rlhf, raw request": ("requests", ()),
        "rlhf + PE": ("rewritten", ("rlhf, raw request",)),
        "student, raw request": ("requests", ("rlhf, raw request",)),
        "student + PE": ("rewritten", ("student, raw request", "rlhf + PE")),
    }


def test_a_finished_pipeline_is_judged_again_in_other_ways_and_nothing_else_is_done(compared, capsys):
    recipe, before = compared.parent / "recipe.toml", (compared / "pipeline.json").read_bytes()
    assert run(recipe, "--set", "judge.samples=2", "--set", "judge.voters=['planted_scorers:Dim']") == 0
    assert results.read(compared / "judge/results.json").clips == 6
    told = capsys.readouterr().err
    assert told.count("is finished") == 4 and "sft: 1/" not in told
    assert (compared / "pipeline.json").read_bytes() == before
    assert run(recipe, "--skip", "judge") == 0


def test_prompts_of_the_report_are_looked_for_before_anything_is_trained(recipe_in, tmp_path, capsys):
    judge = {"prompts": str(tmp_path / "gone.txt"), "voters": ["planted_scorers:Bright"]}
    assert run(recipe_in(tmp_path, judge=judge)) == 2
    assert "gone.txt" in capsys.readouterr().err and not (tmp_path / "run/cache").exists()


@pytest.mark.parametrize("without", ["sft", "rlhf"])
def test_longer_needs_what_it_is_longer_than(recipe_in, tmp_path, without, capsys):
    gone = {without: None, **({"cache": None} if without == "sft" else {})}
    assert run(recipe_in(tmp_path, longer=LONGER, **gone)) == 2
    assert "The pipeline has [longer]." in capsys.readouterr().err
