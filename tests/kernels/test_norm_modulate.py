"""LayerNorm and modulation: the Triton kernel against the reference in fp64, forward and backward."""

import parity
import pytest
import torch

from reelforge.kernels import dispatch, norm_modulate, tiling
from reelforge.kernels.errors import KernelError

EPS = 1e-6
# batch, tokens, width, rows of gain: one token, odd counts, one past a program's 2 or 8 tokens, a chunk cut off, Wan's
SHAPES = [(1, 1, 96, 1), (2, 21, 96, 3), (1, 9, 300, 1), (1, 9, 1536, 1), (1, 3, 3072, 1), (1, 2, 5120, 1)]


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, tokens, width, rows = shape
    x = parity.randn(0, batch, tokens, width, dtype=dtype, grad=True)
    gain, shift = (parity.randn(seed, batch, rows, width, grad=True) for seed in (1, 2))
    with parity.triton("norm_modulate"):
        parity.check_gradients(
            lambda *tensors: norm_modulate.norm_modulate(*tensors, EPS),
            lambda *tensors: norm_modulate.reference(*tensors, EPS),
            (x, gain, shift),
        )


def test_rows_may_be_strided_and_shared_by_the_batch() -> None:
    table = parity.randn(0, 1, 3, 6, 96)
    shift, scale = table.unbind(2)[:2]
    x = parity.randn(1, 2, 6, 96)
    with parity.triton("norm_modulate"):
        h = norm_modulate.norm_modulate(x, 1 + scale, shift, EPS)
    exact = norm_modulate.reference(x.double(), 1 + scale.double(), shift.double(), EPS)
    parity.assert_close(h, exact, torch.float32)


def test_gradients_of_shared_rows_sum_over_the_batch() -> None:
    gain, shift = (parity.randn(seed, 1, 1, 96, grad=True) for seed in (1, 2))
    with parity.triton("norm_modulate"):
        parity.check_gradients(
            lambda *tensors: norm_modulate.norm_modulate(*tensors, EPS),
            lambda *tensors: norm_modulate.reference(*tensors, EPS),
            (parity.randn(0, 3, 5, 96), gain, shift),
        )


def test_a_row_of_zeros_is_the_shift() -> None:
    x, shift = torch.zeros(1, 2, 96, device=parity.DEVICE, requires_grad=True), parity.randn(0, 1, 1, 96)
    with parity.triton("norm_modulate"):
        h = norm_modulate.norm_modulate(x, 1 + shift, shift, EPS)
        h.sum().backward()
    assert torch.equal(h, shift.expand(1, 2, 96)) and torch.isfinite(x.grad).all()


def test_a_sample_does_not_depend_on_the_batch() -> None:
    x, gain, shift, upstream = (
        parity.randn(seed, 3, *shape) for seed, shape in enumerate([(11, 96), (1, 96), (1, 96), (11, 96)])
    )

    def step(samples: slice) -> list[torch.Tensor]:
        leaves = [tensor[samples].clone().requires_grad_() for tensor in (x, gain, shift)]
        h = norm_modulate.norm_modulate(*leaves, EPS)
        return [h, *torch.autograd.grad(h, leaves, upstream[samples])]

    with parity.triton("norm_modulate"):
        whole, alone = step(slice(0, 3)), step(slice(1, 2))
    assert all(torch.equal(all_samples[1:2], one) for all_samples, one in zip(whole, alone, strict=True))


def test_custom_ops_are_registered_right() -> None:
    x, rows = parity.randn(0, 2, 6, 96), parity.randn(1, 2, 3, 96)
    with dispatch.pinned("norm_modulate", "triton"):
        torch.library.opcheck(norm_modulate._op, (x.requires_grad_(), rows, rows, EPS))
        torch.library.opcheck(norm_modulate._backward_op, (x.detach(), rows, x.detach(), EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, rows: (x.transpose(1, 2), rows), "strides"),
        (lambda x, rows: (x[0], rows), r"must be \[B, L, E\]"),
        (lambda x, rows: (x, rows[..., :48]), r"must be \[2 or 1, M, 96\]"),
        (lambda x, rows: (x, rows.expand(1, 96, 96).transpose(1, 2)), "columns must lie side by side"),
        (lambda x, rows: (x[:, :5].contiguous(), rows.expand(2, 3, 96)), "divisor of 5"),
        (lambda x, rows: (x.new_zeros(1, 2, tiling.MAX_WIDTH + 1),) * 2, "rows of 6145 columns"),
        (lambda x, rows: (x.double(), rows), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    x, rows = change(parity.zeros(2, 96, 96), parity.zeros(1, 1, 96))
    with parity.triton("norm_modulate"), pytest.raises(KernelError, match=message):
        norm_modulate.norm_modulate(x, rows, rows, EPS)


def test_gain_and_shift_need_the_same_rows() -> None:
    x, rows = parity.zeros(2, 6, 96), parity.zeros(1, 1, 96)
    with parity.triton("norm_modulate"), pytest.raises(KernelError, match="gain has 3 rows, shift 1"):
        norm_modulate.norm_modulate(x, rows.expand(1, 3, 96), rows, EPS)
