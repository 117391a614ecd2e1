"""Fork: the Triton kernel gives the reference's bits; groups, guidance, and what it refuses."""

import math

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, philox, sde_step
from reelforge.kernels.errors import KernelError
from reelforge.kernels.sde_step import Fork, fork

SIZES = [2, 0, 3]  # members of each group
GROUPS, MEMBERS = len(SIZES), sum(SIZES)
KEYS = torch.tensor([11, 2**40 + 5, 2**63 - 1, 0, 2**31], device=parity.DEVICE)
OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=parity.DEVICE)
OWNERS = [0, 0, 2, 2, 2]
SHAPES = [(1,), (3, 5), (4, 256), (1027,), (2, 1030)]  # one element, odd counts, a whole tile, one past it


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, velocity = parity.randn(0, GROUPS, *shape), parity.randn(1, GROUPS, *shape, dtype=dtype)
    return x, velocity, *(parity.randn(seed, GROUPS) for seed in (2, 3, 4))


def both(*tensors: Tensor | None, **options: object) -> tuple[Fork, Fork]:
    with parity.triton("sde_step", "torch"):
        expected = fork(*tensors, **options)
    with parity.triton("sde_step"):
        return fork(*tensors, **options), expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_bits_are_the_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found, expected = both(*operands(*shape, dtype=dtype), KEYS, OFFSETS)
    assert found.x.shape == (MEMBERS, *shape)
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_guidance_in_the_same_pass(dtype: torch.dtype) -> None:
    x, velocity, *coefficients = operands(3, 343, dtype=dtype)
    v_uncond = parity.randn(5, GROUPS, 3, 343, dtype=dtype)
    options = {"v_uncond": v_uncond, "guidance_scale": 4.7, "keep_velocity": True}
    found, expected = both(x, velocity, *coefficients, KEYS, OFFSETS, **options)
    assert torch.equal(found.x, expected.x)
    assert found.velocity is not None and found.velocity.dtype == torch.float32
    assert torch.equal(found.velocity, sde_step.guide(v_uncond, velocity, 4.7))
    assert torch.equal(found.velocity, expected.velocity)
    again, _ = both(x, found.velocity, *coefficients, KEYS, OFFSETS)
    assert torch.equal(again.x, found.x)


def test_without_groups_and_without_noise() -> None:
    x, velocity, a, b, std = operands(1027)
    stepped, expected = both(x, velocity, a, b, std, KEYS[:GROUPS])
    noise = philox.reference(KEYS[:GROUPS], 1027)
    assert torch.equal(stepped.x, expected.x)
    assert torch.equal(stepped.x, sde_step.sde_step(x, velocity, a, b, std, noise))
    mean, expected = both(x, velocity, a, b, std, keep_velocity=True)
    assert torch.equal(mean.x, expected.x)
    assert torch.equal(mean.x, sde_step.sde_step(x, velocity, a, b, std, None))
    assert mean.velocity is velocity


def test_std_zero_is_the_mean() -> None:
    x, velocity, a, b, std = operands(5, 7)
    found, _ = both(x, velocity, a, b, std * torch.tensor([0.0, 1, 1], device=parity.DEVICE), KEYS, OFFSETS)
    mean = sde_step.sde_step(x, velocity, a, b, std, None)
    assert torch.equal(found.x[:2], mean[[0, 0]])
    assert not torch.equal(found.x[2:], mean[[2, 2, 2]])


def test_a_member_does_not_depend_on_its_groups_packing() -> None:
    tensors = operands(1027)
    with parity.triton("sde_step"):
        together = fork(*tensors, KEYS, OFFSETS).x
        for member, group in enumerate(OWNERS):
            alone = fork(*(t[group : group + 1].contiguous() for t in tensors), KEYS[member : member + 1])
            assert torch.equal(alone.x[0], together[member])


def test_the_step_is_the_formula_with_standard_normal_noise() -> None:
    x, velocity, a, b, std = operands(4, 4096)
    with parity.triton("sde_step"):
        after = fork(x, velocity, a, b, std, KEYS, OFFSETS).x
    for member, group in enumerate(OWNERS):
        mean = a[group].double() * x[group].double() + b[group].double() * velocity[group].double()
        noise = (after[member].double() - mean) / std[group].double()
        assert noise.mean().abs() < 4 / math.sqrt(16384)
        assert noise.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 16384))


def test_the_reference_steps_in_float64() -> None:
    x, velocity, a, b, std = (tensor.double() for tensor in operands(9))
    after = fork(x, velocity, a, b, std, KEYS, OFFSETS).x
    noise = philox.reference(KEYS, 9).double()
    exact = [a[g] * x[g] + b[g] * velocity[g] + std[g] * noise[r] for r, g in enumerate(OWNERS)]
    torch.testing.assert_close(after, torch.stack(exact), rtol=0, atol=1e-15)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_custom_op_is_registered_right(keys: bool, keep: bool) -> None:
    x, velocity, a, b, std = operands(9)
    v_uncond = velocity if keep else None
    groups = (KEYS, OFFSETS) if keys else (None, None)
    torch.library.opcheck(sde_step._op, ("triton", x, velocity, v_uncond, 4.5, a, b, std, *groups, keep))


X, V, A, B, STD = operands(6)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((X.double(), V, A, B, STD), {}, "float64 is not one of"),
        ((X.transpose(0, 1), V.transpose(0, 1), *(c[:1].expand(6) for c in (A, B, STD))), {}, "strides"),
        ((X.bfloat16(), V, A, B, STD), {}, "the state is torch.bfloat16"),
        ((X, V[:1], A, B, STD), {}, r"velocity is \(1, 6\)"),
        ((X, V[:, :5], A, B, STD), {}, r"velocity is \(3, 5\)"),
        ((X, V.double(), A, B, STD), {}, "velocity is torch.float64"),
        ((X, V.T.contiguous().T, A, B, STD), {}, "velocity has strides"),
        ((X, V, A, B, STD), {"v_uncond": V[:2]}, r"v_uncond is \(2, 6\)"),
        ((X, V, A[:1], B, STD), {}, r"a is \(1,\)"),
        ((X, V, A, B, STD, KEYS), {}, "5 keys for 3 states"),
        ((X, V, A, B, STD, KEYS.float()), {}, "keys are torch.float32"),
        ((X, V, A, B, STD, KEYS, OFFSETS.long()), {}, "offsets are torch.int64"),
        ((X, V, A, B, STD, KEYS, OFFSETS[:3]), {}, r"offsets are torch.int32 \(3,\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(tensors: tuple, options: dict, message: str) -> None:
    with parity.triton("sde_step"), pytest.raises(KernelError, match=message):
        fork(*tensors, **options)


def test_gradients_are_left_to_torch() -> None:
    reason = sde_step._unfit(dispatch.Query("cuda", torch.float32, grad=True))
    assert reason == "it records no gradient"
    x, velocity, *coefficients = operands(6)
    fork(x, velocity.requires_grad_(), *coefficients, KEYS, OFFSETS).x.sum().backward()
    members = torch.tensor(SIZES, device=parity.DEVICE)
    torch.testing.assert_close(velocity.grad, (coefficients[1] * members).view(-1, 1).expand(GROUPS, 6))
