"""The in-place average of weights: the Triton kernel and the reference against the formula in fp64."""

import parity
import pytest
import torch
from sync_guard import SyncGuard, fake_cuda
from torch import Tensor

from reelforge.kernels import dispatch, ema_lerp
from reelforge.kernels.errors import KernelError

# one element, odd sizes, one past a tile of 2,048, a matrix, nothing, a scalar
SHAPES = [(1,), (3, 5, 7), (2049,), (96, 64), (0, 4), ()]
IMPLEMENTATIONS = ("torch", "triton")


def draw(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    shadows = [parity.randn(2 * i, *shape) for i, shape in enumerate(SHAPES)]
    return shadows, [parity.randn(2 * i + 1, *shape, dtype=dtype) for i, shape in enumerate(SHAPES)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=parity.DEVICE)


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.int32).clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_fp64(implementation: str, weight: float, dtype: torch.dtype) -> None:
    shadows, lives = draw(dtype)
    exact = [
        s.double() + scalar(weight).double() * (v.double() - s.double()) for s, v in zip(shadows, lives, strict=True)
    ]
    with parity.triton("ema_lerp", implementation):
        ema_lerp.ema_lerp(shadows, lives, scalar(weight))
    for shadow, expected in zip(shadows, exact, strict=True):
        if shadow.numel():
            parity.assert_close(shadow, expected, torch.float32)


def test_reference_takes_fp64_and_more_tensors_than_a_chunk() -> None:
    shadows = [parity.randn(i, 3, dtype=torch.float64) for i in range(70)]
    lives = [parity.randn(100 + i, 3, dtype=torch.float64) for i in range(70)]
    exact = [0.75 * shadow + 0.25 * live for shadow, live in zip(shadows, lives, strict=True)]
    ema_lerp.reference(shadows, lives, scalar(0.25))
    torch.testing.assert_close(shadows, exact, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_zero_changes_no_bit_whatever_the_live_values_are(implementation: str) -> None:
    shadows, lives = draw()
    shadows[3][0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    lives[3][0, 4:6] = torch.tensor([float("nan"), float("-inf")])
    before = bits(shadows)
    with parity.triton("ema_lerp", implementation):
        ema_lerp.ema_lerp(shadows, lives, scalar(0.0))
    assert all(torch.equal(was, now) for was, now in zip(before, bits(shadows), strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_that_train_may_be_averaged_in(implementation: str) -> None:
    shadow, live = torch.zeros(3, device=parity.DEVICE), parity.randn(0, 3, grad=True)
    with parity.triton("ema_lerp", implementation):
        ema_lerp.ema_lerp([shadow], [live], scalar(1.0))
    assert torch.equal(shadow, live.detach()) and not shadow.requires_grad


def test_the_reference_does_not_wait_for_a_device() -> None:
    with fake_cuda():
        shadows = [torch.randn(3, 5, device="cuda")]
        lives = [torch.randn(3, 5, dtype=torch.bfloat16, device="cuda")]
        weight = torch.full((), 0.5, device="cuda")
        with SyncGuard() as guard:
            ema_lerp.reference(shadows, lives, weight)
    assert any("_foreach_add_" in name for name in guard.watched)


def test_a_mismatch_is_found_before_anything_changes() -> None:
    shadows, lives = draw()
    before = bits(shadows)
    with parity.triton("ema_lerp"), pytest.raises(KernelError, match="live is"):
        ema_lerp.ema_lerp(shadows, [*lives[:-1], lives[0]], scalar(0.5))
    assert all(torch.equal(was, now) for was, now in zip(before, bits(shadows), strict=True))


def test_custom_op_is_registered_right() -> None:
    shadows, lives = draw()
    with dispatch.pinned("ema_lerp", "triton"):
        torch.library.opcheck(ema_lerp._op, (shadows, lives, scalar(0.1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shadow, live, weight: (shadow.T, live.T, weight), "strides"),
        (lambda shadow, live, weight: (shadow, live[:2], weight), r"live is \(2, 4\)"),
        (lambda shadow, live, weight: (shadow, live.half(), weight), "float16"),
        (lambda shadow, live, weight: (shadow, live, weight.double()), "weight is"),
        (lambda shadow, live, weight: (shadow.double(), live, weight), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    shadow, live, weight = change(parity.zeros(3, 4), parity.zeros(3, 4), scalar(0.5))
    with parity.triton("ema_lerp"), pytest.raises(KernelError, match=message):
        ema_lerp.ema_lerp([shadow], [live], weight)
