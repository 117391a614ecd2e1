"""The collapsed group loss against one loss a member from log-probabilities, its gradient, and the clip."""

import math

import parity
import pytest
import torch
from sync_guard import SyncGuard, fake_cuda
from torch import Tensor

from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.kernels import dispatch, philox
from reelforge.kernels.errors import KernelError
from reelforge.kernels.group_loss import GroupLoss, RatioForm, group_loss, log_ratio
from reelforge.kernels.sde_replay import Terms
from reelforge.kernels.sde_step import fork

GRID = FlowSchedule("unipc_flow", 3.0).grid(20)
KEYS = torch.tensor([11, 2**40 + 5, 2**63 - 1, 0, 2**31])
OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
OWNERS = [0, 0, 1, 1, 1]
STEPS = sde.coefficients(GRID, [4, 9], NoiseRate("wan"))
ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -2.0, 1.0])
WEIGHTS = torch.tensor([0.5, 0.5, 0.2, 0.4, 0.4])
SHAPE = (3, 2, 5)
NO_CLIP = (1.0, 1e9)


def velocities(step: float, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    old = parity.randn(0, 2, *SHAPE).cpu().to(dtype)
    return (old + step * parity.randn(1, 2, *SHAPE).cpu().to(dtype)).requires_grad_(), old


def collapsed(velocity: Tensor, old: Tensor, clip: tuple[float, float], form: RatioForm = "exact") -> GroupLoss:
    return group_loss(velocity, old, KEYS, OFFSETS, STEPS.lambda_, ADVANTAGES, WEIGHTS, clip, form)


def member_by_member(velocity: Tensor, old: Tensor, clip: tuple[float, float]) -> list[Tensor]:
    """Each member's loss from the log-densities of the state it went to."""
    x = parity.randn(2, 2, *SHAPE).cpu().double()
    noise = philox.reference(KEYS, math.prod(SHAPE)).double().view(-1, *SHAPE)
    losses = []
    for member, group in enumerate(OWNERS):
        one = slice(group, group + 1)
        at = sde.Coefficients(STEPS.a[one], STEPS.b[one], STEPS.std[one], STEPS.s[one])
        x_next = sde.step(x[one], old[one], at, noise[member : member + 1])
        log_probs = [sde.log_prob(x_next, sde.mean(x[one], v[one], at), at.std) for v in (velocity, old)]
        ratio = (log_probs[0] - log_probs[1]).exp()
        advantage = ADVANTAGES[member].double()
        held = ratio.clamp(1 - clip[0], 1 + clip[1])
        losses.append(-WEIGHTS[member] * torch.minimum(ratio * advantage, held * advantage).sum())
    return losses


@pytest.mark.parametrize("step", [0.05, 0.5])
@pytest.mark.parametrize("clip", [NO_CLIP, (1e-3, 1e-3), (0.02, 0.2)])
def test_loss_and_gradient_are_the_members(step: float, clip: tuple[float, float]) -> None:
    velocity, old = velocities(step)
    found = collapsed(velocity, old, clip)
    members = member_by_member(velocity, old, clip)
    torch.testing.assert_close(found.loss, torch.stack(members).sum(), rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(found.loss, velocity)
    separate = sum(torch.autograd.grad(loss, velocity, retain_graph=True)[0] for loss in members)
    torch.testing.assert_close(gradient, separate, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["exact", "debiased"])
def test_gradient_by_finite_differences(form: RatioForm) -> None:
    velocity, old = velocities(0.3)
    assert torch.autograd.gradcheck(lambda v: collapsed(v, old, (0.9, 9.0), form).loss, (velocity,))


@pytest.mark.parametrize("form", ["exact", "debiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_every_ratio_is_exactly_one(form: RatioForm, dtype: torch.dtype) -> None:
    velocity, old = velocities(0.0, dtype=dtype)
    found = collapsed(velocity, old, (1e-5, 1e-5), form)
    assert torch.equal(found.ratio, torch.ones(5, dtype=torch.float64))
    assert torch.equal(found.kl, torch.zeros(5, dtype=torch.float64))
    assert not found.clipped.any()
    torch.testing.assert_close(found.loss, -(WEIGHTS.double() * ADVANTAGES.double()).sum(), rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(found.loss, velocity)
    noise = philox.reference(KEYS, math.prod(SHAPE)).double().view(-1, *SHAPE)
    pushes = (WEIGHTS * ADVANTAGES).double().view(-1, 1, 1, 1) * noise * STEPS.lambda_[OWNERS].view(-1, 1, 1, 1)
    expected = torch.stack([pushes[:2].sum(0), pushes[2:].sum(0)]) / math.prod(SHAPE)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clip_on_both_sides(above: bool, advantage: float) -> None:
    """A ratio beyond the range loses its gradient exactly where the advantage would push it farther out."""
    noise = philox.reference(KEYS[:1], math.prod(SHAPE)).double().view(1, *SHAPE)
    old = parity.randn(0, 1, *SHAPE).cpu().double()
    velocity = (old - noise if above else old + noise).requires_grad_()
    one = torch.ones(1)
    found = group_loss(velocity, old, KEYS[:1], None, STEPS.lambda_[:1], advantage * one, one, (0.01, 0.02), "debiased")
    assert (found.ratio > 1.02) if above else (found.ratio < 0.99)
    (gradient,) = torch.autograd.grad(found.loss, velocity)
    outward = above == (advantage > 0)
    assert bool(found.clipped) == outward
    assert bool((gradient == 0).all()) == outward
    reached = (1.02 if above else 0.99) if outward else found.ratio.item()
    assert found.loss.item() == pytest.approx(-reached * advantage, abs=1e-12)


def test_a_weight_of_zero_leaves_a_member_out() -> None:
    velocity, old = velocities(0.1)
    weights = WEIGHTS * torch.tensor([1, 0, 1, 1, 1])
    found = group_loss(velocity, old, KEYS, OFFSETS, STEPS.lambda_, ADVANTAGES, weights, NO_CLIP)
    kept = [0, 2, 3, 4]
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    without = group_loss(velocity, old, KEYS[kept], offsets, STEPS.lambda_, ADVANTAGES[kept], WEIGHTS[kept], NO_CLIP)
    torch.testing.assert_close(found.loss, without.loss, rtol=1e-15, atol=0)
    for a, b in zip(*(torch.autograd.grad(each.loss, velocity) for each in (found, without)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-18)


def test_what_is_left_out_may_be_anything() -> None:
    """A missing reward's NaN, an ODE step's infinite lambda, a ratio that overflows: none reaches loss or gradient."""
    velocity, old = velocities(0.05)
    with torch.no_grad():
        velocity[1] += 1e6
    advantages = torch.tensor([1.5, -0.5, torch.nan, torch.inf, 1.0])
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    for lambda_ in (STEPS.lambda_, torch.tensor([STEPS.lambda_[0], torch.inf])):
        found = group_loss(velocity, old, KEYS, OFFSETS, lambda_, advantages, weights, (0.2, 0.2))
        (gradient,) = torch.autograd.grad(found.loss, velocity)
        alone = group_loss(velocity[:1], old[:1], KEYS[:2], OFFSETS[:2], STEPS.lambda_[:1],
                           advantages[:2], weights[:2], (0.2, 0.2))  # fmt: skip
        (expected,) = torch.autograd.grad(alone.loss, velocity)
        assert found.loss.item() == alone.loss.item()
        assert torch.equal(gradient, expected)


def test_triton_gives_the_same_loss_and_gradient() -> None:
    velocity, old = velocities(0.3, dtype=torch.float32)
    exact_velocity = velocity.detach().double().requires_grad_()
    exact = collapsed(exact_velocity, old.double(), (0.02, 0.2))
    exact.loss.backward()
    tensors = (velocity.detach(), old, KEYS, OFFSETS, STEPS.lambda_, ADVANTAGES, WEIGHTS)
    leaf, *others = (tensor.to(parity.DEVICE) for tensor in tensors)
    leaf.requires_grad_()
    with parity.triton("sde_replay"):
        found = group_loss(leaf, *others, (0.02, 0.2))
        found.loss.backward()
    torch.testing.assert_close(found.loss.cpu(), exact.loss, rtol=0, atol=1e-8)
    parity.assert_close(leaf.grad.cpu(), exact_velocity.grad, torch.float32)
    assert torch.equal(found.clipped.cpu(), exact.clipped)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_step_and_its_loss_never_wait_for_the_device(implementation: str) -> None:
    with fake_cuda(), dispatch.pinned("sde_step", implementation), dispatch.pinned("sde_replay", implementation):
        x, velocity = torch.randn(2, 2, *SHAPE, device="cuda")
        velocity = velocity.bfloat16()
        (a, b, std, lambda_), (advantages, weights) = torch.rand(4, 2, device="cuda"), torch.rand(2, 5, device="cuda")
        keys, offsets = (torch.zeros(n, dtype=t, device="cuda") for n, t in ((5, torch.int64), (3, torch.int32)))
        with SyncGuard():
            after = fork(x, velocity, a, b, std, keys, offsets, v_uncond=velocity, keep_velocity=True)
            assert after.velocity is not None and after.x.shape == (5, *SHAPE)
            group_loss(after.velocity, after.velocity, keys, offsets, lambda_, advantages, weights, NO_CLIP)


@pytest.mark.parametrize(
    ("name", "change"),
    [("lambda_", {4: STEPS.lambda_[:1]}), ("advantages", {5: ADVANTAGES[:2]}), ("weights", {6: WEIGHTS[None]})],
)
def test_operands_of_the_wrong_size_are_named(name: str, change: dict[int, Tensor]) -> None:
    operands = [*velocities(0.1), KEYS, OFFSETS, STEPS.lambda_, ADVANTAGES, WEIGHTS]
    for place, value in change.items():
        operands[place] = value
    with pytest.raises(KernelError, match=name):
        group_loss(*operands, NO_CLIP)


def test_an_unknown_ratio_is_named() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(KernelError, match="'unbiased'"):
        log_ratio(Terms(zero, zero), zero, "unbiased")
