"""Cases of the sampler's step: noise, fork and replay at Wan's 480p latents.

An eager or compiled reference regenerates Philox in torch. What people run draws from torch's own generator, so that
is the peer: it draws noise of the same size, and adds the noise of the keys, which it finds in memory, so that its
result can be checked.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reelforge.bench.cases.case import TOKENS, Case, Draw, Op, Operands, Work
from reelforge.kernels import philox, sde_replay, sde_step

# Channels, latent frames and positions of a whole video and of a chunk; a token is a patch of 2 x 2 positions.
SHAPES = {
    name: (16, tokens // TOKENS[-1], 4 * TOKENS[-1])
    for name, tokens in (("81 frames", TOKENS[0]), ("3-frame chunk", TOKENS[1]))
}
GROUP = 8
GUIDANCE = 4.5
ROUNDING = 1e-6  # fp32 arithmetic on the same noise


def _keys(draw: Draw, members: int) -> Tensor:
    return torch.arange(1, members + 1, device=draw.device) * 0x1234_5678_9ABC_DEF


def _offsets(draw: Draw, groups: int, members: int) -> Tensor | None:
    """One member leaves each state but the first, from which a whole group forks."""
    if groups == members:
        return None
    first = members - groups + 1
    return torch.tensor([0, *range(first, members + 1)], dtype=torch.int32, device=draw.device)


def _fork(name: str, groups: int, members: int, *, guided: bool = False, ode: bool = False) -> Case:
    shape = SHAPES[name]

    def inputs(draw: Draw) -> Operands:
        x = draw(groups, *shape, dtype=torch.float32)
        velocity = draw(groups, *shape)
        v_uncond = draw(groups, *shape) if guided else None
        a, b, std = (draw(groups, dtype=torch.float32, scale=0.01, mean=mean) for mean in (0.95, -0.03, 0.3))
        keys = None if ode else _keys(draw, members)
        noise = None if keys is None else philox.reference(keys, math.prod(shape)).view(members, *shape)
        return x, velocity, v_uncond, a, b, std, keys, None if ode else _offsets(draw, groups, members), noise

    state = math.prod(shape)
    kept = guided and groups < members
    work = Work((4 + 2 + 2 * guided + 4 * kept) * groups * state + 4 * members * state)
    variant = ("" if members == 1 else f" {groups} to {members}") + " cfg" * guided + " ode" * ode
    peers: Mapping[str, Op] = {} if ode else {"torch.randn": _drawn}
    return Case("sde_step", name + variant, inputs, _run_fork, _fork_reference, work, ROUNDING, peers=peers)


def _run_fork(
    x: Tensor, velocity: Tensor, v_uncond: Tensor | None, a: Tensor, b: Tensor, std: Tensor, keys: Tensor | None,
    offsets: Tensor | None, _: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A guided group keeps its velocity for training."""
    keep = v_uncond is not None and offsets is not None
    options = {"v_uncond": v_uncond, "guidance_scale": GUIDANCE, "keep_velocity": keep}
    result = sde_step.fork(x, velocity, a, b, std, keys, offsets, **options)  # type: ignore[arg-type]
    return tuple(tensor for tensor in result if tensor is not None)


def _fork_reference(
    x: Tensor, velocity: Tensor, v_uncond: Tensor | None, a: Tensor, b: Tensor, std: Tensor, keys: Tensor | None,
    offsets: Tensor | None, _: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    v = velocity if v_uncond is None else sde_step.guide(v_uncond, velocity, GUIDANCE)
    result = sde_step.reference(x, v, a, b, std, keys, offsets)
    return (result,) if v_uncond is None or offsets is None else (result, v)


def _drawn(
    x: Tensor, velocity: Tensor, v_uncond: Tensor | None, a: Tensor, b: Tensor, std: Tensor, _: Tensor | None,
    offsets: Tensor | None, noise: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The chain of torch operations that samplers run, the mean computed once a group."""
    torch.randn_like(noise)
    v = velocity if v_uncond is None else sde_step.guide(v_uncond, velocity, GUIDANCE)
    mean = sde_step.sde_step(x, v, a, b, std, None)
    if offsets is None:
        return (mean + std.view(-1, 1, 1, 1) * noise,)
    group = sde_step.group_of(offsets, len(noise))
    result = mean[group] + std[group].view(-1, 1, 1, 1) * noise
    return (result,) if v_uncond is None else (result, v)


def _replay(name: str, members: int) -> Case:
    """Forward and backward for one group, or one sample, in fp32: what guidance leaves."""
    shape = SHAPES[name]

    def inputs(draw: Draw) -> Operands:
        velocity = draw(1, *shape, dtype=torch.float32, grad=True)
        old = velocity.detach() + draw(1, *shape, dtype=torch.float32, scale=0.05)
        keys = _keys(draw, members)
        noise = philox.reference(keys, math.prod(shape)).view(members, *shape)
        return velocity, old, keys, _offsets(draw, 1, members), noise

    state = math.prod(shape)
    work = Work(5 * 4 * state)
    variant = "" if members == 1 else f" 1 to {members}"
    peers = {"stored noise": _stored}
    return Case(
        "sde_replay", name + variant, inputs, _run_replay, _replay_reference, work, ROUNDING, backward=True, peers=peers
    )


def _run_replay(velocity: Tensor, old: Tensor, keys: Tensor, offsets: Tensor | None, _: Tensor) -> tuple[Tensor, ...]:
    return sde_replay.replay(velocity, old, keys, offsets)


def _replay_reference(
    velocity: Tensor, old: Tensor, keys: Tensor, offsets: Tensor | None, _: Tensor
) -> tuple[Tensor, ...]:
    return sde_replay.reference(velocity, old, keys, offsets)


def _stored(velocity: Tensor, old: Tensor, keys: Tensor, _: Tensor | None, noise: Tensor) -> tuple[Tensor, ...]:
    """The terms from noise that the rollout kept in memory."""
    slope, power = sde_replay.velocity_terms(velocity, old, noise)
    return slope, power.expand(len(keys))


def _noise(name: str, draws: int) -> Case:
    count = math.prod(SHAPES[name])

    def inputs(draw: Draw) -> Operands:
        return (_keys(draw, draws),)

    def run(keys: Tensor) -> Tensor:
        return philox.normal(keys, count)

    def reference(keys: Tensor) -> Tensor:
        return philox.reference(keys, count)

    return Case("philox", f"{name} x {draws}", inputs, run, reference, Work(4 * draws * count), tolerance=0.0)


CASES = [
    _fork("81 frames", 1, 1),
    _fork("81 frames", 1, 1, guided=True),
    _fork("81 frames", 1, 1, guided=True, ode=True),
    _fork("81 frames", 1, GROUP),
    _fork("81 frames", 1, GROUP, guided=True),
    _fork("3-frame chunk", 1, 1),
    _fork("3-frame chunk", 1, GROUP),
    _fork("3-frame chunk", 4, 11, guided=True),
    _replay("81 frames", GROUP),
    _replay("81 frames", 1),
    _replay("3-frame chunk", GROUP),
    _noise("81 frames", 1),
    _noise("3-frame chunk", GROUP),
]
