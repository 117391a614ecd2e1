"""The replayed backward against the joint graph of all chunks: gradient, time and what each keeps.

The joint graph is the loop as public trainers have it, keys and values of the past detached: every chunk's exit step
runs with gradient, and one backward follows the last chunk. It lives here, as the arm to compare with; the engine has
no such loop.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from reelforge.bench import measure
from reelforge.bench.distill_world import World
from reelforge.bench.rl_arms import now
from reelforge.bench.rl_training import saved_bytes
from reelforge.engine.core import rng
from reelforge.engine.distill.self_forcing import Rollout, exit_steps, replay, roll_out
from reelforge.engine.flow.sampler import few_step_state, initial_noise, predict_x0, step_keys, timesteps
from reelforge.engine.model.generation import ChunkDecoder, Guidance, frames_of, half_precision

SEED = 0


def decoder(world: World) -> ChunkDecoder:
    """For one rollout of the world's clips."""
    student, text = world.student, world.text[:-1]
    guidance = Guidance(text, text[:0], 1.0)
    return ChunkDecoder(student.model, guidance, max(student.pattern), sum(student.pattern), student.shape[-2:])


def exits_of(world: World) -> list[int]:
    """A step of its own for every chunk."""
    return exit_steps("per_chunk", SEED, 0, len(world.student.pattern), world.student.grid.num_steps)


def _noises(world: World) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Where clips start, and fresh noise after each step."""
    student, members = world.student, range(world.batch)
    noise = initial_noise(SEED, world.ids, members, student.shape, device=world.device)
    keys = step_keys(SEED, world.ids, members, student.grid.num_steps, device=world.device)
    return noise, lambda k: rng.normal(keys[k], student.shape)


def rolled(world: World, exits: Sequence[int]) -> Rollout:
    """The engine's rollout."""
    noise, renoise = _noises(world)
    with _half(world):
        return roll_out(decoder(world), noise, world.student.grid, renoise, world.student.pattern, exits)


def replayed_chunks(world: World, found: Rollout) -> list[Callable[[], Tensor]]:
    """Calls that give each chunk's x0 with gradient."""

    def chunk(index: int) -> Tensor:
        with _half(world):
            return replay(world.student.model, found, found.exits[index], world.text[:-1], world.student.grid)

    return [partial(chunk, index) for index in range(len(found.exits))]


def joint(world: World, exits: Sequence[int]) -> Tensor:
    """x0 ``[B,C,T,H,W]`` of a rollout whose exit steps are one graph."""
    student, parts = world.student, []
    noise, renoise = _noises(world)
    with _half(world):
        decoding = decoder(world)
    for frames, step in zip(student.pattern, exits, strict=True):
        span = decoding.span(frames)
        with _half(world):
            x = few_step_state(
                decoding.velocity(frames), noise[:, :, span], student.grid, frames_of(renoise, span), step
            )
        # A region of its own: autocast keeps the casts of weights, and those made without gradient have none.
        with _half(world):
            chunk = decoding.cache.denoising(frames, frames * decoding.tokens_per_frame)
            v = student.model(x, timesteps(student.grid, step, x), world.text[:-1], chunk=chunk)
            parts.append(predict_x0(x, v, student.grid, step))
        if len(parts) < len(student.pattern):
            with _half(world):
                decoding.commit(parts[-1].detach())
    return torch.cat(parts, dim=2)


def _half(world: World) -> AbstractContextManager[object]:
    return half_precision(world.device, world.precision == "bf16")


# -- gradients ---------------------------------------------------------------------------------------------------------


def direction(world: World) -> Tensor:
    """A random dL/dx0, in place of the teacher's opinion; mean square 1 / numel."""
    keys = [rng.key("distill_bench_direction", row) for row in range(world.batch)]
    drawn = rng.normal(keys, world.student.shape, world.device)
    return drawn / drawn.numel()


def replayed_backward(world: World, found: Rollout, towards: Tensor) -> None:
    """A forward and backward of every chunk."""
    for state, call in zip(found.exits, replayed_chunks(world, found), strict=True):
        (call() * towards[:, :, state.frames]).sum().backward()


