"""What an iteration's rewards look like: the numbers that tell a healthy run from a hacked or a dead one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.rl.advantage import Advantages, centre
from reelforge.engine.rl.plan import Group


def describe_rewards(
    axes: Sequence[str],
    rewards: Tensor,
    advantages: Advantages,
    groups: Sequence[Group] = (),
    distinct_noise: int = 1,
) -> dict[str, Any]:
    """Facts for one metrics line.

    Args:
        axes: names of the rewards.
        rewards: ``[R,P,G]``, NaN where missing.
        advantages: of these rewards.
        groups: as planned; none where there is no stochastic step (rewrites).
        distinct_noise: initial noises a group.

    Returns:
        ``reward`` (per axis: mean, std, mean per first stochastic step, normalised std), ``within_group`` (share of a
        reward's variance that is not between prompts), ``rho`` (see :func:`noise_share`), ``zero_std_share``,
        ``missing_share``, ``counted_share`` and ``correlation`` of the rewards' advantages, axis against axis.
    """
    present = ~rewards.isnan()
    steps = torch.tensor([group.stochastic[0] for group in groups])
    table: dict[str, Any] = {}
    for axis, values, there in zip(axes, rewards, present, strict=True):
        table[axis] = {
            "mean": _mean(values[there]),
            "std": _std(values[there]),
            **({"by_step": _by_step(steps, values, there)} if groups else {}),
        }
    if len(advantages.per_reward) == len(axes):  # not where the rewards were summed first
        for axis, scaled in zip(axes, advantages.per_reward, strict=True):
            table[axis]["normalised_std"] = _std(scaled[~scaled.isnan()])
    return {
        "reward": table,
        "within_group": {axis: _within(v, t) for axis, v, t in zip(axes, rewards, present, strict=True)},
        "rho": {axis: noise_share(v, distinct_noise) for axis, v in zip(axes, rewards, strict=True)},
        "zero_std_share": _flat(rewards, present).double().mean().item(),
        "missing_share": 1 - present.double().mean().item(),
        "counted_share": advantages.counted.double().mean().item(),
        "correlation": _correlation(advantages),
    }


def _by_step(steps: Tensor, values: Tensor, there: Tensor) -> dict[str, float | None]:
    return {str(k): _mean(values[steps == k][there[steps == k]]) for k in sorted(set(steps.tolist()))}


def noise_share(values: Tensor, distinct_noise: int) -> float | None:
    """rho = E Var(R | prompt, x_T) / E Var(R | prompt): how much of a reward's spread the stochastic step makes.

    One-way analysis of variance (method of moments) within each prompt; it takes at least two noises a group and two
    members a noise, so with a shared or an independent x_T there is no answer.

    Args:
        values: ``[P,G]``, members of one noise side by side; groups with a missing reward are left out.
    """
    groups, members = values.shape
    each = members // distinct_noise
    if distinct_noise < 2 or each < 2:
        return None
    table = values[~values.isnan().any(1)].view(-1, distinct_noise, each)
    if not len(table):
        return None
    within = table.var(2).mean().item()
    between = max(0.0, table.mean(2).var(1).mean().item() - within / each)
    return within / (within + between) if within + between > 0 else None


def _flat(rewards: Tensor, present: Tensor) -> Tensor:
    """Groups in which every reward is there at least twice, and always the same: bool ``[P]``."""
    low = torch.where(present, rewards, torch.inf).amin(2)
    high = torch.where(present, rewards, -torch.inf).amax(2)
    return ((present.sum(2) >= 2) & (low == high)).all(0)


def _within(values: Tensor, present: Tensor) -> float | None:
    total = values[present].var(correction=0).item() if present.any() else 0.0
    inside = centre(values[None], present[None])[0][present].square().mean().item() if present.any() else 0.0
    return inside / total if total > 0 else None


def _correlation(advantages: Advantages) -> list[list[float]]:
    """Between rewards, over counted samples; a strongly negative pair is an early sign of hacking."""
    if len(advantages.per_reward) < 2 or advantages.counted.sum() < 2:
        return []
    rows = advantages.per_reward[:, advantages.counted].nan_to_num()
    return torch.corrcoef(rows).nan_to_num().tolist()


def merge_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several optimizer steps as one line's: means of numbers, the last of everything else."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each[name] for each in facts if name in each]
        numbers = [value for value in values if isinstance(value, int | float)]
        merged[name] = sum(numbers) / len(numbers) if len(numbers) == len(values) else values[-1]
    return merged


def means(axes: Sequence[str], rewards: Tensor) -> dict[str, float | None]:
    """Mean of each reward over what is there of ``[R,N]``; None where nothing is: JSON has no NaN."""
    return {axis: _mean(values[~values.isnan()]) for axis, values in zip(axes, rewards, strict=True)}


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None


def _std(values: Tensor) -> float | None:
    return values.std(correction=0).item() if values.numel() else None
