"""From rewards to advantages and sample weights, over the whole iteration: every rank computes the same.

    centre   c = R - mean over the group's valid members, reward by reward
    scale    by a running, batch, largest-group or group standard deviation, never below a floor
    fuse     weighted sum over rewards; optionally normalised again over the batch

A missing reward makes its sample invalid; a group with fewer than two valid members, or in which all members score
alike, says nothing: its samples get weight 0 and enter no statistic, so the others' gradient is what it would be
without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError

Scale = Literal["running", "batch", "max_group", "group", "none"]


@dataclass(frozen=True)
class AxisWeight:
    """How much a reward axis counts."""

    axis: str
    weight: float


@dataclass(frozen=True)
class FusionConfig:
    """How several rewards become one advantage.

    Attributes:
        rule: ``each`` normalises every reward, then sums (LongCat, MixGRPO); ``sum`` sums the raw rewards, then
            normalises (Flow-GRPO); ``separate`` gives every reward a clipped loss of its own (DanceGRPO).
        scale: what a centred reward is divided by: its standard deviation over the ``batch`` (Flow-GRPO), that of its
            ``group`` (DanceGRPO), of the most varied group (``max_group``, LongCat), or the batch's ``running`` one.
        floor: least divisor. Within a group that shares its noise the spread is small, and dividing by it would
            amplify what the scorer does not know.
        decay: of the running standard deviation, per iteration.
        normalise_batch: divide the fused advantage by its batch standard deviation (GDPO, Liu et al. 2026).
        clip: largest |advantage|.
        extremes: train only so many best and worst members of a group; 0 trains all.
        weights: of reward axes; what is not named has weight 1.
        shuffled: hand the advantages to other samples: a control whose rewards say nothing, so that whatever changes is
            the optimizer's walk on noise.
    """

    rule: Literal["each", "sum", "separate"] = "each"
    scale: Scale = "running"
    floor: float = 1e-4
    decay: float = 0.9
    normalise_batch: bool = True
    clip: float = 5.0
    extremes: int = 0
    weights: tuple[AxisWeight, ...] = ()
    shuffled: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "floor", "clip")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"fusion.decay is {self.decay}.", "It must be in [0, 1).")
        if self.extremes < 0:
            raise ConfigError(f"fusion.extremes is {self.extremes}.", "It must be 0 (all members) or more.")


class Advantages(NamedTuple):
    """Of one iteration, P groups of G samples and R rewards.

    Attributes:
        values: fp64 ``[A,P,G]``; A is 1, or the number of rewards under ``separate``. 0 where a sample does not count.
        counted: the samples that the loss sees, bool ``[P,G]``.
        per_reward: centred and scaled, fp64 ``[R,P,G]``; NaN where missing.
    """

    values: Tensor
    counted: Tensor
    per_reward: Tensor


class Fusion:
    """Turns an iteration's rewards into advantages.

    Args:
        config: the rule.
        axes: names of the rewards, in the order of their tables.

    Attributes:
        running: standard deviation of each reward so far, fp64 ``[R]``, 0 before the first; kept with the checkpoint.

    Raises:
        ConfigError: a weight names no reward, or scales are kept of rewards that are summed first.
    """

    def __init__(self, config: FusionConfig, axes: Sequence[str]) -> None:
        weights = {each.axis: each.weight for each in config.weights}
        if unknown := sorted(weights.keys() - set(axes)):
            raise ConfigError(f"fusion.weights names {unknown[0]!r}.", f"The rewards are {', '.join(axes)}.")
        if config.rule == "sum" and config.scale == "running" and len(axes) > 1:
            raise ConfigError('fusion.scale "running" keeps a scale per reward.', 'Set fusion.rule to "each".')
        self.config = config
        self.weights = torch.tensor([weights.get(axis, 1.0) for axis in axes], dtype=torch.float64)
        self.running = torch.zeros(len(axes), dtype=torch.float64)

    def __call__(self, rewards: Tensor, wanted: Tensor | None = None) -> Advantages:
        """Advantages of an iteration.

        Args:
            rewards: ``[R,P,G]``, NaN where missing.
            wanted: which rewards a prompt is for, bool ``[R,P]``; None is all of them.
        """
        rewards = rewards.double()
        there = ~rewards.isnan()
        weights = self.weights[:, None, None].expand(rewards.shape)
        if wanted is not None:
            there, weights = there & wanted[:, :, None], weights * wanted[:, :, None]
        present = (there | (weights == 0)).all(0)
        if self.config.rule == "sum":
            rewards = (torch.where(weights != 0, rewards, 0) * weights).sum(0, keepdim=True)
            weights = there = torch.ones_like(rewards, dtype=torch.bool)
        centred = centre(rewards, present & there)
        # A member that is alone differs from nobody, so this leaves out its group too.
        valid = present & ((centred != 0) & (weights != 0)).any(0).any(1, keepdim=True)
        scaled = centred / self._scale(centred, valid & there)
        if self.config.rule == "separate":
            values = scaled * weights
        else:
            values = (scaled * weights).sum(0, keepdim=True)
            if self.config.normalise_batch:
                values = values / spread(values, valid[None]).clamp_min(self.config.floor)
        counted = self._kept(values.sum(0), valid)
        values = torch.where(counted, values, 0.0).clamp(-self.config.clip, self.config.clip)
        return Advantages(values, counted, torch.where(present & there, scaled, torch.nan))

    def _scale(self, centred: Tensor, valid: Tensor) -> Tensor:
        """What to divide by, ``[R,1,1]`` or ``[R,P,1]``; ``valid`` is ``[R,P,G]``."""
        kind = self.config.scale
        if kind == "none":
            return torch.ones(len(centred), 1, 1, dtype=centred.dtype)
        if kind in ("group", "max_group"):
            squares = torch.where(valid, centred, 0.0).square().sum(2, keepdim=True)
            groups = (squares / valid.sum(2, keepdim=True).clamp_min(1)).sqrt()
            return (groups if kind == "group" else groups.amax(1, keepdim=True)).clamp_min(self.config.floor)
        now = spread(centred, valid)
        if kind == "running":
            # The first one that is not 0 begins the average; an iteration that says nothing leaves it alone.
            now = now.flatten()
            moved = torch.where(self.running > 0, self.running.lerp(now, 1 - self.config.decay), now)
            self.running.copy_(torch.where(now > 0, moved, self.running))
            now = self.running[:, None, None]
        return now.clamp_min(self.config.floor)

    def _kept(self, fused: Tensor, valid: Tensor) -> Tensor:
        """Valid samples, or the extremes among each group's."""
        if not self.config.extremes or 2 * self.config.extremes >= fused.shape[1]:
            return valid
        best = fused.masked_fill(~valid, -torch.inf).topk(self.config.extremes, dim=1).indices
        worst = fused.masked_fill(~valid, torch.inf).topk(self.config.extremes, dim=1, largest=False).indices
        return valid & torch.zeros_like(valid).scatter(1, torch.cat((best, worst), dim=1), True)


