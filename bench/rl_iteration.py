"""Times of whole RLHF iterations, arm beside arm, and what the arithmetic of :mod:`bench.rl_cost` expects of them.

Arms take turns within a round, on the same prompts, stochastic steps and noise. The expectation is made of the calls'
own times, taken in the same round: a sampling forward of one state and of a full batch, the stochastic step's forward,
a forward with its backward. Decoding, scoring, the optimizer and what else nobody shares are taken as measured, the
same for every arm. Noise, solver steps, loss and the host's own work are in the measured time alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reelforge.bench import timing
from reelforge.bench.rl_arms import Arm, Setting, Watched, kernels, now, policy, task
from reelforge.bench.rl_cost import Calls
from reelforge.bench.rl_world import World
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.engine.core import rng
from reelforge.engine.rl.policy import Policy
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.engine.train.state import OptimizerConfig, TrainState

_TIMESTEP = 500.0
_STILL = OptimizerConfig(lr=1e-8, warmup_steps=0)  # every step is a whole one, and the weights stay where they are
_SHORT_CALL_S, _REPEATS = 0.2, 3
Announce = Callable[[Arm], None]


@dataclass(frozen=True)
class Split:
    """Seconds of one iteration.

    Attributes:
        prefix: of the rollouts, up to the stochastic step and with it, where a group shares it.
        branches: the rest of the rollouts.
        decode, score: frames and rewards; beside the next rollout under overlap.
        wait: for the last scores, under overlap.
        train: forwards and backwards of the update.
        rest: optimizer, advantages, plan.
        total: all of it; what runs beside something else counts once.
    """

    prefix: float
    branches: float
    decode: float
    score: float
    wait: float
    train: float
    rest: float
    total: float


PARTS = tuple(field.name for field in fields(Split))


@dataclass(frozen=True)
class Round:
    """One turn of every arm.

    Attributes:
        steps: the groups' stochastic steps.
        splits: by arm.
        calls: by whether the network is called as the reference loop does.
    """

    steps: tuple[int, ...]
    splits: dict[str, Split]
    calls: dict[bool, Calls]


class Bench:
    """Arms of one world and setting, ready to run.

    Args:
        world: what they share.
        setting: size of an iteration.
        arms: to run, in this order.
    """

    def __init__(self, world: World, setting: Setting, arms: Sequence[Arm]) -> None:
        self.world, self.setting, self.arms = world, setting, tuple(arms)
        self.device = world.model.proj_out.weight.device
        self.tasks = {arm.name: task(world, arm, setting) for arm in arms}
        self.state = TrainState(world.trained, _STILL, steps=1)
        self._engines = {arm.plain: arm for arm in arms}

    def warm_up(self) -> None:
        """Compile, plan and allocate: every call once."""
        for arm in self._engines.values():
            self._calls(arm, repeats=1)

    def rounds(
        self, most: int, deadline: float, clocks: ClockSampler, announce: Announce = lambda arm: None
    ) -> Iterator[Round]:
        """One round, and then as many up to ``most`` as end before ``deadline`` (of ``time.monotonic``)."""
        for number in range(max(1, most)):
            start = time.monotonic()
            yield self._round(number, clocks, announce)
            if 2 * time.monotonic() - start > deadline:
                return

    def _round(self, number: int, clocks: ClockSampler, announce: Announce) -> Round:
        splits = {}
        for arm in self.arms:
            announce(arm)
            with clocks.arm(arm.name):
                splits[arm.name] = self.turn(arm, number)
        return self.as_round(number, splits)

    def turn(self, arm: Arm, number: int) -> Split:
        """Iteration ``number`` under ``arm``."""
        with kernels(arm, self.device):
            return iterate(self.tasks[arm.name], self.state, number, self.device)

    def as_round(self, number: int, splits: dict[str, Split]) -> Round:
        """The arms' turns at iteration ``number`` with the times of the calls that they are made of, taken now."""
        plan = self.tasks[self.arms[0].name].planner.iteration(number)
        calls = {plain: self._calls(arm, _REPEATS) for plain, arm in self._engines.items()}
        return Round(tuple(group.stochastic[0] for group in plan), splits, calls)

    def _calls(self, arm: Arm, repeats: int) -> Calls:
        """Times of the network's calls under ``arm``."""
        actor, states = policy(self.world, arm), min(self.setting.group_size, self.setting.batch)
        actor.prepare([0])
        one, many = inputs(self.world, 1), inputs(self.world, states)
        work = (
            lambda: actor.sample(*one),
            lambda: actor.sample(*many),
            lambda: actor.detached_train(*one),
            lambda: train_on(actor, self.world, *one),
        )
        with kernels(arm, self.device):
            single, full, decision, train = (self._seconds(call, repeats) for call in work)
        each = (full - single) / (states - 1)
        return Calls(max(0.0, single - each), each, decision, train)

    def _seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Of one call: the median of several where they are short."""
        found: list[float] = []
        while not found or (len(found) < repeats and found[0] < _SHORT_CALL_S):
            start = now(self.device)
            call()
            found.append(now(self.device) - start)
        return statistics.median(found)


def iterate(task: GrpoTask, state: TrainState, number: int, device: torch.device) -> Split:
    """One iteration with its update."""
    watched = task.sampler
    assert isinstance(watched, Watched), "a task of the bench's"
    watched.seconds.clear()
    start = now(device)
    state.optimizer_step(task.losses(number))
    total = now(device) - start
    facts = task.describe(range(number, number + 1))
    rollout, prefix = watched.seconds["rollout"], watched.seconds["prefix"]
    decode, score, wait, train = (facts[name] for name in ("decode_s", "score_s", "wait_s", "train_s"))
    overlap = task.scoring.config.overlap
    rest = total - rollout - train - (wait if overlap else decode + score)
    return Split(prefix, rollout - prefix, decode, score, wait if overlap else 0.0, train, rest, total)


def inputs(world: World, states: int) -> tuple[Tensor, Tensor, list[int]]:
    """Noise, timesteps and prompts of so many states."""
    device = world.model.proj_out.weight.device
    x = rng.normal([rng.key("rl_bench", state) for state in range(states)], world.latent, device)
    return x, torch.full((states,), _TIMESTEP, device=device), [0] * states


def train_on(actor: Policy, world: World, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> None:
    """A training forward and backward whose gradient is dropped."""
    actor.train(x, timestep, prompts).float().square().mean().backward()
    for parameter in world.trained.values():
        parameter.grad = None


# -- what arithmetic expects -------------------------------------------------------------------------------------------


def expected(bench: Bench, arm: Arm, found: Round) -> Split:
    """An arm's iteration from the round's calls; what is not the network's is the median of the arms'."""
    setting, calls = bench.setting, found.calls[arm.plain]
    layout = setting.layout(arm)
    shared = [layout.distinct_noise * calls.decision + k * calls.sample(layout.distinct_noise) for k in found.steps]
    rollouts = [layout.rollout(k, calls, setting.batch) for k in found.steps]
    train = len(rollouts) * layout.training(calls)
    serial = [found.splits[each.name] for each in bench.arms if not each.overlap] or list(found.splits.values())
    decode, score = (statistics.median(getattr(split, part) for split in serial) for part in ("decode", "score"))
    rest = statistics.median(split.rest for split in found.splits.values())
    wait = pipeline(rollouts, (decode + score) / len(rollouts)) - sum(rollouts) if arm.overlap else 0.0
    beside = wait if arm.overlap else decode + score
    prefix = sum(shared) if arm.shared else 0.0
    total = sum(rollouts) + beside + train + rest
    return Split(prefix, sum(rollouts) - prefix, decode, score, wait, train, rest, total)


def pipeline(rollouts: Sequence[float], scoring: float) -> float:
    """When the last batch is scored if each is scored beside the next one's rollout, one at a time."""
    rolled = scored = 0.0
    for seconds in rollouts:
        rolled += seconds
        scored = max(rolled, scored) + scoring
    return scored


