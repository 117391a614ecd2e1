"""Every recipe of the package runs as it is: only files, sizes, step counts and the scorers' folders are others here.

Weights are random and clips tiny; whatever else a recipe says (precision, checkpointing, guidance, adapters, losses,
optimizers) holds at this size too, so that none rots unseen.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("av")

import tomli_w
import torch
from tiny_rlhf import PROMPTS
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reelforge.bench.judge import results
from reelforge.bench.toy.requests import pair, request
from reelforge.bench.toy.world import scenes
from reelforge.engine.core import config as configuration
from reelforge.engine.core import rng
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.enhance.dialogue import SYSTEM
from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.stages import cache, demo
from reelforge.stages.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
PRESETS = RECIPES / "presets"
LANGUAGE = TinyLanguageModelConfig(hidden_size=32, layers=2, vocabulary=700, max_positions=640)
CAPTIONS = (
    "A red fox trots through fresh snow, its breath white in the cold. Tracking shot, soft light at dawn.",
    "A potter's hands shape a bowl on a spinning wheel. The camera slowly moves closer, warm light from a window.",
    "Two boats drift on a grey lake. A static wide shot in the morning fog, muted colours.",
)
# What is overridden ends in one of these: where files are, how large, how many, how long.
FREE = {
    "model", "data", "output", "cache", "prompts", "language_model", "pairs", "requests", "generator", "teacher",
    "student", "critic", "rewards", "scorers", "steps", "num_steps", "batch_size", "micro_batch_size", "count",
    "substeps", "clips", "voters", "samples", "num_frames", "height", "width", "min", "max_new_tokens", "sampling",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(model_folder: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What recipes name, by the word that stands for it in :data:`RUNS`."""
    root = tmp_path_factory.mktemp("files")
    known, drawn = scenes("train")[:12], rng.generator("recipes")
    lines = {
        "prompts": PROMPTS[:4],
        "held_out": PROMPTS[4:],
        "requests": [request(scene, "train", drawn) for scene in known],
        "pairs": [json.dumps(pair(scene, drawn)) for scene in known],
        "captions": [json.dumps({"caption": caption}) for caption in CAPTIONS],
    }
    for name, texts in lines.items():
        (root / name).write_text("\n".join(texts) + "\n")
    LanguageModel.create(LANGUAGE, [SYSTEM, *lines["pairs"], *CAPTIONS] * 8, 0, root / "language")
    return {name: root / name for name in (*lines, "language")} | {
        "model": model_folder,
        "clips": clips_folder,
        "clip": make_clip_model(root / "clip"),
    }


