"""The clipped policy-gradient loss of whole groups, collapsed: one velocity, and one backward, for all members.

    log r = -lambda mean(e z) - lambda^2 mean(e^2) / 2          e = v_theta - v_old at the group's state
    loss  = -sum_r w_r min(r A_r, clip(r, 1 - low, 1 + high) A_r)

Members of a group left the same state under the same velocity, so G scalar products with their regenerated noise give
all G ratios, and the loss and its gradient are those of G separate forwards. On policy e = 0 and every ratio is
exactly 1. A few fp64 operations on ``[R]`` follow :mod:`reelforge.kernels.sde_replay`, which does the work.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from reelforge.kernels.errors import KernelError
from reelforge.kernels.sde_replay import Terms, replay
from reelforge.kernels.sde_step import group_of

RatioForm = Literal["exact", "debiased"]


class LogRatio(NamedTuple):
    """``value`` log ratio and ``kl`` per element of the step's two Gaussians, float64 ``[B]``."""

    value: Tensor
    kl: Tensor


class GroupLoss(NamedTuple):
    """The loss, and what a log wants to know of each member.

    Attributes:
        loss: float64, a scalar.
        ratio: float64 ``[R]``.
        kl: per element, float64 ``[R]``.
        clipped: members that the clip cuts off from the gradient, bool ``[R]``.
    """

    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


def log_ratio(terms: Terms, lambda_: Tensor, form: RatioForm = "exact") -> LogRatio:
    """log p_theta(x') - log p_old(x') of a step x' = mu_old + std z from its velocity-space terms.

    value = -lambda mean(e z) - kl, kl = lambda^2 mean(e^2) / 2. The mean over millions of elements leaves little of
    the first term, so the exact ratio falls below 1 wherever the policy moved and clips on one side only;
    ``debiased`` leaves kl out (GRPO-Guard's correction).

    Args:
        terms: of each sample.
        lambda_: the step's sensitivity |b| / std, ``[B]`` or ``[1]``.
        form: ``exact`` or ``debiased``.
    """
    if form not in ("exact", "debiased"):
        raise KernelError(f"There is no ratio {form!r}.", "Choose exact or debiased.")
    lambda_ = lambda_.to(terms.slope)
    kl = lambda_**2 * terms.power / 2
    value = -lambda_ * terms.slope
    return LogRatio(value - kl if form == "exact" else value, kl)


def group_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    keys: Tensor,
    offsets: Tensor | None,
    lambda_: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: tuple[float, float],
    form: RatioForm = "exact",
) -> GroupLoss:
    """The loss of P groups with R members in all.

    Args:
        velocity: ``[P,...]`` with gradient, one forward a group.
        velocity_old: ``[P,...]`` of the rollout.
        keys: of the rollout's noise, int64 ``[R]``.
        offsets: of the rollout's groups, int32 ``[P + 1]``; None where each has one member.
        lambda_: sensitivity of each group's step, ``[P]``.
        advantages: A, ``[R]``.
        weights: w, ``[R]``: 1 / G, rectification, validity; 0 leaves a member out, whatever its advantage is.
        clip: how far a ratio may fall below and rise above 1.
        form: of the ratio, see :func:`log_ratio`.

    Raises:
        KernelError: operands that do not go together, or an unknown form.
    """
    for name, values, size in (("lambda_", lambda_, len(velocity)), ("advantages", advantages, len(keys)),
                               ("weights", weights, len(keys))):  # fmt: skip
        if values.shape != (size,):
            raise KernelError(f"group_loss: {name} is {tuple(values.shape)}.", f"It must be [{size}].")
    terms = replay(velocity, velocity_old, keys, offsets)
    if offsets is not None:
        lambda_ = lambda_[group_of(offsets, len(keys))]
    # Zero times an infinite ratio, an infinite lambda or a missing reward's NaN is NaN: what is left out is 0 before.
    left_out = weights == 0
    log = log_ratio(terms, lambda_.masked_fill(left_out, 0), form)
    advantages, weights = advantages.to(log.value).masked_fill(left_out, 0), weights.to(log.value)
    ratio = log.value.exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    loss = -(weights * free.minimum(held)).sum()
    return GroupLoss(loss, ratio.detach(), log.kl.detach(), (held < free).detach())
