"""GRPO on a set of prompts: rollouts, rewards, one optimizer step per iteration; full weights or a LoRA adapter."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reelforge.bench.rl_forecast import Forecast, memory, probe, work
from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import last_metrics
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir, check_same
from reelforge.engine.model.lora import save_adapter
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import save_transformer
from reelforge.engine.rl.origin import check_continued, check_ranks
from reelforge.engine.rl.recipe import RlhfConfig, decisive
from reelforge.engine.train.loop import Hooks, TrainLoop
from reelforge.stages.console import emit
from reelforge.stages.rlhf_parts import Parts, build, encode, sampling_defaults
from reelforge.stages.rlhf_watch import Watch

PRESETS = Path(__file__).resolve().parents[1] / "recipes" / "presets"


@dataclass(frozen=True)
class RlhfResult:
    """What a run left: averaged weights, optimizer steps, and the last lines of the metrics merged."""

    weights: Path
    steps: int
    metrics: dict[str, Any]


def run(config: RlhfConfig) -> RlhfResult:
    """Train, or continue, to the last step and write the averaged weights.

    Raises:
        Interrupted: a signal asked to stop; calling again continues.
        ConfigError, DataError, CheckpointError, StorageError, TrainingError: as named.
    """
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        check_same(config, config.output / "config.resolved.toml", decisive)
        weights = config.output / ("adapter" if config.lora else "transformer")
        if weights.exists():
            say(f"{config.output} is finished: {weights} is there.")
        else:
            _train(config, device, weights)
    return RlhfResult(weights, config.train.steps, last_metrics(RunDir(config.output).metrics))


def plan(config: RlhfConfig) -> dict[str, Any]:
    """Say what :func:`run` would do and cost, and return it; nothing is written."""
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        return _forecast(config, build(config, device)).facts()


def _train(config: RlhfConfig, device: torch.device, weights: Path) -> None:
    parts = build(config, device)
    check_ranks(parts.origin | {"recipe": identity(config)}, device)
    distributed.check_replicas(dict(parts.task.policy.model.named_parameters()))
    run_dir = _open(config, parts)
    encode(config, parts)
    state, task = parts.state, parts.task
    hooks, watch = Hooks(task.losses, describe=task.describe, stride=config.updates_per_rollout), None
    if parts.monitor:
        fps = sampling_defaults(config).video.fps
        watch = Watch(parts.monitor, state, run_dir, fps, lambda folder: _export(config, task.policy.model, folder))
        watch.begin(parts.origin)
        hooks = dataclasses.replace(hooks, at_checkpoint=watch.look, after_checkpoint=watch.check)
    loop = TrainLoop(state, config.train, run_dir, "-".join((identity(config), *parts.origin.values())), "rlhf")
    loop.resume()
    if watch:
        watch.check_again()
    loop.fit(hooks)
    if distributed.rank() == 0:
        with state.ema.applied():
            _export(config, task.policy.model, weights)
    distributed.barrier()


def identity(config: RlhfConfig) -> str:
    """Hash of what decides the weights."""
    return configuration.fingerprint(decisive(config))


def _open(config: RlhfConfig, parts: Parts) -> RunDir:
    """The run directory, with its plan; refuses one that was started from something else."""
    path = config.output / "plan.json"
    if path.exists():
        check_continued(json.loads(path.read_text(encoding="utf-8"))["origin"], parts.origin)
    facts = {"origin": parts.origin, **_forecast(config, parts).facts()}
    distributed.barrier()
    if distributed.rank() == 0:
        RunDir.open(config.output, config, identity(config))
        replace_file(path, json.dumps(facts, indent=1))
    distributed.barrier()
    return RunDir(config.output)


def _forecast(config: RlhfConfig, parts: Parts) -> Forecast:
    """Probe, count, and say it."""
    task, policy, monitor = parts.task, parts.task.policy, parts.monitor
    shape, ranks = task.sampler.shape, distributed.world_size()
    rows = min(config.rollout.batch_rows, config.rollout.batch_groups * config.plan.group_size)
    todo = work(
        task.planner, config.iterations, policy.branches, ranks, config.rollout.batch_groups,
        config.train.micro_batch_size,
    )  # fmt: skip
    rates = probe(policy, task.scoring.decode, shape, rows, round(todo.states_per_forward))
    size = memory(policy, parts.state.parameters.values(), todo, rates, shape)
    pulled = todo.busiest_states * policy.branches if config.loss.kl.weight else 0.0
    looks = 1 + -(-config.train.steps // config.train.checkpoint_every)
    watched = looks * monitor.clips * monitor.sampling.rows if monitor else 0
    found = Forecast(config.iterations, config.updates_per_rollout, ranks, todo, size, rates, pulled, watched)
    noise = config.rollout.noise
    name = f"{noise.kind}, eta {noise.eta:g}" + (f", cap {noise.cap:g}" if noise.kind == "trunc" else "")
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else "the CPU"
    for line in found.lines(name, config.rollout.num_steps, device):
        say(line)
    return found


def _export(config: RlhfConfig, model: WanTransformer, folder: Path) -> None:
    save_adapter(model, folder) if config.lora else save_transformer(model, folder)


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints where the weights are and the last measurements; with ``--plan``, the plan."""
    overlays = (PRESETS / f"{arguments.preset}.toml",) if arguments.preset else ()
    config = configuration.load(RlhfConfig, arguments.recipe, arguments.overrides, overlays)
    if arguments.plan:
        emit(json.dumps(plan(config)))
        return 0
    result = run(config)
    emit(json.dumps({"weights": str(result.weights), "steps": result.steps, **result.metrics}))
    return 0