def median_calls(found: Sequence[Round], plain: bool) -> Calls:
    """Over the rounds."""
    names = [field.name for field in fields(Calls)]
    return Calls(*(statistics.median(getattr(each.calls[plain], name) for each in found) for name in names))


def times(found: Sequence[Round], arm: Arm, part: str = "total") -> timing.Times:
    """A part of an arm's seconds, one sample a round."""
    samples = tuple((getattr(each.splits[arm.name], part),) for each in found)
    return timing.Times("wall", "warm", 1, 1, samples, None, rest=0.0)


@dataclass(frozen=True)
class Comparison:
    """Time of one arm over another's.

    Attributes:
        measured: ratios of the rounds.
        expected: from each round's calls, the median.
        forwards: by the count of forwards, as if nothing else took time.
    """

    measured: timing.Spread
    expected: float
    forwards: float


def compare(bench: Bench, found: Sequence[Round], arm: Arm, other: Arm) -> Comparison:
    """How many times as long ``other`` takes."""
    ratios = [expected(bench, other, each).total / expected(bench, arm, each).total for each in found]
    counted = forwards(bench, other, found) / forwards(bench, arm, found)
    return Comparison(times(found, arm).ratios(times(found, other)), statistics.median(ratios), counted)


def forwards(bench: Bench, arm: Arm, found: Sequence[Round], rollout: bool = True) -> float:
    """Forwards of a network row that an iteration costs, mean over the rounds; without ``rollout`` its training's."""
    layout, units = bench.setting.layout(arm), bench.world.units
    rolled = sum(layout.rollout(k, units) for each in found for k in each.steps) / len(found)
    return rollout * rolled + bench.setting.prompts * layout.training(units)
