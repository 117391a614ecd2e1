"""The arms of an RLHF iteration, each a step from the one before it:

    flash        Flash-GRPO's structure: independent noise, a training forward for every sample, guidance in two
                 calls, text projected in each, plain torch kernels, scoring between rollouts
    independent  the engine's network: guidance in one forward, text projected once, fused kernels where there are any
    shared       one initial noise and one ODE prefix a group
    collapsed    one training forward and backward a group
    ours         scoring beside the next rollout

All of them are the engine's own task, sampler and loss; what differs is configuration, and for the first three a list
of decisions with one member each.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reelforge.bench.records import OURS
from reelforge.bench.rl_cost import Layout
from reelforge.bench.rl_world import World
from reelforge.engine.core import rng
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.model.generation import half_precision
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.advantage import Fusion, FusionConfig
from reelforge.engine.rl.loss import LossConfig
from reelforge.engine.rl.plan import Group, PlanConfig, Planner
from reelforge.engine.rl.policy import PathConfig, Policy, SamplePrecision, TrainingPath
from reelforge.engine.rl.prompts import PromptSet
from reelforge.engine.rl.rollout import Actor, Decision, Rollout, Sampler
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.kernels import dispatch
from reelforge.kernels.sde_step import group_of, guide

SEED = 0
FUSED_ATTENTION, PLAIN_ATTENTION = "cudnn", "sdpa"
# The ops inside the network; what steps, regenerates noise and averages weights is the same for all arms.
_NETWORK_OPS = ("gated_residual_norm", "gelu", "norm_modulate", "qk_norm_rope", "qk_norm_rope_into", "rms_norm")


@dataclass(frozen=True)
class Arm:
    """One way to run an iteration.

    Attributes:
        name: as records name it.
        plain: the network as the reference loop calls it.
        shared: one initial noise a group.
        collapsed: one training forward a group.
        overlap: scoring beside the next rollout.
    """

    name: str
    plain: bool = False
    shared: bool = True
    collapsed: bool = True
    overlap: bool = True


FLASH = Arm("flash", plain=True, shared=False, collapsed=False, overlap=False)
INDEPENDENT = Arm("independent", shared=False, collapsed=False, overlap=False)
SHARED = Arm("shared", collapsed=False, overlap=False)
COLLAPSED = Arm("collapsed", overlap=False)
FULL = Arm(OURS)
CHAIN = (FLASH, INDEPENDENT, SHARED, COLLAPSED, FULL)


@dataclass(frozen=True)
class Setting:
    """Size of an iteration.

    Attributes:
        group_size: G.
        num_steps: T.
        steps: half-open range of the steps that may be stochastic.
        prompts: groups, P; an even number makes every iteration cost the same.
        batch: states a sampling forward at most.
    """

    group_size: int
    num_steps: int
    steps: tuple[int, int]
    prompts: int
    batch: int = 8

    def layout(self, arm: Arm) -> Layout:
        """Of a group under ``arm``."""
        noises = 1 if arm.shared else self.group_size
        return Layout(self.group_size, self.num_steps, self.steps[1] - self.steps[0], noises, arm.collapsed)

    def plan(self, arm: Arm) -> PlanConfig:
        return PlanConfig(self.group_size, 1 if arm.shared else self.group_size, self.steps)

    def planner(self, arm: Arm, prompts: int) -> Planner:
        return Planner(self.plan(arm), SEED, prompts, self.prompts, self.num_steps)

    @property
    def label(self) -> str:
        first, end = self.steps
        steps = f"k {first}" if end - first == 1 else f"k {first}-{end - 1}"
        return f"G {self.group_size} T {self.num_steps} {steps} P {self.prompts}"


# -- the reference loop's network --------------------------------------------------------------------------------------


class TwoCalls(Policy):
    """Guidance as the reference loop has it: two forwards, each of which projects its text."""

    def sample(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self._velocity(self.model, x, timestep, prompts, self.config.sample_precision)

    def _trained_path(self, model: WanTransformer, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        return self._velocity(model, x, timestep, prompts, self.precision)

    def _velocity(
        self, model: WanTransformer, x: Tensor, timestep: Tensor, prompts: Sequence[int], precision: SamplePrecision
    ) -> Tensor:
        assert self._embeddings is not None, "prepare first"
        text = self._embeddings[[self._rows[prompt] for prompt in prompts]]
        with half_precision(x.device, self._autocasts(precision)):
            v_cond = model(x, timestep, text)
            if self.branches == 1:
                return v_cond
            v_uncond = model(x, timestep, self._embeddings[:1].expand_as(text))
        return guide(v_uncond, v_cond, self.config.guidance_scale)


@contextmanager
def kernels(arm: Arm, device: torch.device) -> Iterator[None]:
    """The network's ops pinned: plain torch for the reference loop, ours elsewhere; a CPU has one way."""
    with ExitStack() as stack:
        if device.type == "cuda":
            attention = PLAIN_ATTENTION if arm.plain else FUSED_ATTENTION
            stack.enter_context(dispatch.pinned("attention", attention))
            for op in _NETWORK_OPS:
                stack.enter_context(dispatch.pinned(op, dispatch.REFERENCE if arm.plain else "triton"))
        yield


