"""Gated residual and norm: the Triton kernel against the reference in fp64, forward and backward."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, gated_residual_norm
from reelforge.kernels.errors import KernelError

EPS = 1e-6
# batch, tokens, width, rows of gate, rows of gain: one token, odd counts, one past a program's tokens, a chunk cut
# off, Wan's widths; gates finer than norms, coarser, and neither
SHAPES = [
    (1, 1, 96, 1, 1),
    (2, 27, 96, 3, 1),
    (1, 12, 300, 1, 4),
    (2, 12, 96, 2, 3),
    (1, 9, 1536, 1, 1),
    (1, 3, 3072, 1, 1),
    (1, 2, 5120, 1, 1),
]


def draw(
    batch: int, tokens: int, width: int, gate_rows: int | None, rows: int, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """x, y, gate, gain and shift, all wanting gradients."""
    shapes = [(batch, tokens, width)] * 2 + [(batch, gate_rows or 1, width)] + [(batch, rows, width)] * 2
    dtypes = [dtype] * 2 + [torch.float32] * 3
    tensors: list[Tensor | None] = [
        parity.randn(seed, *shape, dtype=kind, grad=True)
        for seed, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return tensors if gate_rows else [*tensors[:2], None, *tensors[3:]]


def fused(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return gated_residual_norm.gated_residual_norm(*tensors, EPS)


def reference(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return gated_residual_norm.reference(*tensors, EPS)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    with parity.triton("gated_residual_norm"):
        parity.check_gradients(fused, reference, draw(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 18, 96, None, 3), (1, 3, 1536, None, 1)], ids=str)
def test_without_a_gate(shape: tuple[int, int, int, None, int], dtype: torch.dtype) -> None:
    with parity.triton("gated_residual_norm"):
        parity.check_gradients(fused, reference, draw(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_the_rounded_residual_is_normed_when_asked_for(dtype: torch.dtype) -> None:
    tensors = [tensor.detach() for tensor in draw(2, 6, 96, 3, 1, dtype)]
    with parity.triton("gated_residual_norm"):
        residual, h = gated_residual_norm.gated_residual_norm(*tensors, EPS, round_residual=True)
        assert torch.equal(residual, fused(*tensors)[0])
    gain, shift = (tensor.double() for tensor in tensors[3:])
    nothing = torch.zeros_like(residual, dtype=torch.float64)
    parity.assert_close(h, reference(residual.double(), nothing, None, gain, shift)[1], dtype)


def test_rounding_the_residual_leaves_the_gradient_plain() -> None:
    def gradients(round_residual: bool) -> tuple[Tensor, ...]:
        tensors = draw(1, 3, 96, 1, 1, torch.bfloat16)
        with parity.triton("gated_residual_norm"):
            outputs = gated_residual_norm.gated_residual_norm(*tensors, EPS, round_residual=round_residual)
            return torch.autograd.grad(outputs, tensors, [torch.ones_like(output) for output in outputs])

    assert all(torch.equal(*pair) for pair in zip(gradients(False), gradients(True), strict=True))


def test_rows_may_be_strided_and_shared_by_the_batch() -> None:
    x, y = (parity.randn(seed, 2, 6, 96, grad=True) for seed in (0, 1))
    table = parity.randn(2, 1, 3, 6, 96)
    shift, scale, gate = (row.detach().requires_grad_() for row in table.unbind(2)[:3])
    assert not gate.is_contiguous()
    with parity.triton("gated_residual_norm"):
        parity.check_gradients(fused, reference, (x, y, gate, scale, shift))


@pytest.mark.parametrize("gate_rows", [1, None])
def test_branch_and_rows_may_have_dtypes_of_their_own(gate_rows: int | None) -> None:
    x, y, gate, gain, shift = draw(1, 9, 96, gate_rows, 1)
    y, gain = y.detach().bfloat16().requires_grad_(), gain.detach().half().requires_grad_()
    with parity.triton("gated_residual_norm"):
        parity.check_gradients(fused, reference, (x, y, gate, gain, shift))


def test_an_output_that_nobody_uses_has_no_gradient() -> None:
    for used in (0, 1):
        tensors = draw(1, 3, 96, 1, 1)
        exact = parity.double(tensors)
        with parity.triton("gated_residual_norm"):
            fused(*tensors)[used].sum().backward()
        reference(*exact)[used].sum().backward()
        for tensor, wanted in zip(tensors[:3], exact[:3], strict=True):
            torch.testing.assert_close(tensor.grad.double(), wanted.grad, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_is_the_shift() -> None:
    _, _, gate, gain, shift = draw(1, 2, 96, 1, 1)
    x = torch.zeros(1, 2, 96, device=parity.DEVICE, requires_grad=True)
    with parity.triton("gated_residual_norm"):
        residual, h = fused(x, x, gate, gain, shift)
        (residual.sum() + h.sum()).backward()
    assert not residual.any() and torch.equal(h, shift.expand(1, 2, 96)) and torch.isfinite(x.grad).all()


def test_a_sample_does_not_depend_on_the_batch() -> None:
    tensors = [tensor.detach() for tensor in draw(3, 12, 96, 2, 1)]
    upstream = [parity.randn(seed, 3, 12, 96) for seed in (7, 8)]

    def step(samples: slice) -> list[Tensor]:
        leaves = [tensor[samples].clone().requires_grad_() for tensor in tensors]
        outputs = fused(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [gradient[samples] for gradient in upstream])]

    with parity.triton("gated_residual_norm"):
        whole, alone = step(slice(0, 3)), step(slice(1, 2))
    assert all(torch.equal(all_samples[1:2], one) for all_samples, one in zip(whole, alone, strict=True))


@pytest.mark.parametrize("gate_rows", [2, None])
def test_custom_ops_are_registered_right(gate_rows: int | None) -> None:
    x, y, gate, gain, shift = draw(2, 6, 96, gate_rows, 3)
    with dispatch.pinned("gated_residual_norm", "triton"):
        torch.library.opcheck(gated_residual_norm._op, (x, y, gate, gain, shift, EPS, False))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x.transpose(1, 2), "x has strides"),
        ("y", lambda y: y[:, :48], r"y is \(2, 48, 96\)"),
        ("gate", lambda gate: gate[..., :48], r"gate is \(1, 1, 48\)"),
        ("gain", lambda gain: gain[0, 0], r"gain is \(96,\)"),
        ("shift", lambda shift: shift.expand(1, 2, 96), "gain has 1 rows, shift 2"),
        ("x", lambda x: x.double(), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(name: str, change: object, message: str) -> None:
    tensors = {"x": parity.zeros(2, 96, 96), "y": parity.zeros(2, 96, 96)}
    tensors |= {row: parity.zeros(1, 1, 96) for row in ("gate", "gain", "shift")}
    tensors[name] = change(tensors[name])
    with parity.triton("gated_residual_norm"), pytest.raises(KernelError, match=message):
        fused(*tensors.values())
