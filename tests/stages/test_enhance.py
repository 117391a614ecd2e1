"""The prompt enhancer's stage as a user runs it: recipes in, one sentence or a rewriter's folder out."""

import json
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tiny_enhance import (
    PAIRS,
    REQUESTS,
    WORDS,
    config_of,
    make_taught_model,
    measured,
    recipe_table,
    rewriter_weights,
    same_weights,
)
from tiny_model import TINY_TRANSFORMER
from tiny_rlhf import lines, newest
from transformers import AutoModelForCausalLM, AutoTokenizer

from reelforge.engine.core import config as configuration
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.enhance.rewriter import load_rewriter
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import save_transformer
from reelforge.stages import enhance
from reelforge.stages.cli import main
from reelforge.stages.enhance_config import EnhanceConfig, decisive

RECIPES = Path(__file__).parents[2] / "recipes"
ALWAYS = {"step", "loss", "grad_norm", "skipped", "lr", "step_s"}
UPDATE = ALWAYS | {"ratio", "kl_reference", "clipped_low", "clipped_high", "train_s"}
ROLLOUT = UPDATE | {
    "reward", "within_group", "rho", "zero_std_share", "missing_share", "counted_share", "correlation", "original",
    "malformed", "cut", "copied", "distinct", "answer_tokens", "structure_parts", "example", "write_s", "film_s",
    "rollout_s", "sampling_gap",
}  # fmt: skip
WATCHED = ["a cyan circle, up", "box yellow east"]
BRIGHT = {"grpo__rewards": ["planted_scorers:Bright"]}


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def chain(language, model_folder, tmp_path_factory) -> Path:
    """A finished run of both phases, with a look at held-out requests; its recipe lies beside it."""
    root = tmp_path_factory.mktemp("chain")
    recipe_file(root, language, model_folder, grpo__held_out=watched(root))
    assert main(["enhance", str(root / "recipe.toml")]) == 0
    return root / "run"


def watched(root: Path) -> dict:
    (root / "held_out.txt").write_text("\n".join(WATCHED) + "\n")
    return {"requests": str(root / "held_out.txt"), "draws": 2}


def recipe_file(root: Path, language: Path, model: Path, **changes: object) -> str:
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, language, model, **changes)))
    return str(path)


# --- what a run leaves ---


def test_the_chain_leaves_a_run_directory_for_each_phase(chain, language):
    before = language
    for name, steps in {"cold_start": 5, "grpo": 6}.items():
        root = chain / name
        assert {"config.resolved.toml", "run.json", "metrics.jsonl", "rewriter"} <= {p.name for p in root.iterdir()}
        saved, after, old = newest(root), rewriter_weights(root / "rewriter"), rewriter_weights(before)
        assert saved.step == steps and saved.groups["ema"].keys() == after.keys() == old.keys()
        assert all(torch.equal(saved.groups["ema"][key], value) for key, value in after.items())
        assert all(not torch.equal(old[key], value) for key, value in after.items())
        before = root / "rewriter"
    assert [set(line) for line in lines(chain / "cold_start", "step")] == [ALWAYS] * 5
    found = [line for line in lines(chain / "grpo") if "held_out" not in line]
    assert [set(line) for line in found] == [ROLLOUT, UPDATE] * 3
    assert all(line["ratio"] == 1 and line["sampling_gap"] < 1e-5 for line in found[::2])
    assert all(line["ratio"] != 1 for line in found[1::2])
    assert {path.name for path in chain.iterdir()} == {
        "config.resolved.toml", "run.json", "origin.json", "cold_start", "grpo"
    }  # fmt: skip


