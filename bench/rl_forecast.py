"""What a run will do, and what that takes: counted from its plan and from one timed probe of the real shapes.

Rows are network rows: a velocity under guidance is two. Seconds are those of sampling, training and decoding, one
after the other; scoring is somebody else's code and comes on top.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.rl.plan import Group, PlanConfig, Planner, evaluations
from reelforge.engine.rl.policy import Policy

_SAMPLED_ITERATIONS = 64
_PROBE_TIMESTEP = 500.0


@dataclass(frozen=True)
class Work:
    """An iteration's work, the mean over the run.

    Attributes:
        prompts, samples, distinct_noise: groups, their members, their initial noises.
        steps: how many of the first iteration's groups have noise at each step.
        rows: network rows of the rollouts.
        independent_rows: the same if every sample started from noise of its own.
        trained_states: forwards and backwards an optimizer step, one a state.
        trained_samples: with one for each sample and trained step.
        busiest_rows, busiest_states, busiest_clips: of ``rows``, ``trained_states`` and samples on the busiest rank.
        states_per_forward: in training, on average: states of one step and one batch of groups go together.
    """

    prompts: int
    samples: int
    distinct_noise: int
    steps: dict[int, int]
    rows: float
    independent_rows: int
    trained_states: float
    trained_samples: float
    busiest_rows: float
    busiest_states: float
    busiest_clips: int
    states_per_forward: float

    @property
    def saved(self) -> float:
        """Share of the independent rollouts' rows that sharing saves."""
        return 1 - self.rows / self.independent_rows


