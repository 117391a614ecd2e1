"""What is trained: weights, AdamW, average and counters, with one guarded step.

Shared by every stage that trains a network. Nothing in a step waits for the device.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import CheckpointError, ConfigError
from reelforge.engine.io.checkpoint import Checkpoint
from reelforge.engine.train.ema import Ema


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its guards.

    Attributes:
        lr: peak learning rate.
        betas: Adam's.
        eps: Adam's.
        weight_decay: decoupled.
        warmup_steps: linear from lr / warmup_steps.
        decay: what follows: ``constant``, or ``cosine`` or ``linear`` down to 0 at the last step.
        grad_clip: largest global gradient norm.
        ema_decay: of the averaged weights; 0 keeps none.
        max_bad_steps: so many steps in a row without a finite loss and gradient end the run.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay: Literal["constant", "cosine", "linear"] = "constant"
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}.", "It must be in [0, 1); 0.999 is usual.")
        for name in ("lr", "grad_clip", "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}.", "It must be above 0.")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (1 - done if config.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW; where ``found_inf`` is 1 its kernel leaves weights, moments and step count untouched."""

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


class Meter:
    """Sums over the steps since the last metrics line, kept on the device; reading is the only host sync.

    ``sums``: good steps, their loss, their gradient norm, bad steps; current and longest run of bad steps, loss and
    gradient norm of the last bad step.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, norm: Tensor, good: Tensor) -> None:
        """Count one step."""
        facts = torch.stack((loss, norm)).double()
        steps, streak = good.double()[None], (self.sums[4:5] + 1) * ~good
        means = self.sums[:3] + torch.cat((steps, torch.where(good, facts, 0.0)))
        longest = torch.maximum(streak, self.sums[5:6])
        last_bad = torch.where(good, self.sums[6:], facts)
        self.sums = torch.cat((means, self.sums[3:4] + 1 - steps, streak, longest, last_bad))

    def read(self) -> dict[str, float]:
        """Means over the good steps; ``loss`` and ``grad_norm`` are absent when there was none."""
        good, loss, norm, bad, _, longest, bad_loss, bad_norm = self.sums.tolist()
        means = {"loss": loss / good, "grad_norm": norm / good} if good else {}
        return {**means, "skipped": bad, "longest_skip": longest, "bad_loss": bad_loss, "bad_grad_norm": bad_norm}

    def reset(self) -> None:
        """Begin the next line; the current run of bad steps goes on."""
        self.sums[[0, 1, 2, 3, 5]] = 0.0


class TrainState:
    """Weights, optimizer, average and counters of one trained network.

    Args:
        parameters: the trained weights by name, fp32, on one device.
        config: of the optimizer.
        steps: length of the run, for the learning-rate schedule.
        carried: further tensors that belong to the run's state; checkpoints hold them, :meth:`restore` fills them.
        pace: told the gradients of each step, summed over ranks and unclipped; answers by what its learning rate is
            multiplied.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        steps: int,
        carried: Mapping[str, Tensor] | None = None,
        pace: Callable[[Sequence[Tensor]], float] = lambda gradients: 1.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.steps = steps
        self.step = 0
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = GuardedAdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = Ema(self.parameters, config.ema_decay)
        self.meter = Meter(self.device)
        self.carried = dict(carried or {})
        self.pace, self._factor = pace, 1.0

    def optimizer_step(self, losses: Iterable[Tensor]) -> None:
        """One step on the sum of ``losses`` over this rank's micro-batches and all ranks.

        Args:
            losses: scalars, each a micro-batch's share of the global mean; taken one by one, each one's backward
                before the next one's forward. When the sum or the gradient is not finite, nothing changes but ``step``;
                nor does anything on a gradient of exactly 0, which momentum and weight decay would still follow.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for loss in losses:
            loss.backward()
            total += loss.detach()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        distributed.sum_([*gradients, total])
        norm = get_total_norm(gradients)
        good = total.isfinite() & norm.isfinite()
        moves = good & (norm > 0)
        self._factor = self.pace(gradients)
        clip_grads_with_norm_(self.parameters.values(), self.config.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._factor * learning_rate(self.config, self.step, self.steps)
        self.optimizer.found_inf = (~moves).float()
        self.optimizer.step()
        self.ema.update(moves)
        self.meter.add(total, norm, good)
        self.step += 1

    def rates(self) -> dict[str, float]:
        """The learning rate of the latest step."""
        return {"lr": self._factor * learning_rate(self.config, max(0, self.step - 1), self.steps)}

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Everything to store, by group and weight name; Adam's moments as ``exp_avg/<name>`` and so on."""
        adam = {
            f"{moment}/{name}": value
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state[parameter].items()
        }
        counters = {"meter": self.meter.sums, "ema_updates": self.ema.updates, **self.carried}
        return {"weights": dict(self.parameters), "ema": self.ema.shadow, "adam": adam, "counters": counters}

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of the same weights.

        Raises:
            CheckpointError: names or shapes are not this network's.
        """
        groups = saved.groups
        for live, stored in ((self.parameters, groups["weights"]), (self.ema.shadow, groups["ema"])):
            _check_fit(live, stored)
            for name, tensor in live.items():
                tensor.copy_(stored[name])
        for key, value in groups["adam"].items():
            moment, _, name = key.partition("/")
            self.optimizer.state[self.parameters[name]][moment] = value.to(self.device)
        self.meter.sums = groups["counters"]["meter"].to(self.device)
        self.ema.updates.copy_(groups["counters"]["ema_updates"])
        for name, tensor in self.carried.items():
            tensor.copy_(groups["counters"][name])
        self.step = saved.step


def _check_fit(live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    hint = "Continue with the model and the recipe it was started with."
    if missing := sorted(live.keys() ^ stored.keys()):
        raise CheckpointError(f"Weight {missing[0]} is in the model or in the checkpoint, not in both.", hint)
    for name, tensor in live.items():
        if tensor.shape != stored[name].shape:
            shapes = f"{list(stored[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
            raise CheckpointError(f"Weight {name} is {shapes}.", hint)
