"""The residual add and the norm behind it, straight to e4m3: as the wide op's result, rounded."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import fp8_residual_norm as module
from reelforge.kernels import gated_residual_norm as wide
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import LARGEST, dequantise
from reelforge.kernels.fp8_residual_norm import fp8_residual_norm

EPS = 1e-6
# Widths of whole chunks, of a part of one, and Wan's 1.3B; rows of gate and gain that differ.
SIZES = [(12, 256, 1, 1), (12, 96, 3, 1), (12, 1536, 1, 4)]


def operands(tokens: int, width: int, gates: int, gains: int, dtype: torch.dtype, gated: bool) -> tuple:
    x, y = (parity.randn(i, 2, tokens, width, dtype=dtype) for i in range(2))
    gate = parity.randn(2, 2, gates, width) if gated else None
    return x, y, gate, 1 + 0.1 * parity.randn(3, 2, gains, width), parity.randn(4, 1, gains, width)


def run(given: tuple, implementation: str = "triton") -> tuple[Tensor, Tensor, Tensor]:
    with parity.triton("fp8_residual_norm", implementation):
        return fp8_residual_norm(*given, EPS)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_wide_ops_result_rounded(size: tuple, dtype: torch.dtype, gated: bool, implementation: str) -> None:
    given = operands(*size, dtype, gated)
    x, values, scale = run(given, implementation)
    x_right, h = wide.reference(*parity.double(given), EPS)
    parity.assert_close(x, x_right, dtype)
    assert scale.shape == (2, 12, 1)
    torch.testing.assert_close(scale[..., 0].double() * LARGEST, h.abs().amax(-1), rtol=1e-5, atol=0)
    bound = torch.maximum(h.abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-4)
    assert ((dequantise(values, scale.double()) - h).abs() <= bound).all()


def test_a_row_of_zeros_gives_no_nan() -> None:
    x, y, _, gain, shift = operands(12, 256, 1, 1, torch.bfloat16, gated=False)
    x[0, 3], y[0, 3], shift = 0, 0, torch.zeros_like(shift)
    _, values, scale = run((x, y, None, gain, shift))
    assert scale.isfinite().all() and not values[0, 3].float().any() and values[0, 4].float().any()


def test_a_sample_does_not_depend_on_the_batch() -> None:
    x, y, gate, gain, shift = operands(12, 256, 3, 1, torch.bfloat16, gated=True)
    whole = run((x, y, gate, gain, shift))
    for i in range(2):
        one = run((x[i : i + 1], y[i : i + 1], gate[i : i + 1], gain[i : i + 1], shift))
        assert all(
            torch.equal(a[i : i + 1].view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole, one, strict=True)
        )


def test_the_custom_op_is_registered_right() -> None:
    for gated in (True, False):
        given = operands(6, 96, 3, 1, torch.bfloat16, gated)
        torch.library.opcheck(module._op, (*given, EPS), test_utils="test_faketensor")


def test_gradients_and_layouts_it_does_not_take_are_named() -> None:
    x, y, gate, gain, shift = operands(12, 256, 1, 1, torch.float32, gated=True)
    with pytest.raises(KernelError, match="no gradient"):
        fp8_residual_norm(x.requires_grad_(), y, gate, gain, shift, EPS)
    with pytest.raises(KernelError, match="fp8_residual_norm: y has strides"):
        run((x.detach(), y.transpose(1, 2).contiguous().transpose(1, 2), gate, gain, shift))