def make_clip_model(folder: Path) -> Path:
    """A random CLIP, which PickScore is one of, with a tokenizer of bytes."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {**size, **marks, "vocab_size": len(tokens), "max_position_embeddings": 48}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder


TINY_VIDEO = ["video.num_frames=9", "video.height=16", "video.width=16"]
SMALL = ["train.steps=2", "train.batch_size=4"]
CACHE = {
    "cache_miniature": ["data={clips}", "model={model}", "output={out}", *TINY_VIDEO],
    "cache_wan2.1_480p": [
        "data={clips}", "model={model}", "output={out}", *TINY_VIDEO, "filters.duration_s.min=0.1",
        "filters.height.min=8",
    ],
}  # fmt: skip
SFT = ["model={model}", "cache={latents}", "output={out}", *SMALL, "validation.clips=4"]
RLHF = ["model={model}", "prompts={prompts}", "output={out}", "held_out.prompts={held_out}"]
ENHANCE = [
    "language_model={language}", "output={out}", "cold_start.pairs={pairs}", "cold_start.train.steps=2",
    "grpo.requests={requests}", "grpo.generator={model}", "grpo.train.steps=2",
]  # fmt: skip
ENHANCE_WAN = [
    *ENHANCE, "cold_start.pairs={captions}", "cold_start.train.batch_size=4", "grpo.rewards=['clip={clip}']",
    "grpo.held_out.requests={requests}", "grpo.train.batch_size=2", "dialogue.max_new_tokens=128",
    "grpo.sampling=['video.num_frames=9', 'num_steps=4', 'batch_size=2']",
]  # fmt: skip
RLHF_WAN = [
    *RLHF, "rewards=['clip={clip}']", "held_out.scorers=['pick={clip}']", *TINY_VIDEO, "train.steps=2",
    "train.batch_size=2", "rollout.num_steps=6", "plan.steps=[0, 4]",
]  # fmt: skip
# Five steps of the critic and one of the student.
CYCLE = ["self_forcing.train.steps=6", "self_forcing.train.batch_size=2"]
DISTILL_WAN = [
    "teacher={model}", "student={model}", "critic={model}", "prompts={prompts}", "output={out}", "video.num_frames=33",
    "video.height=16", "video.width=16", "causal_init.pairs.count=3", "causal_init.pairs.substeps=2",
    "causal_init.train.steps=2", "causal_init.train.batch_size=2", *CYCLE,
]  # fmt: skip
JUDGE = ["prompts={held_out}", "requests={requests}", "rewards=['clip={clip}']", "voters=['pick={clip}']"]
VERBS = {
    **{name: ("cache", settings) for name, settings in CACHE.items()},
    "sft_miniature": ("sft", SFT),
    "sft_wan2.1_1.3b": ("sft", SFT),
    "rlhf_miniature": (
        "rlhf",
        [*RLHF, "held_out.scorers=['reelforge.bench.toy.scorer:ToyHeldOut={model}']", *SMALL],
    ),
    "rlhf_wan2.1_1.3b": ("rlhf", RLHF_WAN),
    "enhance_miniature": ("enhance", ENHANCE),
    "enhance_wan2.1": ("enhance", ENHANCE_WAN),
    "distill_miniature": (
        "distill",
        [
            "teacher={model}", "prompts={prompts}", "output={out}", "causal_init.pairs.count=8",
            "causal_init.train.steps=2", "causal_init.train.batch_size=4", "self_forcing.train.steps=3",
            "self_forcing.train.batch_size=4",
        ],
    ),
    "distill_wan2.1_1.3b": ("distill", DISTILL_WAN),
    "distill_wan2.1_1.3b_all": ("distill", DISTILL_WAN),
}  # fmt: skip
ELSEWHERE = {"demo": "test_demo.py parses it", "demo_quick": "test_demo.py runs it"}


def arguments(settings: list[str], places: dict[str, Path]) -> Iterator[str]:
    """The command line's words for overrides of what is free."""
    for setting in settings:
        key, _, value = setting.format(**places).partition("=")
        assert key.rpartition(".")[2] in FREE, f"{key} is the recipe's to say"
        yield from ("--set", f"{key}={value}")


def run(name: str, files: dict[str, Path], out: Path, *further: str) -> Path:
    verb, settings = VERBS[name]
    words = arguments(settings, files | {"out": out})
    assert main([verb, str(RECIPES / f"{name}.toml"), *words, *further]) == 0
    return out


@pytest.fixture(scope="module")
def latents(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that Wan's recipe makes."""
    return run("cache_wan2.1_480p", files, tmp_path_factory.mktemp("cache") / "latents")


def check_metrics(root: Path) -> int:
    """Every number is finite and nothing was skipped; returns the last step."""
    lines = [line for line in read_jsonl(root / "metrics.jsonl") if "step_s" in line]
    assert lines and all(line["skipped"] == 0 for line in lines)
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, int | float)]
        assert all(map(math.isfinite, numbers)), line
    return lines[-1]["step"]


def check_loops(root: Path, verb: str) -> None:
    """Each loop of a verb went through its two steps, or one cycle of critic and student."""
    loops = {
        "sft": [""], "rlhf": [""], "enhance": ["cold_start", "grpo"], "distill": ["causal_init", "self_forcing"],
    }[verb]  # fmt: skip
    for loop in loops:
        steps = check_metrics(root / loop)
        assert steps == 2 or (loop == "self_forcing" and steps in (3, 6)), loop


@pytest.mark.parametrize("name", [name for name, (verb, _) in VERBS.items() if verb != "cache"])
def test_a_recipe_trains_two_steps(files, latents, tmp_path, name):
    out = run(name, files | {"latents": latents}, tmp_path / "run")
    check_loops(out, VERBS[name][0])


@pytest.mark.parametrize("name", CACHE)
def test_a_recipe_makes_a_cache(files, tmp_path, name):
    clips = cache.LatentCache.open(run(name, files, tmp_path / "latents"))
    assert len(clips) >= 16 and clips.latents([0]).shape == (1, 16, 3, 4, 4)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_trains_two_steps_on_wans_recipe(files, tmp_path, preset):
    check_loops(run("rlhf_wan2.1_1.3b", files, tmp_path / "run", "--preset", preset), "rlhf")