def test_held_out_requests_are_looked_at_when_the_run_is_saved(chain):
    """After steps 4 and 6: between iterations, and at the end."""
    found = lines(chain / "grpo", "held_out")
    assert [line["step"] for line in found] == [4, 6]
    assert all(line["held_out"].keys() == line["held_out_raw"].keys() == {"vq", "mq", "ta"} for line in found)
    assert found[0]["held_out_raw"] == found[1]["held_out_raw"] and found[0]["held_out"] != found[0]["held_out_raw"]
    shown = sorted(path.relative_to(chain / "grpo/samples").as_posix() for path in chain.glob("grpo/samples/*/*"))
    assert shown == [f"step-0000000{step}/rewrites.jsonl" for step in (4, 6)]
    last = list(read_jsonl(chain / "grpo/samples/step-00000006/rewrites.jsonl"))
    assert last == [vars(made) for made in load_rewriter(chain / "grpo/rewriter")(WATCHED)]


def test_the_rewriter_loads_in_plain_transformers(chain):
    """And answers there as it does here."""
    folder = chain / "grpo/rewriter"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": REQUESTS[0]}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked + "<think>", add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True)
    (made,) = load_rewriter(folder)([REQUESTS[0]])
    assert made.kept == "" and text.endswith(f"</think> <answer>{made.prompt}</answer>")


def test_a_finished_run_is_told_and_not_repeated(chain, capsys):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}
    assert main(["enhance", str(chain.parent / "recipe.toml")]) == 0
    told = capsys.readouterr()
    assert "is finished" in told.err
    facts = json.loads(told.out)
    assert facts.keys() == {"rewriter", "seconds", "cold_start", "grpo"} and facts["rewriter"] == str(
        chain / "grpo/rewriter"
    )
    assert facts["grpo"].keys() == ROLLOUT | {"held_out", "held_out_raw"} and facts["grpo"]["step"] == 6
    assert before == {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}


def test_a_look_changes_nothing(chain, language, model_folder, tmp_path):
    """Nor does being looked at less often, or reporting less."""
    config = config_of(tmp_path, language, model_folder, grpo__train__checkpoint_every=100, grpo__train__log_every=2)
    result = enhance.run(config)
    assert same_weights(result.rewriter, chain / "grpo/rewriter") and not (config.output / "grpo/samples").exists()
    assert result.seconds.keys() == {"cold_start", "grpo"} and min(result.seconds.values()) > 0
    assert result.metrics["grpo"]["example"] == lines(chain / "grpo", "example")[-1]["example"]


def test_each_phase_alone(chain, language, model_folder, tmp_path):
    """Ends where the chain was at that point."""
    first = config_of(tmp_path / "first", language, model_folder, grpo=None)
    assert enhance.run(first).rewriter == first.output / "cold_start/rewriter"
    assert same_weights(first.output / "cold_start/rewriter", chain / "cold_start/rewriter")
    second = config_of(tmp_path / "second", first.output / "cold_start/rewriter", model_folder, cold_start=None)
    assert same_weights(enhance.run(second).rewriter, chain / "grpo/rewriter")
    assert not (second.output / "cold_start").exists()
    told = [measured(root / "grpo") for root in (second.output, chain)]
    assert told[0] == [line for line in told[1] if "held_out" not in line]


def test_help_names_the_verb(capsys):
    with pytest.raises(SystemExit) as left:
        main(["enhance", "--help"])
    assert left.value.code == 0 and "rewriter of prompts" in capsys.readouterr().out


# --- a cheaper generator in the real one's place ---


@pytest.fixture(scope="module")
def stranger(model_folder, tmp_path_factory) -> Path:
    """A generator of another mind."""
    root = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(model_folder, root)
    model = WanTransformer.from_config(TINY_TRANSFORMER, seed=9)
    model.proj_out.weight.data.normal_(0, 1.0, generator=torch.Generator().manual_seed(9))
    shutil.rmtree(root / "transformer")
    save_transformer(model, root / "transformer")
    return root


