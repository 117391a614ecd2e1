"""e4m3 by groups of 128, with and without GELU: the kernel against its reference, and the reference against fp64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.kernels import fp8_groups as module
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import LARGEST, dequantise
from reelforge.kernels.fp8_groups import fp8_groups


def run(x: Tensor, gelu: bool, implementation: str = "triton") -> tuple[Tensor, Tensor]:
    with parity.triton("fp8_groups", implementation):
        return fp8_groups(x, gelu)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
def test_kernel_against_the_reference(rows: int, dtype: torch.dtype, gelu: bool) -> None:
    x = parity.randn(0, rows, 384, dtype=dtype) * 3
    (values, scale), (values_right, scale_right) = (run(x, gelu, name) for name in ("triton", "torch"))
    torch.testing.assert_close(scale, scale_right, rtol=1e-6, atol=0)
    # A number that fp32 sees on either side of a tie may go either way.
    off = values.float() - values_right.float()
    assert (off != 0).sum() <= 1 + 0.002 * off.numel()
    assert (off.abs() <= 2**-3 * values_right.float().abs().clamp(min=2**-6)).all()


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("gelu", [False, True])
def test_half_a_step_from_fp64(gelu: bool, implementation: str) -> None:
    x = parity.randn(1, 40, 256, dtype=torch.bfloat16) * 3
    values, scale = run(x, gelu, implementation)
    right = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    steps = scale.double().repeat_interleave(128, 1)
    bound = torch.maximum(right.abs() * 2**-4, steps * 2**-10) * (1 + 1e-5)
    assert ((dequantise(values, scale.double()) - right).abs() <= bound).all()
    assert (values.float().unflatten(1, (-1, 128)).abs().amax(-1) == LARGEST).all()


def test_scales_lie_as_the_gemm_reads_them() -> None:
    for implementation in ("triton", "torch"):
        _, scale = run(parity.randn(0, 50, 256), False, implementation)
        assert scale.shape == (50, 2) and scale.stride() == (1, 50)


def test_zeros_and_an_outlier() -> None:
    x = parity.randn(0, 40, 256)
    x[3], x[5, 200] = 0, 1e6
    values, scale = run(x, False)
    assert scale.isfinite().all() and not values[3].float().any() and values[5, 200] == LARGEST
    undisturbed = run(parity.randn(0, 40, 256), False)[0]
    assert torch.equal(values[5, :128].view(torch.uint8), undisturbed[5, :128].view(torch.uint8))


def test_the_custom_op_is_registered_right() -> None:
    torch.library.opcheck(module._op, (parity.randn(0, 5, 256), True), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 200), r"got \(4, 200\).*multiple of 128"),
        (torch.zeros(128, 128).T[:, :], r"strides \(1, 128\)"),
        (torch.zeros(2, 4, 128), r"got \(2, 4, 128\)"),
        (torch.zeros(4, 128, requires_grad=True), "has no gradient"),
    ],
)
def test_what_it_does_not_take_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        fp8_groups(x)
