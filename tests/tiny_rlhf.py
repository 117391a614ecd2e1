"""RLHF runs of seconds on a tiny model folder, and what they left."""

from pathlib import Path

import torch

from reelforge.engine.core import config as configuration
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.io import checkpoint
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.rl.recipe import RlhfConfig

PROMPTS = [
    "a red circle moving left",
    "a blue square moving right",
    "a green circle moving upwards",
    "a yellow triangle moving downwards",
    "a cyan square moving left",
    "a red triangle moving right",
]
TOY_REWARDS = "reelforge.bench.toy.verifiers:ToyVerifier"


def recipe_table(root: Path, model: Path, **changes: object) -> dict:
    """A recipe whose run goes to ``root/run``; ``changes`` are dotted keys with ``__`` for the dot."""
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe = {
        "model": str(model),
        "prompts": str(root / "prompts.txt"),
        "output": str(root / "run"),
        "rewards": ["planted_scorers:Bright"],
        "plan": {"group_size": 4, "steps": [0, 2]},
        "rollout": {"num_steps": 4, "batch_groups": 2, "batch_rows": 8},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5},
        "device": "cpu",
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        inner = recipe
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return recipe


def config_of(root: Path, model: Path, **changes: object) -> RlhfConfig:
    return configuration.build(RlhfConfig, recipe_table(root, model, **changes))


def watched(root: Path, **changes: object) -> dict:
    """A ``[held_out]`` table of six clips."""
    (root / "held_out.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    return {"prompts": str(root / "held_out.txt"), "samples": 2, "batch_size": 4, "previews": 2, **changes}


def lines(output: Path, key: str = "loss") -> list[dict]:
    """The metrics lines that have a key."""
    return [line for line in read_jsonl(output / "metrics.jsonl") if key in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_transformer(folder).state_dict()


def newest(output: Path) -> checkpoint.Checkpoint:
    path = checkpoint.latest(output / "checkpoints", lambda path, error: None)
    assert path is not None
    return checkpoint.load(path)