def shuffle(advantages: Advantages, seed: int, iteration: int) -> Advantages:
    """The control's advantages: permuted among the samples that count."""
    flat = advantages.values.flatten(1).clone()
    places = advantages.counted.flatten().nonzero()[:, 0]
    order = torch.from_numpy(rng.generator("rl_shuffle", seed, iteration).permutation(len(places)))
    flat[:, places] = flat[:, places[order]]
    return advantages._replace(values=flat.view_as(advantages.values))


def centre(rewards: Tensor, valid: Tensor) -> Tensor:
    """Difference to the mean of the group's valid members; 0 for the others. ``[R,P,G]`` and bool ``[R,P,G]``."""
    kept = torch.where(valid, rewards, 0.0)
    mean = kept.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp_min(1)
    # Equal rewards must be no spread at all: a mean that is off by a rounding would give every member an advantage.
    low = torch.where(valid, rewards, torch.inf).amin(2, keepdim=True)
    high = torch.where(valid, rewards, -torch.inf).amax(2, keepdim=True)
    return torch.where(valid & (low < high), kept - mean, 0.0)


def spread(centred: Tensor, valid: Tensor) -> Tensor:
    """Root mean square of what is centred, over the valid samples of all groups: ``[R,1,1]``.

    Over these alone, packed: a sum with zeros between its terms is grouped, and so rounded, otherwise.
    """
    packed = [row[kept] for row, kept in zip(centred, valid, strict=True)]
    return torch.stack([row.square().sum() / max(len(row), 1) for row in packed]).sqrt()[:, None, None]


def step_weights(lambda_: Tensor, trained: Sequence[Sequence[int]], counted: Tensor, rectify: bool) -> Tensor:
    """What a counted sample weighs at each step; over an optimizer step, on every rank, the weights sum to 1.

    Temporal gradient rectification: d ratio / d v carries lambda_k, so weights of 1 / lambda_k let every step push the
    velocity with the same force. With N decisions (a counted sample at a trained step) in the optimizer step,
    w_k = (1 / lambda_k) / mean(1 / lambda) / N, the mean over all N: the plan is known everywhere, so it takes no
    communication, and micro-batches may be ragged.

    Args:
        lambda_: sensitivity of each step of the schedule, fp64 ``[T]``.
        trained: each group's trained steps.
        counted: bool ``[P,G]``.
        rectify: False weighs all decisions alike, 1 / N.

    Returns:
        fp64 ``[T]``; all 0 when nothing counts.
    """
    force = 1 / lambda_ if rectify else torch.ones_like(lambda_)
    samples = counted.sum(1).tolist()
    total = sum(count * force[list(steps)].sum() for count, steps in zip(samples, trained, strict=True))
    return force / total if total else torch.zeros_like(force)
