"""The training loop: guards, checkpoints, progress, exact resume.

Data and noise are functions of the step, so weights, Adam moments, the average and a few counters are all there is
to store: a run stopped and continued equals the uninterrupted one bit for bit on a CPU.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    StorageError,
    TrainingError,
)
from reelforge.engine.core.interrupt import StopRequest, stop_on_signals
from reelforge.engine.core.metrics import JsonlLog
from reelforge.engine.core.progress import say, track
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.io import checkpoint
from reelforge.engine.train.state import OptimizerConfig

_STREAK = ("skipped", "longest_skip", "bad_loss", "bad_grad_norm")  # of what a meter tells; the rest are means


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often.

    Attributes:
        steps: optimizer steps in all.
        batch_size: clips per step, over all ranks; under RLHF, prompts.
        micro_batch_size: clips (states) per training forward; lower it when memory runs out, the result stays the same.
        precision: ``bf16`` runs the forward under autocast; weights and optimizer are fp32 either way.
        seed: names every draw of the run.
        log_every: steps per line of metrics.jsonl.
        checkpoint_every: steps between checkpoints; validation and previews happen there.
        keep_last: checkpoints kept.
    """

    steps: int = 2000
    batch_size: int = 32
    micro_batch_size: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    keep_last: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "log_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop.

    Attributes:
        losses: the micro-batch losses of a step on this rank (see :meth:`TrainState.optimizer_step`).
        at_checkpoint: measurements before a regular checkpoint (validation, previews); goes into metrics.jsonl.
        describe: more fields for the metrics line of a range of steps.
        after_checkpoint: told what ``at_checkpoint`` measured, once that is written and the checkpoint is saved;
            raise from it to end the run.
        stride: steps that belong together; the run is saved and stopped between them only, and a checkpoint that falls
            due among them waits for the last.
    """

    losses: Callable[[int], Iterable[Tensor]]
    at_checkpoint: Callable[[int], dict[str, Any]] = lambda step: {}
    describe: Callable[[range], dict[str, Any]] = lambda steps: {}
    after_checkpoint: Callable[[dict[str, Any]], None] = lambda measured: None
    stride: int = 1


class Meter(Protocol):
    """What happened since the last metrics line."""

    def read(self) -> dict[str, float]: ...

    def reset(self) -> None: ...


class Trained(Protocol):
    """What the loop drives: a :class:`TrainState`, or several that train in turn."""

    @property
    def step(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def config(self) -> OptimizerConfig: ...

    @property
    def meter(self) -> Meter: ...

    @property
    def parameters(self) -> dict[str, nn.Parameter]: ...

    def rates(self) -> dict[str, float]: ...

    def optimizer_step(self, losses: Iterable[Tensor]) -> None: ...

    def groups(self) -> dict[str, dict[str, Tensor]]: ...

    def restore(self, saved: checkpoint.Checkpoint) -> None: ...


class _Window:
    """Steps since the last metrics line or checkpoint: what ``step_s`` is the mean of."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.start = time.monotonic()


