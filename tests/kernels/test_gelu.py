"""GELU with and without a bias: the Triton kernel against the reference in fp64, forward and backward."""

import parity
import pytest
import torch

from reelforge.kernels import dispatch, gelu
from reelforge.kernels.errors import KernelError

# odd sizes, one element, one past a tile of 4,096 elements or of 16 rows by 256 columns, an FFN's width
SHAPES = [(1,), (3, 5), (2, 17, 257), (4097,), (2, 2, 8960)]


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    x = parity.randn(0, *shape, dtype=dtype, grad=True)
    bias = parity.randn(1, shape[-1], grad=True) if biased else None
    with parity.triton("gelu"):
        parity.check_gradients(gelu.gelu, gelu.reference, (x, bias))


def test_gradient_of_the_bias_sums_over_many_programs() -> None:
    x, bias = parity.randn(0, 300, 7, grad=True), parity.randn(1, 7, dtype=torch.bfloat16, grad=True)
    with parity.triton("gelu"):
        parity.check_gradients(gelu.gelu, gelu.reference, (x, bias))


@pytest.mark.filterwarnings("ignore:.*encountered in multiply")
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_limits_are_exact(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.0, 1e4, -1e4, largest, -largest], device=parity.DEVICE, dtype=dtype, requires_grad=True)
    with parity.triton("gelu"):
        y = gelu.gelu(x)
        y.sum().backward()
    assert torch.equal(y.detach(), x.detach().clamp_min(0))
    assert x.grad.tolist() == [0.5, 1, 0, 1, 0]


def test_fp32_is_accurate_to_units_in_the_last_place_of_x() -> None:
    """1.2 units were measured in the interpreter; a GPU's exp2 and division are off by up to 2 each."""
    x = torch.linspace(-12, 12, 100_001, device=parity.DEVICE)
    with parity.triton("gelu"):
        y = gelu.gelu(x)
    error = (y.double() - gelu.reference(x.double())).abs()
    bound = (4 if x.is_cuda else 1.5) * torch.finfo(torch.float32).eps
    assert (error <= bound * x.abs()).all()


@pytest.mark.filterwarnings("ignore:.*encountered in multiply")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(value: float) -> None:
    x = torch.ones(300, device=parity.DEVICE)
    x[100] = value
    x.requires_grad_()
    with parity.triton("gelu"):
        y = gelu.gelu(x)
        y.sum().backward()
    for result in (y.detach(), x.grad):
        rest = torch.cat((result[:100], result[101:]))
        assert torch.equal(rest, rest[:1].expand(299))
    torch.testing.assert_close(y[100].item(), value, rtol=0, atol=0, equal_nan=True)


def test_rows_do_not_depend_on_each_other() -> None:
    x, bias = parity.randn(0, 3, 37, 96), parity.randn(1, 96)
    with parity.triton("gelu"):
        whole, alone = gelu.gelu(x, bias), gelu.gelu(x[1:2].contiguous(), bias)
        assert torch.equal(whole[1:2], alone)
        assert torch.equal(gelu.gelu(x)[1:2], gelu.gelu(x[1:2].contiguous()))


@pytest.mark.skipif(parity.DEVICE == "cpu", reason="takes 11 GB")
def test_offsets_past_2_to_the_31() -> None:
    """Rows of a prime length repeat: an offset that wraps around reads another value."""
    row, bias = parity.randn(0, 4099, dtype=torch.bfloat16), parity.randn(1, 4099)
    x = row.repeat(2**31 // len(row) + 2, 1)
    with parity.triton("gelu"):
        assert x.numel() > 2**31 and (gelu.gelu(x) == gelu.gelu(row)).all()
        assert (gelu.gelu(x, bias) == gelu.gelu(row, bias)).all()


def test_custom_ops_are_registered_right() -> None:
    x, bias = parity.randn(0, 2, 6, 96, grad=True), parity.randn(1, 96, grad=True)
    with dispatch.pinned("gelu", "triton"):
        torch.library.opcheck(gelu._op, (x, bias))
        torch.library.opcheck(gelu._op, (x, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, bias: (x.transpose(0, 1), bias), "strides"),
        (lambda x, bias: (x, bias[:48]), r"bias is \(48,\). It must be \(96,\)"),
        (lambda x, bias: (x.double(), bias), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    x, bias = change(parity.zeros(96, 96), parity.zeros(96))
    with parity.triton("gelu"), pytest.raises(KernelError, match=message):
        gelu.gelu(x, bias)
