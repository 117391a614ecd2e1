"""One GRPO iteration after another: plan, rollout, scores, advantages, one optimizer step (or several)."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow import sde
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Pending, Scoring
from reelforge.engine.rl.advantage import Advantages, Fusion, shuffle, step_weights
from reelforge.engine.rl.loss import LossConfig, LossMeter, Targets, check_on_policy, losses
from reelforge.engine.rl.plan import Group, Planner
from reelforge.engine.rl.policy import Policy
from reelforge.engine.rl.prompts import PromptSet
from reelforge.engine.rl.rollout import Decision, Sampler
from reelforge.engine.rl.statistics import describe_rewards, merge_facts
from reelforge.engine.train.pace import Pace, PaceConfig


@dataclass
class _Iteration:
    """What an iteration's updates share."""

    decisions: list[Decision]
    targets: Targets
    facts: dict[str, Any]


class GrpoTask:
    """Losses and facts of a run; all of them functions of the step and the weights.

    Args:
        policy: the network.
        sampler: rolls out.
        planner: lays out.
        scoring: rewards.
        fusion: rewards to advantages.
        prompts: the prompt set.
        config: the objective.
        updates: optimizer steps per rollout; after the first one the ratio is against the stored velocities.
        rollout_groups: groups that are rolled out, decoded and scored together.
        pace: of the learning rate, none is the default; build the optimizer's state with ``task.pace``.
        on_missing: told of this rank's samples that lack a score, as records for a log.

    Raises:
        ConfigError: a step that may be trained has no noise, or a gate compares rewards and there is one.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        planner: Planner,
        scoring: Scoring,
        fusion: Fusion,
        prompts: PromptSet,
        config: LossConfig,
        updates: int,
        rollout_groups: int,
        pace: PaceConfig | None = None,
        on_missing: Callable[[list[dict[str, Any]]], None] = lambda records: None,
    ) -> None:
        self.policy, self.sampler, self.planner = policy, sampler, planner
        self.scoring, self.fusion, self.prompts, self.config = scoring, fusion, prompts, config
        self.updates, self.rollout_groups, self.on_missing = updates, rollout_groups, on_missing
        self.device = policy.device
        at = sde.coefficients(sampler.grid, range(sampler.grid.num_steps), sampler.rate)
        self.lambda_ = at.lambda_
        self._check_settings()
        self.wanted = prompts.wanted(scoring.axes)
        self.pace = Pace(pace or PaceConfig(), (weight for weight in policy.model.parameters() if weight.requires_grad))
        self._current: _Iteration | None = None
        self._facts: list[dict[str, Any]] = []

    def _check_settings(self) -> None:
        rate, (first, end) = self.sampler.rate, self.sampler.config.steps
        for k in range(first, end):
            if not self.lambda_[k].isfinite():
                raise ConfigError(
                    f"Noise rate {rate.kind!r} with eta {rate.eta:g} adds no noise at step {k} of plan.steps.",
                    "A step without noise has no ratio: raise eta, or choose other steps.",
                )
        rewards = 1 if self.fusion.config.rule == "sum" else len(self.scoring.axes)
        if self.config.kl.gate == "outranks" and rewards < 2:
            raise ConfigError(
                f'loss.kl.gate "outranks" compares rewards, and there is {rewards} after fusion.',
                'Give several scorers and a fusion.rule other than "sum", or set the gate to "always".',
            )

    def losses(self, step: int) -> Iterator[Tensor]:
        """This rank's share of an optimizer step, decision by decision."""
        iteration, update = divmod(step, self.updates)
        if update == 0:
            self._current = self._roll_out(iteration)
        assert self._current is not None, "a run continues at the start of an iteration"
        meter = LossMeter(self.device)
        start = time.monotonic()
        yield from losses(self.policy, self._current.decisions, self._current.targets, self.config, meter)
        if update == 0:
            check_on_policy(meter)
        facts = {**meter.means(), "train_s": time.monotonic() - start}
        self._facts.append({**self._current.facts, **facts} if update == 0 else facts)
        if update == self.updates - 1:
            self._current = None  # frees states and velocities

    def describe(self, steps: range) -> dict[str, Any]:
        """The facts of the last optimizer steps."""
        del steps
        merged = merge_facts(self._facts)
        self._facts.clear()
        return {**merged, "gradient_cosine": self.pace.read()}

    def _roll_out(self, iteration: int) -> _Iteration:
        groups = self.planner.iteration(iteration)
        own = self.planner.share(iteration, distributed.rank(), distributed.world_size())
        rewards = torch.zeros(len(self.scoring.axes), len(groups), self.sampler.config.group_size, dtype=torch.float64)
        decisions: list[Decision] = []
        pending: list[tuple[list[int], Pending]] = []
        rollout_s, evaluations = 0.0, 0
        for slots in (own[first : first + self.rollout_groups] for first in range(0, len(own), self.rollout_groups)):
            part = [groups[slot] for slot in slots]
            start = time.monotonic()
            self.policy.prepare([group.prompt for group in part])
            rolled = self.sampler.run(self.policy, part, slots, iteration, self.device)
            rollout_s += time.monotonic() - start
            decisions += rolled.decisions
            evaluations += rolled.evaluations
            pending.append((slots, self.scoring.submit(rolled.latents, self._texts(part))))
        self.policy.hold([groups[slot].prompt for slot in own])
        rolled_out = time.monotonic()
        for slots, scores in pending:
            found = scores.result()
            for axis, values in enumerate(found[name].values for name in self.scoring.axes):
                rewards[axis, slots] = values.double().view(len(slots), -1)
            self._report_missing(iteration, [groups[slot] for slot in slots], found)
        waited = time.monotonic() - rolled_out
        rewards = distributed.summed(self.device, rewards)
        self.scoring.check_missing(rewards, self._wanted(groups))
        advantages = self.fusion(rewards, self._wanted(groups))
        if self.fusion.config.shuffled:
            advantages = shuffle(advantages, self.planner.seed, iteration)
        targets = self._targets(groups, advantages)
        facts = {
            "nfe": int(distributed.summed(self.device, torch.tensor(evaluations))) * self.policy.branches,
            "rollout_s": rollout_s,
            "decode_s": sum(scores.decode_s for _, scores in pending),
            "score_s": sum(scores.score_s for _, scores in pending),
            "wait_s": waited,
            "lambda_weight": {str(k): w for k, w in enumerate(targets.weights.tolist()) if w},
            **describe_rewards(self.scoring.axes, rewards, advantages, groups, self.sampler.config.distinct_noise),
        }
        return _Iteration(decisions, targets, facts)

    def _report_missing(self, iteration: int, groups: Sequence[Group], found: Mapping[str, Scores]) -> None:
        axes, size, wanted = self.scoring.axes, self.sampler.config.group_size, self._wanted(groups)
        lost = torch.stack([~found[axis].valid for axis in axes])
        if wanted is not None:
            lost = lost & wanted.repeat_interleave(size, 1)
        records = [
            {
                "iteration": iteration,
                "prompt": text,
                "member": place % size,
                "missing": [axis for axis, gone in zip(axes, lost[:, place].tolist(), strict=True) if gone],
                "error": self.scoring.last_error,
            }
            for place, text in enumerate(self._texts(groups))
            if lost[:, place].any()
        ]
        if records:
            self.on_missing(records)

    def _texts(self, groups: Sequence[Group]) -> list[str]:
        return [self.prompts.prompts[group.prompt] for group in groups for _ in range(self.sampler.config.group_size)]

    def _wanted(self, groups: Sequence[Group]) -> Tensor | None:
        return None if self.wanted is None else self.wanted[:, [group.prompt for group in groups]]

    def _targets(self, groups: Sequence[Group], advantages: Advantages) -> Targets:
        counted = advantages.counted
        trained = [group.trained for group in groups]
        weights = step_weights(self.lambda_, trained, counted, self.config.rectify)
        pulled = counted.double()
        if self.config.kl.gate == "outranks":
            pulled = pulled * outranks(advantages.per_reward)
        decisions = sum(count * len(steps) for count, steps in zip(counted.sum(1).tolist(), trained, strict=True))
        share = pulled / max(decisions, 1)
        return Targets(advantages.values.flatten(1), counted.flatten(), weights, self.lambda_, share.flatten())


def outranks(per_reward: Tensor) -> Tensor:
    """Samples whose first reward ranks higher in its group than their other rewards do on average; bool ``[P,G]``.

    Equal rewards share a rank, missing ones have none; where the first or all others are missing it is False.

    Args:
        per_reward: ``[R,P,G]``, NaN where missing.
    """
    here, others = per_reward[..., :, None], per_reward[..., None, :]
    ranks = ((others < here).double() + (others == here).double() / 2).sum(-1)
    ranks = ranks.masked_fill(per_reward.isnan(), torch.nan)
    return ranks[0] > ranks[1:].nanmean(0)
