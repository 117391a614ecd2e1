"""Distillation runs of seconds on a tiny model folder."""

import dataclasses
from pathlib import Path

from tiny_rlhf import PROMPTS

from reelforge.engine.core import config as configuration
from reelforge.engine.model.folder import ModelFolder, derive_model_folder
from reelforge.stages.distill_config import DistillConfig

LOOP = {"batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
OPTIMIZER = {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5}
DMD = {
    "dmd": {"teacher_guidance": 2.0, "critic_steps": 2},
    "train": {"steps": 6, **LOOP},
    "optimizer": OPTIMIZER,
    "critic_optimizer": OPTIMIZER | {"ema_decay": 0.0},
}
ODE = {
    "pairs": {"count": 10, "substeps": 2, "batch_size": 4},
    "train": {"steps": 2, **LOOP},
    "optimizer": OPTIMIZER,
}
CONSISTENCY = ODE | {"init": {"method": "consistency", "levels": 4}}
TEACHER_FORCING = ODE | {"init": {"method": "teacher_forcing"}}


def make_teacher(model: Path, root: Path) -> Path:
    """``model`` with guidance, a negative prompt and three steps."""
    folder = ModelFolder.load(model)
    defaults = dataclasses.replace(folder.defaults, guidance_scale=2.0, negative_prompt="dark", num_steps=3)
    derive_model_folder(model, root, folder.transformer, defaults)
    return root


def recipe_table(root: Path, model: Path, **changes: object) -> dict:
    """A recipe whose run goes to ``root/run``; ``changes`` are dotted keys with ``__`` for the dot."""
    root.mkdir(exist_ok=True)
    prompts = root / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    recipe = {
        "teacher": str(model),
        "prompts": str(prompts),
        "output": str(root / "run"),
        "chunk_frames": 1,
        "denoising_steps": [1000.0, 500.0],
        "previews": 2,
        "device": "cpu",
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        inner = recipe
        for parent in parents:
            inner[parent] = inner = dict(inner.get(parent, {}))
        inner[leaf] = value
    return recipe


def config_of(root: Path, model: Path, **changes: object) -> DistillConfig:
    return configuration.build(DistillConfig, recipe_table(root, model, **changes))
