"""Replay: the Triton kernels against the reference in fp64, and independence of the batch and of groups' packing."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import philox, sde_replay
from reelforge.kernels.errors import KernelError
from reelforge.kernels.sde_replay import replay, velocity_terms

KEYS = torch.tensor([11, 2**40 + 5, 2**63 - 1, 0, 2**31], device=parity.DEVICE)
OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=parity.DEVICE)
OWNERS = [0, 0, 2, 2, 2]
SHAPES = [(1,), (3, 5), (4, 256), (1027,)]


def velocities(*shape: int, dtype: torch.dtype = torch.float32, groups: int = 3) -> tuple[Tensor, Tensor]:
    velocity = parity.randn(0, groups, *shape, dtype=dtype)
    return velocity, (velocity + 0.1 * parity.randn(1, groups, *shape)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    velocity, old = velocities(*shape, dtype=dtype)
    exact_velocity = velocity.double().requires_grad_()
    velocity.requires_grad_()
    with parity.triton("sde_replay"):
        terms = replay(velocity, old, KEYS, OFFSETS)
        exact = sde_replay.reference(exact_velocity, old.double(), KEYS, OFFSETS)
        for found, wanted in zip(terms, exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-7, atol=2e-9)
        upstream = parity.randn(2, 2, len(KEYS)).double()
        torch.autograd.backward(tuple(terms), tuple(upstream))
        torch.autograd.backward(tuple(exact), tuple(upstream))
    parity.assert_close(velocity.grad, exact_velocity.grad, dtype)


def test_without_groups() -> None:
    velocity, old = velocities(1027)
    noise = philox.reference(KEYS[:3], 1027)
    with parity.triton("sde_replay"):
        slope, power = replay(velocity, old, KEYS[:3])
    exact_slope, exact_power = velocity_terms(velocity.double(), old.double(), noise.double())
    torch.testing.assert_close(slope, exact_slope, rtol=0, atol=1e-9)
    torch.testing.assert_close(power, exact_power, rtol=0, atol=1e-9)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_member_depends_neither_on_the_batch_nor_on_packing(implementation: str) -> None:
    """Values and the gradient of one group, bit for bit."""
    velocity, old = velocities(1027)
    velocity.requires_grad_()
    with parity.triton("sde_replay", implementation):
        slope, power = replay(velocity, old, KEYS, OFFSETS)
        (together,) = torch.autograd.grad((slope.sin() + power).sum(), velocity)
        for member, group in enumerate(OWNERS):
            alone = replay(velocity[group : group + 1], old[group : group + 1], KEYS[member : member + 1])
            assert torch.equal(alone.slope[0], slope[member])
            assert torch.equal(alone.power[0], power[member])
        last = velocity[2:].detach().requires_grad_()
        offsets = torch.tensor([0, 3], dtype=torch.int32, device=parity.DEVICE)
        terms = replay(last, old[2:], KEYS[2:], offsets)
        (separate,) = torch.autograd.grad((terms.slope.sin() + terms.power).sum(), last)
    assert torch.equal(separate[0], together[2])
    assert torch.equal(together[1], torch.zeros_like(together[1])), "a group without members has no gradient"


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_equal_velocities_give_exactly_zero(implementation: str) -> None:
    velocity, _ = velocities(1027, dtype=torch.bfloat16)
    with parity.triton("sde_replay", implementation):
        slope, power = replay(velocity, velocity.clone(), KEYS, OFFSETS)
    assert torch.equal(slope, torch.zeros_like(slope))
    assert torch.equal(power, torch.zeros_like(power))


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_the_old_velocity_gets_no_gradient(implementation: str) -> None:
    velocity, old = velocities(7)
    old.requires_grad_()
    velocity.requires_grad_()
    with parity.triton("sde_replay", implementation):
        replay(velocity, old, KEYS, OFFSETS).slope.sum().backward()
    assert old.grad is None


def test_gradients_by_finite_differences() -> None:
    velocity, old = (tensor.double() for tensor in velocities(5))
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: tuple(sde_replay.reference(v, old, KEYS, OFFSETS)), (velocity,))


def test_many_tiles_are_summed_in_full() -> None:
    """More tiles than the second stage takes at a time."""
    sums = parity.randn(0, 2, 3000).double()
    means = torch.empty(2, dtype=torch.float64, device=parity.DEVICE)
    sde_replay._row_means_kernel[(2,)](sums, means, 3000, 7, BLOCK=1024)
    torch.testing.assert_close(means, sums.sum(1) / 7, rtol=1e-12, atol=0)


def test_custom_ops_are_registered_right() -> None:
    velocity, old = velocities(9)
    torch.library.opcheck(sde_replay._op, (velocity.requires_grad_(), old, KEYS, OFFSETS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, old: (v, old[:2], KEYS, OFFSETS), r"velocity_old is \(2, 6\)"),
        (lambda v, old: (v.T.contiguous().T, old, KEYS, OFFSETS), "velocity has strides"),
        (lambda v, old: (v, old.T.contiguous().T, KEYS, OFFSETS), "velocity_old has strides"),
        (lambda v, old: (v, old.double(), KEYS, OFFSETS), "velocity_old is torch.float64"),
        (lambda v, old: (v.double(), old, KEYS, OFFSETS), "float64 is not one of"),
        (lambda v, old: (v, old, KEYS, None), "5 keys for 3 states"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    with parity.triton("sde_replay"), pytest.raises(KernelError, match=message):
        replay(*change(*velocities(6)))
