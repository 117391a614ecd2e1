"""The policy-gradient loss of an iteration: one forward and one backward per state, whatever its group's size.

    L = sqrt(n) [ -sum over decisions of w_k min(r A, clip(r) A) + beta sum over states of W KL(v_theta, v_ref) ]

log r is taken in velocity space (:mod:`reelforge.kernels.group_loss`): on policy v_theta = v_old bit for bit and every
ratio is exactly 1, which is checked, not assumed. n is the number of elements of a latent: a ratio that is a mean over
elements has a gradient of 1 / sqrt(n), 7e-4 for a 480p clip, which Adam's eps would swallow; the factor undoes it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.rl.policy import Policy
from reelforge.engine.rl.rollout import Decision
from reelforge.kernels.group_loss import LogRatio, RatioForm, group_loss, log_ratio
from reelforge.kernels.sde_replay import mean_product, replay
from reelforge.kernels.sde_step import group_of

_NO_CLIP = (float("inf"), float("inf"))


@dataclass(frozen=True)
class KlConfig:
    """Pull towards the model that training started from.

    Attributes:
        weight: beta; 0 is none, and no reference model is kept.
        form: ``exact`` is the KL of the step's Gaussians per element, lambda^2 mean((v - v_ref)^2) / 2; ``velocity``
            leaves lambda^2 / 2 out, so that every step is held alike.
        gate: ``outranks`` pulls only samples whose first reward ranks above the mean of their other rewards within the
            group (GARDO): what the first scorer likes and the others do not.
    """

    weight: float = 0.0
    form: Literal["exact", "velocity"] = "velocity"
    gate: Literal["always", "outranks"] = "always"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"loss.kl.weight is {self.weight}.", "It must be 0 (none) or more.")


@dataclass(frozen=True)
class LossConfig:
    """The objective.

    Attributes:
        ratio: ``exact`` log-probability ratio, or ``debiased`` without its always negative KL part.
        rectify: temporal gradient rectification, see :func:`reelforge.engine.rl.advantage.step_weights`.
        clip: ``ratio`` is PPO's, between 1 - ``clip_low`` and 1 + ``clip_high``; ``kl`` drops samples that are past
            ``kl_limit`` and would move further away (Flow-DPPO); ``none``. Without effect at one update a rollout.
        clip_low, clip_high: a ratio is a mean over elements, so 1e-3 is a trust region of that much KL per element.
        kl_limit: KL per element.
        kl: regulariser.
    """

    ratio: RatioForm = "debiased"
    rectify: bool = True
    clip: Literal["ratio", "kl", "none"] = "ratio"
    clip_low: float = 1e-3
    clip_high: float = 1e-3
    kl_limit: float = 1e-5
    kl: KlConfig = KlConfig()

    def __post_init__(self) -> None:
        require_positive(self, "clip_low", "clip_high", "kl_limit")


@dataclass(frozen=True)
class Targets:
    """What the rewards ask of each sample and step; on the CPU, the same on every rank.

    Attributes:
        advantages: fp64 ``[A, P G]``; A clipped losses are summed.
        counted: bool ``[P G]``.
        weights: of a decision at each step, fp64 ``[T]``.
        lambda_: sensitivity of each step, fp64 ``[T]``.
        kl_share: of each sample in the KL term, fp64 ``[P G]``; sums to the share of samples that are pulled.
    """

    advantages: Tensor
    counted: Tensor
    weights: Tensor
    lambda_: Tensor
    kl_share: Tensor


class LossMeter:
    """Sums over decisions since it was made, on the device.

    Attributes:
        gap: largest ``|v_theta - v_old|`` seen.
    """

    NAMES = ("members", "ratio", "kl", "clipped_low", "clipped_high", "kl_reference")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.gap = torch.zeros((), device=device)

    def means(self) -> dict[str, float]:
        """Per counted member; 0 when there was none."""
        members, *sums = self.sums.tolist()
        return {name: value / max(members, 1.0) for name, value in zip(self.NAMES[1:], sums, strict=True)}


def losses(
    policy: Policy, decisions: Iterable[Decision], targets: Targets, config: LossConfig, meter: LossMeter
) -> Iterator[Tensor]:
    """Each decision's share of the loss, one forward at a time.

    Raises:
        TrainingError: the policy does not take the path that the rollout took.
    """
    for decision in decisions:
        _check_path(policy, decision)
        velocity = policy.train(decision.x, decision.timestep, decision.prompts)
        meter.gap = torch.maximum(meter.gap, (velocity.detach() - decision.velocity).abs().amax().float())
        loss = _clipped(velocity, decision, targets, config, meter)
        if config.kl.weight:
            loss = loss + config.kl.weight * _pull(policy, velocity, decision, targets, config.kl, meter)
        yield loss * decision.x[0].numel() ** 0.5


def _check_path(policy: Policy, decision: Decision) -> None:
    now = policy.path(len(decision.x))
    for name, then in vars(decision.path).items():
        if vars(now)[name] != then:
            raise TrainingError(
                f"The rollout's stochastic step ran with {name} = {then}, training runs with {vars(now)[name]}.",
                "Both must be one computation, or no ratio is 1 on policy.",
            )


def check_on_policy(meter: LossMeter) -> None:
    """Stop unless the first update's velocities are those of the rollout, bit for bit.

    Raises:
        TrainingError: they are not: every ratio of this iteration would be wrong.
    """
    gap = meter.gap.item()
    if gap != 0.0:
        raise TrainingError(
            f"The training forward differs from the rollout's stochastic step by up to {gap:.3g} before any update.",
            "Both must be one computation: look for dropout, another batch shape, another attention kernel, changed"
            " sigmas, weights merged or cast on one side.",
        )


def _clipped(velocity: Tensor, decision: Decision, targets: Targets, config: LossConfig, meter: LossMeter) -> Tensor:
    device = velocity.device
    members, step = decision.members, decision.step
    lambda_ = targets.lambda_[step].expand(len(velocity)).to(device)
    counted = targets.counted[members].to(device)
    weights = counted * targets.weights[step].to(device)
    clip = (config.clip_low, config.clip_high) if config.clip == "ratio" else _NO_CLIP
    moved = _moved(velocity, decision, lambda_, config.ratio) if config.clip == "kl" else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for advantages in targets.advantages[:, members].to(device):
        kept = weights
        if moved is not None:
            kept = weights * ~((moved.kl > config.kl_limit) & (moved.value * advantages > 0))
        found = group_loss(
            velocity, decision.velocity, decision.keys, decision.offsets, lambda_, advantages, kept, clip, config.ratio
        )
        total = total + found.loss
        # The loss takes whom it leaves out for unmoved.
        ratio, kl = (found.ratio, found.kl) if moved is None else (moved.value.exp(), moved.kl)
        cut = found.clipped if config.clip == "ratio" else kept != weights
        facts = (torch.ones_like(ratio), ratio, kl, cut & (ratio < 1), cut & (ratio > 1))
        meter.sums[:5] += torch.stack([torch.where(counted, fact, 0).sum().double() for fact in facts])
    return total


@torch.no_grad()
def _moved(velocity: Tensor, decision: Decision, lambda_: Tensor, form: RatioForm) -> LogRatio:
    """How far each member's step is from the rollout's, float64 ``[R]``."""
    terms = replay(velocity.detach(), decision.velocity, decision.keys, decision.offsets)
    return log_ratio(terms, lambda_[group_of(decision.offsets, len(decision.keys))], form)


def _pull(
    policy: Policy, velocity: Tensor, decision: Decision, targets: Targets, config: KlConfig, meter: LossMeter
) -> Tensor:
    """Share-weighted mean over samples of the distance to the reference."""
    reference = policy.reference(decision.x, decision.timestep, decision.prompts)
    wide = torch.promote_types(velocity.dtype, torch.float32)
    e = velocity.to(wide) - reference.to(wide)
    distance = mean_product(e, e)
    if config.form == "exact":
        distance = distance * (targets.lambda_[decision.step] ** 2 / 2).item()
    share = targets.kl_share[decision.members].to(velocity.device)
    state = group_of(decision.offsets, len(decision.keys))
    shares = torch.zeros_like(distance).index_add(0, state, share)
    counted = targets.counted[decision.members].to(velocity.device)
    meter.sums[5] += len(targets.advantages) * (counted * distance.detach()[state]).sum()
    return (shares * distance).sum()