def test_a_proxy_that_is_the_generator_ranks_as_it_does(language, model_folder, tmp_path, capsys):
    """And trains what the generator trains."""
    same = tmp_path / "same"
    shutil.copytree(model_folder, same)
    direct, by_proxy = (
        config_of(tmp_path / name, language, model_folder, cold_start=None, **BRIGHT, **changes)
        for name, changes in {
            "direct": {}, "proxy": {"grpo__proxy": {"model": str(same), "requests": 50, "min_correlation": 0.99}}
        }.items()
    )  # fmt: skip
    ours, theirs = enhance.run(by_proxy).rewriter, enhance.run(direct).rewriter
    assert (
        "The proxy ranks 5 videos as the generator does with a Spearman correlation of 1.00." in capsys.readouterr().err
    )
    assert same_weights(ours, theirs)


def test_a_proxy_that_ranks_otherwise_is_refused(language, model_folder, stranger, tmp_path, capsys):
    """What was trained before it stays, and is named; a lower bar continues the run."""
    changes = {**BRIGHT, "grpo__proxy": {"model": str(stranger), "min_correlation": 0.97}}
    recipe = recipe_file(tmp_path, language, model_folder, **changes)
    assert main(["enhance", recipe]) == 2
    what, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert f"The proxy {stranger} ranks videos otherwise than {model_folder}: Spearman " in what
    assert "0.97 is asked for" in what and str(tmp_path / "run/cold_start/rewriter") in hint
    assert not (tmp_path / "run/grpo/checkpoints").exists()
    before = (tmp_path / "run/cold_start/rewriter/model.safetensors").stat().st_mtime_ns
    assert main(["enhance", recipe, "--set", "grpo.proxy.min_correlation=-1.0"]) == 0
    assert (tmp_path / "run/cold_start/rewriter/model.safetensors").stat().st_mtime_ns == before


# --- a rewriter at work ---


def test_requests_to_a_rewriter_are_json_lines(chain, capsys):
    folder, asked = chain / "grpo/rewriter", [REQUESTS[0], "  ", "é " * 151, REQUESTS[2]]
    assert main(["enhance", str(folder), *(word for request in asked for word in ("--prompt", request))]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["request"] for line in found] == asked and all(
        set(line) == {"request", "prompt", "kept"} for line in found
    )
    assert found[1]["kept"] == "the prompt is empty" and found[1]["prompt"] == "  "
    assert "151 words" in found[2]["kept"] and found[2]["prompt"] == asked[2]
    assert found == [vars(made) for made in load_rewriter(folder)(asked)]


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["{rewriter}"], "is a rewriter and there is no request", "--prompt"),
        (["{rewriter}", "--prompt", "x", "--set", "a=1"], "--set belongs to a recipe", "Leave it out"),
        (["{recipe}", "--prompt", "x"], "--prompt asks a trained rewriter", "in place of"),
        (["{run}", "--prompt", "x"], "run does not load", "causal language model"),
        (["nowhere.toml"], "Recipe nowhere.toml cannot be read", "Check the path"),
        (["nowhere/rewriter", "--prompt", "x"], "--prompt asks a trained rewriter", "in place of nowhere/rewriter"),
    ],
)  # fmt: skip
def test_a_verb_that_is_used_otherwise(chain, capsys, arguments, what, hint):
    names = {"rewriter": chain / "grpo/rewriter", "run": chain, "recipe": chain.parent / "recipe.toml"}
    assert main(["enhance", *(argument.format(**names) for argument in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and what in said[0] and hint in said[1]


# --- recipes ---


@pytest.mark.parametrize("path", sorted(RECIPES.glob("enhance_*.toml")), ids=lambda path: path.stem)
def test_recipes_are_whole(path):
    config = configuration.load(EnhanceConfig, path)
    assert config.phases and set(config.phases) <= {"cold_start", "grpo"}
    assert decisive(config) == decisive(decisive(config)) != config
    assert configuration.build(EnhanceConfig, configuration.to_table(config)) == config


def test_what_was_taught_is_said(chain):
    """The tests above stand on a model that learnt its six pairs."""
    made = load_rewriter(chain / "cold_start/rewriter")([request for request, _, _ in PAIRS])
    assert sum(not each.kept for each in made) >= 5 and WORDS["max_new_tokens"] == 40
