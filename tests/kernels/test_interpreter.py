"""The repaired interpreter rounds as the GPU does, and the repair is still needed."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

CASTS = [(torch.bfloat16, torch.inf), (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)]


@triton.jit
def _cast_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def values() -> torch.Tensor:
    """Every magnitude, ties, subnormals, overflow, signed zeros, infinities and NaN."""
    spread = torch.randn(4096) * torch.exp2(torch.arange(4096) % 40 - 20.0)
    ties = (torch.arange(-2040, 2040) / 16).float()
    special = torch.tensor(
        [0.0, -0.0, 448, 449, 464, 465, 500, 1e4, 1e30, torch.inf, -torch.inf, torch.nan, 2**-9, 2**-10]
    )
    return torch.cat((spread, ties, special, torch.zeros(2)))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = torch.cat((x, torch.zeros(triton.next_power_of_2(len(x)) - len(x))))
    out = torch.empty_like(x, dtype=dtype)
    _cast_kernel[(1,)](x, out, COUNT=len(x))
    return out


def mismatches(x: torch.Tensor, dtype: torch.dtype, largest: float) -> int:
    exact = x.clamp(-largest, largest).to(dtype).float()
    return int((~torch.isclose(cast(x, dtype)[: len(x)].float(), exact, rtol=0, atol=0, equal_nan=True)).sum())


@pytest.mark.parametrize(("dtype", "largest"), CASTS, ids=str)
def test_casts_round_to_nearest_and_saturate(dtype: torch.dtype, largest: float) -> None:
    assert mismatches(values(), dtype, largest) == 0


@pytest.mark.parametrize(("dtype", "largest"), CASTS[:2], ids=str)
def test_casts_still_need_the_repair(dtype: torch.dtype, largest: float) -> None:
    with interpreter.unrepaired():
        assert mismatches(values(), dtype, largest) > 0, "this Triton casts right: remove the repair"


def dot_error() -> float:
    a, b = torch.randn(16, 16, dtype=torch.bfloat16), torch.randn(16, 16, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, SIZE=16)
    return (out - a.float() @ b.float()).abs().max().item()


def test_bf16_products_are_exact_in_fp32() -> None:
    assert dot_error() < 1e-5


def test_bf16_products_still_need_the_repair() -> None:
    with interpreter.unrepaired():
        assert dot_error() > 1.0, "this Triton multiplies bf16 right: remove the repair"
