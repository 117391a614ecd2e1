"""RMSNorm: the Triton kernel against the reference in fp64, forward and backward."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, rms_norm
from reelforge.kernels.errors import KernelError

EPS = 1e-6
# batch, tokens, width: one token, odd counts, one past a program's 2 or 8 tokens, a chunk cut off, Wan's widths
SHAPES = [(1, 1, 96), (2, 9, 96), (3, 17, 37), (1, 9, 300), (1, 3, 1536), (1, 3, 3072), (1, 2, 5120)]


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.rms_norm(x, weight, EPS)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.reference(x, weight, EPS)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = parity.randn(0, *shape, dtype=dtype, grad=True), parity.randn(1, shape[2], grad=True)
    with parity.triton("rms_norm"):
        parity.check_gradients(fused, reference, (x, weight))


def test_the_weight_may_have_the_models_dtype() -> None:
    x, weight = parity.randn(0, 1, 9, 96, grad=True), parity.randn(1, 96, dtype=torch.bfloat16, grad=True)
    with parity.triton("rms_norm"):
        parity.check_gradients(fused, reference, (x, weight))


def test_tokens_may_lie_apart() -> None:
    both = parity.randn(0, 2, 9, 192)
    for part in both.chunk(2, dim=-1):
        x, weight = part.detach().requires_grad_(), parity.randn(1, 96, grad=True)
        assert not x.is_contiguous()
        with parity.triton("rms_norm"):
            parity.check_gradients(fused, reference, (x, weight))


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(1, 2, 96, device=parity.DEVICE, requires_grad=True)
    weight = parity.randn(0, 96, grad=True)
    with parity.triton("rms_norm"):
        out = fused(x, weight)
        out.sum().backward()
    assert not out.any() and not weight.grad.any()
    parity.assert_close(x.grad, (weight.detach().double() * EPS**-0.5).expand(1, 2, 96), torch.float32)


def test_a_sample_does_not_depend_on_the_batch() -> None:
    x, weight, upstream = parity.randn(0, 3, 11, 96), parity.randn(1, 96), parity.randn(2, 3, 11, 96)

    def step(samples: slice) -> list[Tensor]:
        leaf = x[samples].clone().requires_grad_()
        out = fused(leaf, weight)
        return [out, *torch.autograd.grad(out, leaf, upstream[samples])]

    with parity.triton("rms_norm"):
        whole, alone = step(slice(0, 3)), step(slice(1, 2))
    assert all(torch.equal(all_samples[1:2], one) for all_samples, one in zip(whole, alone, strict=True))


def test_custom_ops_are_registered_right() -> None:
    x, weight = parity.randn(0, 2, 6, 96, grad=True), parity.randn(1, 96, grad=True)
    with dispatch.pinned("rms_norm", "triton"):
        torch.library.opcheck(rms_norm._op, (x, weight, EPS))
        torch.library.opcheck(rms_norm._op, (x.detach().transpose(0, 1), weight, EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, weight: (x.transpose(1, 2), weight), "columns must lie side by side"),
        (lambda x, weight: (x[0], weight), r"must be \[B, L, E\]"),
        (lambda x, weight: (x, weight[:48]), r"weight is \(48,\)"),
        (lambda x, weight: (x, x[0, :, 0]), r"with strides \(96,\)"),
        (lambda x, weight: (x.double(), weight), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    x, weight = change(parity.zeros(2, 96, 96), parity.zeros(96))
    with parity.triton("rms_norm"), pytest.raises(KernelError, match=message):
        fused(x, weight)
