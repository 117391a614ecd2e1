"""e4m3 with scales: rounding, range, rows of zeros, groups."""

import parity
import pytest
import torch

from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, LARGEST, check_operands, dequantise, quantise, round_e4m3


@pytest.mark.parametrize("dtype", [torch.float64, *parity.DTYPES], ids=str)
@pytest.mark.parametrize("group", [None, 128])
def test_a_value_moves_by_half_a_step_at_most(group: int | None, dtype: torch.dtype) -> None:
    x = parity.randn(0, 3, 5, 256, dtype=dtype) * 7
    values, scale = quantise(x, group)
    assert values.dtype == E4M3 and values.shape == x.shape
    assert scale.shape == (3, 5, 256 // (group or 256)) and scale.dtype == torch.promote_types(dtype, torch.float32)
    steps = scale.repeat_interleave(group or 256, -1)
    # Three bits of mantissa: half a step is 2^-4 of the value, and 2^-10 of a scale where it is subnormal.
    bound = torch.maximum(x.double().abs() * 2**-4, steps.double() * 2**-10) * (1 + 1e-6)
    assert ((dequantise(values, scale).double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("group", [None, 128])
def test_the_largest_becomes_448(group: int | None) -> None:
    values, scale = quantise(parity.randn(1, 4, 256), group)
    assert (values.float().unflatten(-1, scale.shape[-1:] + (-1,)).abs().amax(-1) == LARGEST).all()


def test_zeros_stay_zeros() -> None:
    x = parity.randn(2, 3, 128)
    x[1] = 0
    values, scale = quantise(x)
    assert scale.isfinite().all() and (scale > 0).all()
    assert not values[1].float().any() and values[0].float().any()


def test_an_outlier_costs_its_own_group_only() -> None:
    x = parity.randn(3, 1, 256)
    x[0, 200] = 1e6
    error = (dequantise(*quantise(x, 128)) - x)[0, :128].norm()
    assert error == (dequantise(*quantise(x[:, :128])) - x[:, :128]).norm()
    assert (dequantise(*quantise(x)) - x)[0, :128].norm() > 4 * error, "the row's scale is the outlier's"


def test_what_is_too_large_is_448_and_no_number_stays_none() -> None:
    found = round_e4m3(torch.tensor([500.0, -1e30, torch.inf, torch.nan, 448.1])).float()
    assert found.tolist()[:3] == [448, -448, 448] and found[3].isnan() and found[4] == 448


def test_the_format_is_that_of_its_definition() -> None:
    """Every finite byte from its sign, exponent and mantissa (OCP 8-bit floating point, E4M3)."""
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    value = torch.where(byte >= 128, -value, value)
    finite = (byte & 127) != 127
    assert torch.equal(byte.to(torch.uint8).view(E4M3).double()[finite], value.double()[finite])


def test_an_operand_that_does_not_fit_is_named() -> None:
    like = torch.zeros(4, 8)
    check_operands("op", like.device, ("x", like, (4, 8), torch.float32))
    for wrong in (like.double(), like.T, like[:, ::2]):
        with pytest.raises(KernelError, match=r"op: x is torch.float.*It must be contiguous torch.float32 \(4, 8\)"):
            check_operands("op", like.device, ("x", wrong, (4, 8), torch.float32))