class TrainLoop:
    """Runs what is trained to its last step inside a run directory.

    Args:
        state: what is trained.
        config: length and rhythm.
        run: where it is recorded.
        config_hash: goes into the checkpoints and is checked on resume.
        label: the progress line's name.
    """

    def __init__(self, state: Trained, config: LoopConfig, run: RunDir, config_hash: str, label: str) -> None:
        self.state, self.config, self.run = state, config, run
        self.config_hash, self.label = config_hash, label
        self._chief = distributed.rank() == 0
        self._saved_step = 0

    def resume(self) -> int:
        """Restore the newest sound checkpoint; returns its step, 0 for a fresh start."""
        path = checkpoint.latest(self.run.checkpoints, self._report_damaged)
        if path is not None:
            self.state.restore(checkpoint.load(path, self.config_hash))
            self._saved_step = self.state.step
            say(f"{self.label}: continuing after step {self.state.step} of {self.config.steps}")
        distributed.check_replicas(self.state.parameters)
        return self.state.step

    def fit(self, hooks: Hooks) -> None:
        """Train to the last step.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            TrainingError: too many bad steps in a row.
            StorageError: the last checkpoint could not be written (an earlier failure is only reported).
        """
        total, done = self.config.steps, self.state.step
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            log = stack.enter_context(JsonlLog(self.run.metrics, from_step=done)) if self._chief else None
            window = _Window(done)
            for _ in track(range(done, total), self.label, total, done):
                self.state.optimizer_step(hooks.losses(self.state.step))
                window = self._after_step(hooks, log, stop, window)

    def _after_step(self, hooks: Hooks, log: JsonlLog | None, stop: StopRequest, window: "_Window") -> "_Window":
        step, last = self.state.step, self.state.step == self.config.steps
        between = step % hooks.stride == 0
        due = last or (between and step % self.config.checkpoint_every < hooks.stride)
        logging = last or step % self.config.log_every == 0
        stopping = between and distributed.any_rank(stop.requested, self.state.device) and not last
        if logging or due or stopping:
            facts = self.state.meter.read()
            self._check_streak(facts)
            if logging:
                self._write_window(hooks, log, window, facts)
        measured = hooks.at_checkpoint(step) if due else {}
        if log and measured:
            log.write(step=step, **measured)
        if due or stopping:
            self._save(must_succeed=last or stopping)
            hooks.after_checkpoint(measured)
        if stopping:
            self._leave(stop)
        return _Window(step) if logging or due else window

    def _leave(self, stop: StopRequest) -> None:
        self._event(event="stopped", step=self.state.step, signal=stop.signal_name)
        raise Interrupted(
            f"Stopped by {stop.signal_name or 'another rank'} after step {self.state.step} of {self.config.steps}; "
            f"everything is saved in {self.run.root}.",
            "Run the same command to continue.",
        )

    def _check_streak(self, facts: Mapping[str, float]) -> None:
        if facts["longest_skip"] < self.state.config.max_bad_steps:
            return
        self._event(event="diverged", step=self.state.step, **_printable(facts))
        raise TrainingError(
            f"By step {self.state.step}, {facts['longest_skip']:.0f} steps in a row had no finite loss and gradient"
            f" (loss {facts['bad_loss']:g}, gradient norm {facts['bad_grad_norm']:g}); weights were left untouched.",
            'Lower optimizer.lr, set precision = "fp32", or look for bad clips; '
            f"the last checkpoint is that of step {self._saved_step}.",
        )

    def _write_window(self, hooks: Hooks, log: JsonlLog | None, window: "_Window", facts: Mapping[str, float]) -> None:
        step, skipped = self.state.step, int(facts["skipped"])
        self.state.meter.reset()
        if skipped:
            self._event(event="steps_skipped", step=step, count=skipped)
        if log:
            means = {name: value for name, value in facts.items() if name not in _STREAK}
            step_s = (time.monotonic() - window.start) / (step - window.first_step)
            every = self.config.log_every
            described = hooks.describe(range((step - 1) // every * every, step))
            log.write(step=step, **means, skipped=skipped, **self.state.rates(), step_s=step_s, **described)

    def _save(self, must_succeed: bool) -> None:
        distributed.check_replicas(self.state.parameters)
        failure: StorageError | None = None
        if self._chief:
            try:
                self._write_checkpoint()
            except StorageError as error:
                failure = error
        distributed.barrier()
        if failure and must_succeed:
            raise failure
        if failure:
            self._event(event="checkpoint_failed", step=self.state.step, what=failure.what)
            say(f"{failure.what} {failure.hint} Training goes on.")

    def _write_checkpoint(self) -> None:
        folder, groups = self.run.checkpoints, self.state.groups()
        checkpoint.save(folder, self.state.step, groups, {}, self.config_hash, self.config.keep_last)
        self._saved_step = self.state.step

    def _report_damaged(self, path: Path, error: CheckpointError) -> None:
        self._event(event="checkpoint_damaged", path=path.name, what=error.what)
        say(f"{error.what} {error.hint}")

    def _event(self, **facts: Any) -> None:
        """Best effort: a full disk must not turn a note about itself into the end of the run."""
        if not self._chief:
            return
        try:
            with JsonlLog(self.run.events) as events:
                events.write(**facts)
        except StorageError as error:
            say(error.what)


def _printable(facts: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else str(value) for name, value in facts.items()}
