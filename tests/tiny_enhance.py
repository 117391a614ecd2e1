"""Rewriters of a few thousand weights: a language model's folder, pairs, requests, and recipes that take seconds."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_rlhf import TOY_REWARDS, lines
from torch import Tensor

from reelforge.engine.core import config as configuration
from reelforge.engine.enhance.dialogue import Dialogue, DialogueConfig
from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig
from reelforge.engine.enhance.pairs import Pair
from reelforge.engine.rl.cold_start import ColdStartTask
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig, TrainState
from reelforge.stages.enhance_config import EnhanceConfig

PAIRS = [
    ("ball, red, west", "red circle left", "a red circle moving slowly to the left on black"),
    ("blue box east", "blue square right", "a blue square moving quickly to the right on grey"),
    ("a green dot that goes up", "green circle up", "a green circle moving upwards on a navy background"),
    ("yellow wedge, down", "yellow triangle down", "a yellow triangle moving slowly downwards on black"),
    ("cyan block west, fast", "cyan square left fast", "a cyan square moving quickly to the left on grey"),
    ("red pyramid east", "red triangle right", "a red triangle moving to the right on a navy background"),
]
REQUESTS = ["a red ball going left", "blue square, right", "green dot up", "a yellow triangle", "cyan box left"]
SAME = [
    ["circle", "ball", "dot"], ["square", "box", "block"], ["triangle", "wedge", "pyramid"], ["left", "west"],
    ["right", "east"], ["up", "upwards"], ["down", "downwards"], ["fast", "quickly"],
]  # fmt: skip
WORDS = {"system": "", "turn": "{request}", "max_new_tokens": 40}
SHAPE = TinyLanguageModelConfig(hidden_size=32, layers=2, vocabulary=360, max_positions=160)
TIMES = {"step_s", "write_s", "film_s", "rollout_s", "train_s"}  # what no two runs have in common


def make_language_model(folder: Path, seed: int = 0) -> Path:
    """An untrained one."""
    LanguageModel.create(SHAPE, [text for pair in PAIRS for text in pair], seed, folder)
    return folder


def make_taught_model(folder: Path, steps: int = 80) -> Path:
    """One that answers in form, most of the time."""
    language = LanguageModel.create(SHAPE, [text for pair in PAIRS for text in pair], 0, folder)
    train = LoopConfig(steps=steps, batch_size=6, micro_batch_size=6, precision="fp32")
    task = ColdStartTask(language, dialogue_of(language), tiny_pairs(), train)
    state = TrainState(
        dict(language.model.named_parameters()), OptimizerConfig(lr=1e-2, warmup_steps=5, ema_decay=0.0), steps
    )
    for step in range(steps):
        state.optimizer_step(task.losses(step))
    language.save(folder)
    return folder


def tiny_pairs() -> list[Pair]:
    return [Pair(request, caption, thought) for request, thought, caption in PAIRS]


def dialogue_of(language: LanguageModel, **changes: object) -> Dialogue:
    return Dialogue(DialogueConfig(**(WORDS | changes)), language.tokenizer)


def write_pairs(path: Path) -> Path:
    records = [dict(zip(("request", "thought", "caption"), pair, strict=True)) for pair in PAIRS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recipe_table(root: Path, language: Path, model: Path, **changes: object) -> dict:
    """Both phases, to ``root/run``; ``changes`` are dotted keys with ``__`` for the dot, None takes one out."""
    root.mkdir(parents=True, exist_ok=True)
    write_pairs(root / "pairs.jsonl")
    (root / "requests.txt").write_text("\n".join(REQUESTS) + "\n")
    train = {"batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 3}
    optimizer = {"warmup_steps": 1, "ema_decay": 0.5}
    recipe = {
        "language_model": str(language),
        "output": str(root / "run"),
        "device": "cpu",
        "dialogue": dict(WORDS),
        "structure": {"words": [6, 12], "words_limit": [2, 24], "same": SAME},
        "cold_start": {
            "pairs": str(root / "pairs.jsonl"),
            "train": train | {"steps": 5},
            "optimizer": optimizer | {"lr": 3e-3},
        },
        "grpo": {
            "requests": str(root / "requests.txt"),
            "generator": str(model),
            "rewards": [TOY_REWARDS],
            "sampling": ["batch_size=8"],
            "scoring": {"missing_limit": 0.3},
            "groups": {"group_size": 3},
            "updates_per_rollout": 2,
            "train": train | {"steps": 6, "batch_size": 2, "keep_last": 5},
            "optimizer": optimizer | {"lr": 1e-3},
        },
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        inner = recipe
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is None:
            inner.pop(leaf)
        else:
            inner[leaf] = value
    return recipe


def config_of(root: Path, language: Path, model: Path, **changes: object) -> EnhanceConfig:
    return configuration.build(EnhanceConfig, recipe_table(root, language, model, **changes))


def rewriter_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(ours: Path, theirs: Path) -> bool:
    mine, other = rewriter_weights(ours), rewriter_weights(theirs)
    return mine.keys() == other.keys() and all(torch.equal(mine[name], value) for name, value in other.items())


def measured(root: Path) -> list[dict]:
    """A phase's metrics without its times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(root, "step")]