def policy(world: World, arm: Arm) -> Policy:
    """The world's network as ``arm`` calls it."""
    kind = TwoCalls if arm.plain else Policy
    path = PathConfig(world.guidance_scale, sample_precision=world.precision)
    return kind(world.model, world.text, path, world.precision)


# -- samplers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Sampler):
    """A sampler under a stopwatch.

    Attributes:
        collapsed: keep each group's decision whole; otherwise one decision a member.
        seconds: since they were last cleared, of ``rollout`` and, part of it, of the ``prefix`` up to and with the
            stochastic step; what shares nothing has no prefix.
    """

    collapsed: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(
        self, actor: Actor, groups: Sequence[Group], slots: Sequence[int], iteration: int, device: torch.device
    ) -> Rollout:
        with self.timed("rollout", device):
            rolled = super().run(_Stopwatch(actor, self, device), groups, slots, iteration, device)
        if self.collapsed:
            return rolled
        return replace(rolled, decisions=tuple(part for whole in rolled.decisions for part in apart(whole)))

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add a block's time, the device's work included."""
        start = now(device)
        yield
        self.seconds[name] += now(device) - start


class _Stopwatch:
    """An actor that books what it does on one state for the whole group."""

    def __init__(self, actor: Actor, sampler: Watched, device: torch.device) -> None:
        self._actor, self._sampler, self._device = actor, sampler, device
        noises = sampler.config.distinct_noise
        self._prefix_states = noises if noises < sampler.config.group_size else 0
        self.path: Callable[[int], TrainingPath] = actor.path

    def sample(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        if len(x) != self._prefix_states:
            return self._actor.sample(x, timestep, prompts)
        with self._sampler.timed("prefix", self._device):
            return self._actor.sample(x, timestep, prompts)

    def detached_train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        if not self._prefix_states:
            return self._actor.detached_train(x, timestep, prompts)
        with self._sampler.timed("prefix", self._device):
            return self._actor.detached_train(x, timestep, prompts)


def apart(decision: Decision) -> Iterator[Decision]:
    """The decision's members as decisions of their own: the same loss in one forward each."""
    states = group_of(decision.offsets, len(decision.keys)).tolist()
    single = decision.offsets.new_tensor([0, 1])
    for member, state in enumerate(states):
        at, row = slice(state, state + 1), slice(member, member + 1)
        yield replace(
            decision, x=decision.x[at], velocity=decision.velocity[at], timestep=decision.timestep[at],
            prompts=decision.prompts[at], keys=decision.keys[row], offsets=single, members=decision.members[row],
        )  # fmt: skip


def now(device: torch.device) -> float:
    """Host clock when this stream has nothing left to do; scoring has one of its own, which goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


# -- tasks -------------------------------------------------------------------------------------------------------------


def sampler(world: World, arm: Arm, setting: Setting) -> Watched:
    """Rolls out under ``arm``; one state a training forward, so that members apart take the path they take together."""
    ids = [rng.key("prompt:" + prompt) for prompt in world.prompts]
    grid = world.schedule.grid(setting.num_steps)
    return Watched(
        setting.plan(arm), grid, NoiseRate(), ids, world.latent, SEED, setting.batch, 1, collapsed=arm.collapsed
    )


def task(world: World, arm: Arm, setting: Setting) -> GrpoTask:
    """The engine's iteration under ``arm``; its sampler is :class:`Watched`."""
    scoring = Scoring(world.scorers, world.decode, ScoringConfig(overlap=arm.overlap))
    prompts = PromptSet(world.prompts, ((),) * len(world.prompts))
    return GrpoTask(
        policy(world, arm), sampler(world, arm, setting), setting.planner(arm, len(world.prompts)), scoring,
        Fusion(FusionConfig(), scoring.axes), prompts, LossConfig(), updates=1, rollout_groups=1,
    )  # fmt: skip