def joint_backward(world: World, exits: Sequence[int], towards: Tensor) -> None:
    """The rollout, and one backward."""
    (joint(world, exits) * towards).sum().backward()


def taken_gradient(model: nn.Module) -> Tensor:
    """All of it as one fp64 vector, on the CPU; the model has none then."""
    found = [parameter.grad.double().flatten().cpu() for parameter in model.parameters() if parameter.grad is not None]
    drop_gradient(model)
    return torch.cat(found)


def drop_gradient(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@dataclass(frozen=True)
class Checks:
    """Whether the cycle computes what it should.

    Attributes:
        gradient_error: relative L2 distance of the replayed gradient to the joint graph's, on the world's slice.
        replay_gap: largest difference of rolled-out and replayed samples over their root mean square, whole student.
        deterministic: two rollouts were the same bit for bit.
    """

    gradient_error: float
    replay_gap: float
    deterministic: bool


def check(world: World) -> Checks:
    """All three."""
    exits = exits_of(world)
    found, again = (rolled(world, exits) for _ in range(2))
    size, gaps = found.x0.square().mean().sqrt(), []
    for state, call in zip(found.exits, replayed_chunks(world, found), strict=True):
        gaps.append((call().detach() - found.x0[:, :, state.frames]).abs().amax() / size)
    return Checks(gradient_error(world.sliced()), torch.stack(gaps).max().item(), torch.equal(found.x0, again.x0))


def gradient_error(world: World) -> float:
    """Relative L2 distance of the replayed gradient to the joint graph's."""
    exits, towards, model = exits_of(world), direction(world), world.student.model
    drop_gradient(model)  # of whatever ran before
    replayed_backward(world, rolled(world, exits), towards)
    own = taken_gradient(model)
    joint_backward(world, exits, towards)
    exact = taken_gradient(model)
    return ((own - exact).norm() / exact.norm()).item()


# -- time and memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A student's share of a step, rollout included, replayed and as one graph.

    Attributes:
        layers: of the network it was measured on.
        expected: ratio of their times by arithmetic.
        replayed_s, joint_s: median seconds.
        replayed_bytes: most that one chunk's backward keeps of its forward, weights and the cache aside.
        joint_bytes: the same of all chunks.
        replayed_peak, joint_peak: bytes added to the device's memory at the peak; None on a CPU.
    """

    layers: int
    expected: float
    replayed_s: float
    joint_s: float
    replayed_bytes: int
    joint_bytes: int
    replayed_peak: float | None
    joint_peak: float | None


def compare(world: World, rounds: int) -> Comparison:
    """On the world's slice without checkpointing, in turns."""
    world = world.sliced()
    model, exits, towards = world.student.model, exits_of(world), direction(world)
    checkpointed, model.gradient_checkpointing = model.gradient_checkpointing, False
    ways: tuple[Callable[[], None], ...] = (
        lambda: replayed_backward(world, rolled(world, exits), towards),
        lambda: joint_backward(world, exits, towards),
    )
    peaks = [_peak(way, model, world.device) for way in ways]  # the first turns, which are not counted
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for way, taken in zip(ways, seconds, strict=True):
            start = now(world.device)
            way()
            taken.append(now(world.device) - start)
            drop_gradient(model)
    chunk_bytes = max(saved_bytes(call, model) for call in replayed_chunks(world, rolled(world, exits)))
    joint_bytes = saved_bytes(lambda: joint(world, exits), model)
    expected = world.layout.extra(world.network(model, world.name), exits)
    model.gradient_checkpointing = checkpointed
    replayed_s, joint_s = (statistics.median(taken) for taken in seconds)
    return Comparison(model.config.num_layers, expected, replayed_s, joint_s, chunk_bytes, joint_bytes, *peaks)


def _peak(way: Callable[[], None], model: nn.Module, device: torch.device) -> float | None:
    """Bytes that one turn, its gradient included, adds to the device's memory; None on a CPU."""

    def turn() -> None:
        way()
        drop_gradient(model)

    turn()
    found = measure.peak_memory(turn, device).peak_alloc_mb
    return None if found is None else 1e6 * found