def test_the_pipelines_recipe_runs_all_stages(files, tmp_path, capsys):
    """With the overrides of each stage's own recipe, and none of what is handed from stage to stage."""
    stages = {"cache": CACHE["cache_wan2.1_480p"], "sft": SFT, "rlhf": RLHF_WAN, "enhance": ENHANCE_WAN,
              "longer": SFT, "distill": DISTILL_WAN, "judge": JUDGE}  # fmt: skip
    handed = {"model", "output", "cache", "grpo.generator", "teacher", "student", "critic"}
    settings = [f"{name}.{each}" for name, part in stages.items() for each in part if each.split("=")[0] not in handed]
    words = arguments(["model={model}", "output={out}", *settings], files | {"out": tmp_path / "run"})
    assert main(["pipeline", str(RECIPES / "pipeline_wan2.1_1.3b.toml"), *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["models"].keys() == {"base", "sft", "rlhf", "longer", "distill"} and Path(facts["rewriter"]).is_dir()
    for name in ("sft", "rlhf", "enhance", "distill"):
        check_loops(tmp_path / "run" / name, name)
    assert check_metrics(tmp_path / "run/longer") >= 1
    judged = results.read(tmp_path / "run/judge/results.json")
    assert [stage.name for stage in judged.stages] == [
        "base", "sft", "sft, longer", "rlhf", "student", "rlhf, raw request", "rlhf + PE", "student, raw request",
        "student + PE",
    ]  # fmt: skip
    assert load_generation_defaults(facts["models"]["distill"]).denoising_steps == (1000.0, 750.0, 500.0, 250.0)


def test_the_pipelines_recipe_is_that_of_the_verbs():
    """Nothing but data and prompts differs from the stage's own recipe; the student starts from the aligned model."""
    read = configuration.read_table
    stages = read(RECIPES / "pipeline_wan2.1_1.3b.toml")
    own = {"cache": "cache_wan2.1_480p", "sft": "sft_wan2.1_1.3b", "rlhf": "rlhf_wan2.1_1.3b",
           "longer": "sft_wan2.1_1.3b", "enhance": "enhance_wan2.1", "distill": "distill_wan2.1_1.3b_all"}  # fmt: skip
    differ = {
        stage: {key for key, value in read(RECIPES / f"{name}.toml").items() if stages[stage][key] != value}
        for stage, name in own.items()
    }
    assert differ["distill"] == {"student", "critic"}
    assert stages["distill"]["student"] == stages["distill"]["critic"] == "none"
    assert not any(keys for stage, keys in differ.items() if stage != "distill")


def test_the_judges_recipe_compares_what_it_says(files, tmp_path, capsys):
    """Its columns' folders alone are others here, and the scorers'."""
    adapter = run("rlhf_wan2.1_1.3b", files, tmp_path / "rlhf") / "adapter"
    table = configuration.read_table(RECIPES / "judge_wan2.1_1.3b.toml")
    for column in table["columns"]:
        column["model"] = str(files["model"])
    table["columns"][-1] |= {"adapter": str(adapter), "metrics": [str(adapter.parent / "metrics.jsonl")]}
    (tmp_path / "judge.toml").write_text(tomli_w.dumps(table))
    words = arguments(["output={out}", *(each for each in JUDGE if "requests" not in each)], files | {"out": tmp_path})
    assert main(["judge", str(tmp_path / "judge.toml"), *words]) == 0
    base, guided, aligned = results.read(tmp_path / "results.json").stages
    assert guided.nfe == 2 * base.nfe == 2 * aligned.nfe and aligned.steps == 2
    assert [vote.reference for vote in (*guided.gsb, *aligned.gsb)] == ["base", "base"]


def test_the_demos_recipes_are_whole():
    for quick in (False, True):
        config = demo.load_config(quick, ["seed=3"])
        assert config.seed == 3 and config.enhance.phases.keys() == {"cold_start", "grpo"}


def test_no_recipe_is_left_out():
    """A new recipe needs a test that runs it."""
    several = {"pipeline_wan2.1_1.3b", "judge_wan2.1_1.3b"}
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*VERBS, *several, *ELSEWHERE}
