"""Pipelines of seconds: all five stages on a tiny model folder, tiny clips and a rewriter of a few thousand weights."""

from pathlib import Path

import tiny_distill
import tiny_enhance
import tiny_rlhf
import tomli_w

from reelforge.stages.cli import main

STAGES = ("cache", "sft", "rlhf", "enhance", "distill")
LORA = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v"]}
VIDEO = {"num_frames": 9, "height": 16, "width": 16, "fps": 16.0}
# What the pipeline fills in; the recipes here do not say it.
FILLED = {"model", "teacher", "output", "generator"}


def recipe_table(root: Path, model: Path, clips: Path, language: Path, /, **changes: object) -> dict:
    """A recipe to ``root/run``; ``changes`` are dotted keys with ``__`` for the dot, None takes one out."""
    root.mkdir(parents=True, exist_ok=True)
    loop = {"batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1, "checkpoint_every": 2}
    enhancer = tiny_enhance.recipe_table(
        root, language, model, cold_start__train__steps=4, grpo__train__steps=4, grpo__updates_per_rollout=1
    )
    recipe = {
        "model": str(model),
        "output": str(root / "run"),
        "cache": {"data": str(clips), "video": VIDEO, "device": "cpu"},
        "sft": {
            "train": loop | {"steps": 4},
            "optimizer": {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5},
            "validation": {"clips": 4},
            "device": "cpu",
        },
        "rlhf": tiny_rlhf.recipe_table(root, model, train__steps=4, train__checkpoint_every=2),
        "enhance": enhancer | {"grpo": _left(enhancer["grpo"])},
        "distill": tiny_distill.recipe_table(
            root,
            model,
            previews=1,
            causal_init=tiny_distill.ODE,
            causal_init__train__steps=3,
            self_forcing=tiny_distill.DMD,
        ),
    }
    recipe |= {name: _left(recipe[name]) for name in ("rlhf", "enhance", "distill")}
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        inner = recipe
        for parent in parents:
            inner[parent] = inner = dict(inner.get(parent, {}))
        if value is None:
            inner.pop(leaf)
        else:
            inner[leaf] = value
    return recipe


def _left(table: dict) -> dict:
    """What a user writes: without what the pipeline fills in."""
    return {name: value for name, value in table.items() if name not in FILLED}


def write(root: Path, *parts: Path, **changes: object) -> Path:
    """The recipe as a file; ``parts`` are model, clips and language model."""
    table = recipe_table(root, *parts, **changes)
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def run(recipe: Path, *arguments: str) -> int:
    """Exit status of the verb."""
    return main(["pipeline", str(recipe), *arguments])


def transformers(output: Path) -> dict[str, dict]:
    """Weights of every model folder that a pipeline left, and of its rewriter, by stage."""
    folders = {name: output / folder for name, folder in MODELS.items()}
    found = {name: tiny_rlhf.weights(folder / "transformer") for name, folder in folders.items() if folder.exists()}
    rewriter = output / "enhance/grpo/rewriter"
    return found | ({"enhance": tiny_enhance.rewriter_weights(rewriter)} if rewriter.exists() else {})


MODELS = {"sft": "sft_model", "rlhf": "rlhf_model", "distill": "distill/model"}