def work(planner: Planner, iterations: int, branches: int, world_size: int, batch_groups: int, train_rows: int) -> Work:
    """Count a run's work; of a long run, in iterations spread evenly over it.

    Args:
        planner: of the run.
        iterations: its length.
        branches: network rows a velocity.
        world_size: ranks that share it.
        batch_groups: groups that are rolled out together.
        train_rows: most states a training forward.

    Raises:
        ConfigError: there are fewer pairs of groups than ranks.
    """
    config, first = planner.config, planner.iteration(0)
    numbers = range(0, iterations, -(-iterations // _SAMPLED_ITERATIONS))
    plans = [planner.iteration(number) for number in numbers]
    shares = [planner.share(0, rank, world_size) for rank in range(world_size)]

    def mean(count: Callable[[Group], int], slots: Iterable[int]) -> float:
        return sum(count(plan[slot]) for slot in slots for plan in plans) / len(plans)

    def rows(group: Group) -> int:
        return branches * evaluations(group, config, planner.num_steps)

    def states(group: Group) -> int:
        return trained_states(group, config)

    def forwards(number: int) -> int:
        own, plan = planner.share(number, 0, world_size), planner.iteration(number)
        parts = [own[start : start + batch_groups] for start in range(0, len(own), batch_groups)]
        counts = [sum((Counter(_states_at(plan[slot], config)) for slot in part), Counter()) for part in parts]
        return sum(-(-states // train_rows) for count in counts for states in count.values())

    everyone = range(planner.groups)
    calls = sum(map(forwards, numbers)) / len(plans)
    return Work(
        planner.groups, config.group_size, config.distinct_noise,
        dict(sorted(Counter(k for group in first for k in group.stochastic).items())),
        mean(rows, everyone), branches * planner.groups * config.group_size * planner.num_steps,
        mean(states, everyone), mean(lambda group: config.group_size * len(group.trained), everyone),
        max(mean(rows, share) for share in shares), max(mean(states, share) for share in shares),
        max(map(len, shares)) * config.group_size, mean(states, shares[0]) / calls,
    )  # fmt: skip


def trained_states(group: Group, config: PlanConfig) -> int:
    """Training forwards of a group: M at its first stochastic step, where members are still together, G later."""
    return sum(_states_at(group, config).values())


def _states_at(group: Group, config: PlanConfig) -> dict[int, int]:
    """Trained states at each step."""
    first = group.stochastic[0]
    return {k: config.distinct_noise if k == first else config.group_size for k in group.trained}


@dataclass(frozen=True)
class Rates:
    """What the probe measured.

    Attributes:
        row_s: a network row of a deterministic step.
        train_s: forward and backward of a state.
        decode_s: a clip.
        velocity_bytes: a stored velocity.
        peak_bytes: most device memory in use during the probe; 0 on a CPU.
    """

    row_s: float
    train_s: float
    decode_s: float
    velocity_bytes: int
    peak_bytes: int


def probe(
    policy: Policy, decode: Callable[[Tensor], Any], shape: Sequence[int], sample_rows: int, train_rows: int
) -> Rates:
    """Time a forward of the rollout, a forward and backward of training, and decoding, each after a warm-up.

    Args:
        policy: whose weights keep their values; gradients are dropped.
        decode: latents ``[B,C,T,H,W]`` to frames.
        shape: of a latent, ``[C,T,H,W]``.
        sample_rows, train_rows: states a forward of either path.
    """
    device = policy.device
    policy.prepare([0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def states(rows: int) -> tuple[Tensor, Tensor, list[int]]:
        x = rng.normal([rng.key("rl_probe", row) for row in range(rows)], shape, device)
        return x, torch.full((rows,), _PROBE_TIMESTEP, device=device), [0] * rows

    def train() -> Tensor:
        velocity = policy.train(*states(train_rows))
        velocity.float().square().mean().backward()
        for parameter in policy.model.parameters():
            parameter.grad = None
        return velocity.detach()

    row_s = _seconds(lambda: policy.sample(*states(sample_rows)), device) / (sample_rows * policy.branches)
    velocity_bytes = train()[0].nbytes
    train_s = _seconds(train, device, warm_up=False) / train_rows
    decode_s = _seconds(lambda: decode(states(1)[0]), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Rates(row_s, train_s, decode_s, velocity_bytes, peak)


def _seconds(call: Callable[[], Any], device: torch.device, warm_up: bool = True) -> float:
    if warm_up:
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(policy: Policy, trained: Iterable[Tensor], todo: Work, rates: Rates, shape: Sequence[int]) -> dict[str, int]:
    """Bytes on the busiest rank that no setting of batch sizes changes; activations come on top.

    Args:
        policy: with the weights.
        trained: those that train, fp32.
        todo: an iteration's work.
        rates: of the probe.
        shape: of a latent.
    """
    weights = sum(tensor.nbytes for tensor in policy.model.parameters())
    learnt = sum(tensor.nbytes for tensor in trained)
    frozen = sum(tensor.nbytes for tensor in policy.frozen.parameters()) if policy.frozen else 0
    state = 4 * torch.Size(shape).numel() + rates.velocity_bytes
    return {
        "weights": weights,
        "gradients": learnt,
        "adam": 2 * learnt,
        "average": learnt,
        "reference": frozen,
        "states": round(todo.busiest_states * state),
    }


@dataclass(frozen=True)
class Forecast:
    """All of it.

    Attributes:
        iterations: in the run.
        updates: optimizer steps each.
        world_size: ranks.
        work: of an iteration.
        memory: bytes, see :func:`memory`.
        rates: of the probe.
        reference_rows: network rows of the KL term, an optimizer step on the busiest rank.
        held_out_rows: network rows of the held-out clips, over the whole run and all ranks.
    """

    iterations: int
    updates: int
    world_size: int
    work: Work
    memory: dict[str, int]
    rates: Rates
    reference_rows: float = 0.0
    held_out_rows: int = 0

    @property
    def iteration_s(self) -> float:
        """On the busiest rank, without scoring."""
        todo, rates = self.work, self.rates
        update_s = todo.busiest_states * rates.train_s + self.reference_rows * rates.row_s
        return todo.busiest_rows * rates.row_s + self.updates * update_s + todo.busiest_clips * rates.decode_s

    @property
    def device_hours(self) -> float:
        """Of the whole run, without scoring."""
        held_out_s = self.held_out_rows * self.rates.row_s
        return (self.iterations * self.iteration_s * self.world_size + held_out_s) / 3600

    def facts(self) -> dict[str, Any]:
        """As plain values, for plan.json."""
        estimates = {"saved": self.work.saved, "iteration_s": self.iteration_s, "device_hours": self.device_hours}
        return dataclasses.asdict(self) | estimates

    def lines(self, noise: str, num_steps: int, device: str) -> list[str]:
        """For a person to read.

        Args:
            noise: the noise rate in words.
            num_steps: of the sampler.
            device: in words.
        """
        todo, rates, size = self.work, self.rates, self.memory
        steps = ", ".join(f"{k} ({groups})" for k, groups in todo.steps.items())
        noises = "one initial noise" if todo.distinct_noise == 1 else f"{todo.distinct_noise} initial noises"
        parts = ", ".join(f"{name} {_bytes(value)}" for name, value in size.items() if value)
        peak = f"; the probe's peak was {_bytes(rates.peak_bytes)}" if rates.peak_bytes else ""
        held_out = "nothing is watched: without [held_out] a reward that is gamed goes unnoticed"
        if self.held_out_rows:
            held_out = f"{self.held_out_rows:,} network evaluations in all"
        return [
            f"plan: {self.iterations} iterations of {todo.prompts} prompts x {todo.samples} samples, {noises} a prompt",
            f"  noise: {noise} at steps (groups of the first iteration) {steps} of {num_steps}",
            f"  rollout: {todo.rows:,.0f} network evaluations an iteration, independent samples would take"
            f" {todo.independent_rows:,}: {todo.saved:.0%} saved",
            f"  training: {todo.trained_states:,.0f} forwards and backwards an optimizer step, one per sample would be"
            f" {todo.trained_samples:,.0f}; optimizer steps an iteration: {self.updates}",
            f"  held out: {held_out}",
            f"  memory a device, activations not counted: {_bytes(sum(size.values()))} = {parts}{peak}",
            f"  measured on {device}: {rates.row_s:.3g} s a network evaluation, {rates.train_s:.3g} s a trained state,"
            f" {rates.decode_s:.3g} s a decoded clip",
            f"  so {self.iteration_s:.3g} s an iteration and {self.device_hours:.3g} device-hours in all on"
            f" {self.world_size} device{'s' * (self.world_size > 1)}, scoring not counted",
        ]  # fmt: skip


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
