"""A linear on e4m3 operands: against torch's own fp8 product, against fp64, and what each sharing of scales costs."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, GROUP, LARGEST, dequantise, quantise
from reelforge.kernels.fp8_linear import fp8_linear, quantise_weight, reference

M, N, K = 37, 256, 640


def operands(grouped: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = parity.randn(seed, M, K), parity.randn(seed + 1, N, K) / K**0.5, parity.randn(seed + 2, N)
    return *quantise(x, GROUP if grouped else None), *quantise_weight(weight, grouped), bias


def wide(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The product of the operands as rounded, in fp64."""
    if weight_scale.shape[0] == N:
        rows = dequantise(weight, weight_scale.double())
    else:
        each = weight_scale.double().repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
        rows = weight.double() * each[:, :K]
    return dequantise(x, x_scale.double()) @ rows.T + bias.double()


@pytest.mark.parametrize("grouped", [False, True])
def test_the_product_of_the_rounded_operands(grouped: bool) -> None:
    given = operands(grouped)
    torch.testing.assert_close(reference(*given).double(), wide(*given), rtol=1e-5, atol=1e-5)
    parity.assert_close(fp8_linear(*given), wide(*given), torch.bfloat16, slack=1.1)


def test_rows_against_torchs_own_product() -> None:
    x, x_scale, weight, weight_scale, bias = (operand.cpu() for operand in operands(grouped=False))
    theirs = torch._scaled_mm(x, weight.T, x_scale, weight_scale.T.contiguous(), out_dtype=torch.float32)
    torch.testing.assert_close(reference(x, x_scale, weight, weight_scale, None), theirs, rtol=1e-5, atol=1e-5)
    assert bias.any() and not torch.allclose(reference(x, x_scale, weight, weight_scale, bias), theirs)


@pytest.mark.parametrize("grouped", [False, True])
def test_what_rounding_costs(grouped: bool) -> None:
    x, weight = parity.randn(0, M, K), parity.randn(1, N, K) / K**0.5
    exact = x.double() @ weight.double().T
    found = fp8_linear(*quantise(x, GROUP if grouped else None), *quantise_weight(weight, grouped), None)
    assert 0.01 < ((found.double() - exact).norm() / exact.norm()) < 0.04


def test_groups_contain_what_rows_cannot() -> None:
    """A channel a million times the others: their bits are gone under one scale a row."""
    x, weight = parity.randn(0, M, K), parity.randn(1, N, K) / K**0.5
    x[:, 3] *= 1e6
    weight[:, :GROUP] = 0
    exact = x.double() @ weight.double().T
    error = {
        grouped: (fp8_linear(*quantise(x, GROUP if grouped else None), *quantise_weight(weight, grouped), None) - exact)
        for grouped in (False, True)
    }
    assert error[True].norm() < 0.1 * error[False].norm()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_row_of_zeros_is_the_bias(grouped: bool) -> None:
    x, weight = parity.randn(0, M, K), parity.randn(1, N, K)
    x[5], weight[7] = 0, 0
    bias = parity.randn(2, N)
    found = fp8_linear(*quantise(x, GROUP if grouped else None), *quantise_weight(weight, grouped), bias)
    assert found.isfinite().all() and torch.equal(found[5], bias.bfloat16())
    assert torch.equal(found[:, 7], bias[7].bfloat16().expand(M))


def test_weights_in_blocks() -> None:
    weight = parity.randn(0, N, K)
    weight[:128, :128] *= 100
    values, scale = quantise_weight(weight, grouped=True)
    assert values.dtype == E4M3 and scale.shape == (2, 8), "5 blocks, filled to 8"
    assert not scale[:, 5:].any() and scale[0, 0] > 50 * scale[1, 0]
    largest = weight.abs().unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3))
    torch.testing.assert_close(scale[:, :5] * LARGEST, largest)


def test_sizes_and_scales_that_do_not_fit_are_named() -> None:
    with pytest.raises(KernelError, match=r"\(24, 48\) cannot be e4m3.*multiples of 16"):
        quantise_weight(torch.zeros(24, 48), grouped=False)
    with pytest.raises(KernelError, match=r"\(128, 192\) cannot be e4m3.*multiples of 128"):
        quantise_weight(torch.zeros(128, 192), grouped=True)
    x, _, weight, weight_scale, bias = operands(grouped=True)
    with pytest.raises(KernelError, match="Share both by rows or both by groups"):
        fp8_linear(x, torch.ones(M, 1, device=x.device), weight, weight_scale, bias)
