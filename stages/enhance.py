"""``reelforge enhance``: trains a rewriter of prompts from pairs and rewards, and puts requests to a trained one."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import phase_facts
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir, check_same
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.rewriter import load_rewriter, save_rewriter
from reelforge.engine.rl.origin import check_continued, check_ranks
from reelforge.engine.train.loop import Hooks, TrainLoop
from reelforge.engine.train.state import TrainState
from reelforge.stages.console import emit
from reelforge.stages.enhance_config import EnhanceConfig, decisive
from reelforge.stages.enhance_parts import Work, build, check, origin


@dataclass(frozen=True)
class EnhanceResult:
    """What a run left.

    Attributes:
        rewriter: its folder.
        seconds: of training, by phase.
        metrics: the last lines of each phase's metrics, merged.
    """

    rewriter: Path
    seconds: dict[str, float]
    metrics: dict[str, dict[str, Any]]


def run(config: EnhanceConfig) -> EnhanceResult:
    """Run, or continue, every phase, and write the rewriter's folder.

    Raises:
        Interrupted: a signal asked to stop; calling again continues.
        ConfigError, DataError, CheckpointError, StorageError, TrainingError: as named.
    """
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        check_same(config, config.output / "config.resolved.toml", decisive)
        rewriter = config.output / list(config.phases)[-1] / "rewriter"
        if rewriter.exists():
            say(f"{config.output} is finished: {rewriter} is there.")
        else:
            _run(config, device)
    return EnhanceResult(rewriter, *phase_facts(config.output, config.phases))


def _run(config: EnhanceConfig, device: torch.device) -> None:
    started = origin(config)
    path = config.output / "origin.json"
    if path.exists():
        check_continued(json.loads(path.read_text(encoding="utf-8")), started)
    identity = configuration.fingerprint(decisive(config))
    check_ranks(started | {"recipe": identity}, device)
    check(config, device)
    distributed.barrier()
    if distributed.rank() == 0:
        RunDir.open(config.output, config, identity)
        replace_file(path, json.dumps(started, indent=1))
    distributed.barrier()
    before = config.language_model
    for name in config.phases:
        folder = config.output / name / "rewriter"
        if not folder.exists():
            _train(config, name, before, "-".join((identity, *started.values())), device)
        before = folder


def _train(config: EnhanceConfig, name: str, before: Path, identity: str, device: torch.device) -> None:
    root, phase = config.output / name, config.phases[name]
    language = LanguageModel.load(before, device=device)
    work: Work = build(config, name, language, root)
    parameters = dict(language.model.named_parameters())
    state = TrainState(parameters, phase.optimizer, phase.train.steps, work.carried)
    if distributed.rank() == 0:
        RunDir.open(root, phase, identity)
    distributed.barrier()
    loop = TrainLoop(state, phase.train, RunDir(root), identity, name)
    loop.resume()
    work.before(state)
    loop.fit(Hooks(work.losses, lambda step: work.look(state, step), work.describe, stride=work.stride))
    if distributed.rank() == 0:
        with state.ema.applied():
            save_rewriter(language, config.dialogue, root / "rewriter")
    distributed.barrier()


def main(arguments: argparse.Namespace) -> int:
    """The verb: trains by a recipe and prints where the rewriter is; with a rewriter's folder, prints rewrites."""
    if arguments.recipe.is_dir():
        return _answer(arguments.recipe, arguments.prompt, arguments.overrides)
    if arguments.prompt:
        raise ConfigError("--prompt asks a trained rewriter.", f"Give its folder in place of {arguments.recipe}.")
    result = run(configuration.load(EnhanceConfig, arguments.recipe, arguments.overrides))
    emit(json.dumps({"rewriter": str(result.rewriter), "seconds": result.seconds, **result.metrics}))
    return 0


def _answer(folder: Path, requests: Sequence[str], overrides: Sequence[str]) -> int:
    if not requests:
        raise ConfigError(f"{folder} is a rewriter and there is no request.", 'Add --prompt "...".')
    if overrides:
        raise ConfigError("--set belongs to a recipe.", "Leave it out.")
    device = distributed.pick_device("auto")
    for made in load_rewriter(folder, device=device)(requests):
        emit(json.dumps({"request": made.request, "prompt": made.prompt, "kept": made.kept}, ensure_ascii=False))
    return 0
