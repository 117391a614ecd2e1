"""Who gets which stochastic step and which noise: a function of (config, seed, iteration), never of rank or world size.

The members of a group share every stochastic step (isotemporal grouping: rewards are only compared between samples
perturbed at the same noise level); groups of one iteration cover the range between them. Prompts come in pairs with
mirrored steps k and K - 1 - k, and a pair stays on one rank: rank cost is then the same whatever k is, k stays exactly
uniform, and the strata lower the variance of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reelforge.engine.core import rng
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig:
    """How an iteration is laid out.

    Attributes:
        group_size: samples per prompt, G.
        distinct_noise: initial noises a group, M: 1 shares noise and ODE prefix among all members, G shares nothing.
        steps: half-open range of sampler steps that may be stochastic; the early, noisy ones matter most.
        stochastic: ``one`` step of the range a prompt (stratified, antithetic); ``all`` of them; or a ``window`` of
            ``window`` steps that moves on by one every ``window_iterations`` iterations (MixGRPO).
        trained_share: of the stochastic steps, at least one, drawn per prompt (DanceGRPO trains 0.6 of them).
    """

    group_size: int = 8
    distinct_noise: int = 1
    steps: tuple[int, int] = (0, 10)
    stochastic: Literal["one", "all", "window"] = "one"
    window: int = 4
    window_iterations: int = 25
    trained_share: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "distinct_noise", "window", "window_iterations")
        if self.group_size < 2:
            raise ConfigError(f"plan.group_size is {self.group_size}.", "An advantage compares at least 2 samples.")
        if self.group_size % self.distinct_noise:
            raise ConfigError(
                f"plan.distinct_noise is {self.distinct_noise} and group_size {self.group_size}.",
                f"It must divide the group; the nearest that does is {_nearest_divisor(self)}.",
            )
        if not 0 <= self.steps[0] < self.steps[1]:
            raise ConfigError(f"plan.steps is {list(self.steps)}.", "Give a rising range from 0, e.g. [0, 10].")
        if not 0 < self.trained_share <= 1:
            raise ConfigError(f"plan.trained_share is {self.trained_share}.", "It is a share in (0, 1].")


def _nearest_divisor(config: PlanConfig) -> int:
    divisors = [d for d in range(1, config.group_size + 1) if config.group_size % d == 0]
    return min(divisors, key=lambda d: abs(d - config.distinct_noise))


@dataclass(frozen=True)
class Group:
    """One prompt of one iteration.

    Attributes:
        prompt: its place in the prompt set.
        stochastic: steps with noise, rising.
        trained: those of them that the loss sees.
    """

    prompt: int
    stochastic: tuple[int, ...]
    trained: tuple[int, ...]


@dataclass(frozen=True)
class Planner:
    """Plans iterations.

    Args:
        config: the layout.
        seed: of the run.
        prompts: size of the prompt set.
        groups: prompts per iteration, P.
        num_steps: of the sampler, T.

    Raises:
        ConfigError: fewer prompts than groups, or steps outside the schedule.
    """

    config: PlanConfig
    seed: int
    prompts: int
    groups: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.prompts < self.groups:
            raise ConfigError(
                f"There are {self.prompts} prompts for {self.groups} groups an iteration.",
                f"Set train.batch_size to {self.prompts} or less, or add prompts.",
            )
        if self.config.steps[1] > self.num_steps:
            raise ConfigError(
                f"plan.steps is {list(self.config.steps)}, the sampler takes {self.num_steps} steps.",
                f"The range may end at {self.num_steps}.",
            )

    def iteration(self, number: int) -> tuple[Group, ...]:
        """The P groups of an iteration, mirrored pairs side by side."""
        steps = self._steps(number)
        return tuple(
            Group(prompt, chosen, self._trained(number, slot, chosen))
            for slot, (prompt, chosen) in enumerate(zip(self._prompts(number), steps, strict=True))
        )

    def share(self, number: int, rank: int, world_size: int) -> list[int]:
        """Which of the iteration's groups a rank owns: whole pairs, sorted by step so that equal steps batch.

        Raises:
            ConfigError: there are fewer pairs than ranks.
        """
        pairs = (self.groups + 1) // 2
        if pairs < world_size:
            raise ConfigError(
                f"{self.groups} groups an iteration make {pairs} pairs for {world_size} processes.",
                f"Set train.batch_size to {2 * world_size} or more.",
            )
        first, end = (2 * (place * pairs // world_size) for place in (rank, rank + 1))
        groups = self.iteration(number)
        return sorted(range(first, min(end, self.groups)), key=lambda slot: groups[slot].stochastic)

    def _prompts(self, number: int) -> list[int]:
        """Each pass over the set in an order of its own, without what is left over: no prompt twice at a time."""
        per_pass = self.prompts // self.groups
        epoch, place = divmod(number, per_pass)
        order = rng.generator("rl_prompts", self.seed, epoch).permutation(self.prompts)
        return order[place * self.groups : (place + 1) * self.groups].tolist()

    def _steps(self, number: int) -> list[tuple[int, ...]]:
        low, high = self.config.steps
        if self.config.stochastic == "one":
            return [(low + k,) for k in stratified_pairs(high - low, self.groups, self.seed, number)]
        if self.config.stochastic == "all":
            return [tuple(range(low, high))] * self.groups
        width = min(self.config.window, high - low)
        first = min(low + number // self.config.window_iterations, high - width)
        return [tuple(range(first, first + width))] * self.groups

    def _trained(self, number: int, slot: int, stochastic: Sequence[int]) -> tuple[int, ...]:
        count = max(1, round(self.config.trained_share * len(stochastic)))
        if count == len(stochastic):
            return tuple(stochastic)
        drawn = rng.generator("rl_trained", self.seed, number, slot).permutation(len(stochastic))[:count]
        return tuple(sorted(stochastic[place] for place in drawn.tolist()))


def stratified_pairs(choices: int, count: int, seed: int, number: int) -> list[int]:
    """``count`` draws from range(choices), each uniform: strata over pairs, the second of a pair mirrored."""
    pairs = (count + 1) // 2
    draw = rng.generator("rl_steps", seed, number)
    u = (draw.permutation(pairs) + draw.random(pairs)) / pairs
    first = np.minimum((u * choices).astype(int), choices - 1)
    return np.stack((first, choices - 1 - first), axis=1).ravel()[:count].tolist()


def evaluations(group: Group, config: PlanConfig, num_steps: int) -> int:
    """Velocity evaluations of a group's rollout: M up to its first stochastic step, that one included, G after it.

    With one stochastic step k and M = 1 this is (k + 1) + G (T - 1 - k).
    """
    shared = group.stochastic[0] + 1
    return config.distinct_noise * shared + config.group_size * (num_steps - shared)
