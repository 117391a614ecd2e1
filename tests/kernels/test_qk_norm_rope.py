"""q/k RMSNorm and rotation: the Triton kernel against the reference in fp64, forward and backward."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, qk_norm_rope, rms_norm
from reelforge.kernels.errors import KernelError

EPS = 1e-6
# batch, tokens, heads, head_dim: one token, odd counts, one past a program's 2 or 8 tokens, head dimensions that no
# chunk is a multiple of, in one chunk and in two, Wan's
SHAPES = [(1, 1, 2, 12), (2, 9, 3, 14), (1, 9, 5, 60), (1, 9, 12, 128), (1, 3, 24, 128), (1, 2, 40, 128)]


def draw(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and their weights, all wanting gradients, then cos and sin."""
    width = heads * head_dim
    angle = parity.randn(9, tokens, head_dim // 2) * 3
    return [
        *(parity.randn(seed, batch, tokens, width, dtype=dtype, grad=True) for seed in (0, 1)),
        *(parity.randn(seed, width, grad=True) for seed in (2, 3)),
        angle.cos(),
        angle.sin(),
    ]


def call(function: object, heads: int, q: Tensor, k: Tensor, *rest: Tensor, round_norm: bool = False) -> tuple:
    q_weight, k_weight, cos, sin = rest
    return function(q, k, q_weight, k_weight, (cos, sin), heads, EPS, round_norm=round_norm)


def assert_near_fp64(heads: int, tensors: list[Tensor]) -> None:
    with parity.triton("qk_norm_rope"):
        parity.check_gradients(
            lambda *given: call(qk_norm_rope.qk_norm_rope, heads, *given),
            lambda *given: call(qk_norm_rope.reference, heads, *given),
            tensors,
        )


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_near_fp64(shape[2], draw(*shape, dtype=dtype))


def test_weights_may_have_the_models_dtype() -> None:
    q, k, *weights, cos, sin = draw(1, 9, 3, 32)
    assert_near_fp64(3, [q, k, *(weight.detach().half().requires_grad_() for weight in weights), cos, sin])


@pytest.mark.parametrize("heads", [2, 12])
def test_columns_of_one_qkv_product(heads: int) -> None:
    q, k, *rest = draw(2, 3, heads, 128, torch.bfloat16)
    fused = torch.cat((k, q, k), dim=-1).detach()
    assert_near_fp64(heads, [*(part.detach().requires_grad_() for part in fused.chunk(3, dim=-1)[1:]), *rest])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_norm_is_rounded_when_asked_for(dtype: torch.dtype) -> None:
    q, k, q_weight, k_weight, cos, sin = (tensor.detach() for tensor in draw(1, 5, 3, 32, dtype))
    with parity.triton("qk_norm_rope"):
        outputs = call(qk_norm_rope.qk_norm_rope, 3, q, k, q_weight, k_weight, cos, sin, round_norm=True)
    for x, weight, out in zip((q, k), (q_weight, k_weight), outputs, strict=True):
        normed = rms_norm.reference(x, weight, EPS).double().unflatten(-1, (3, -1))
        parity.assert_close(out, qk_norm_rope.rotate(normed, (cos.double(), sin.double())), dtype)


def test_a_row_of_zeros_stays_zero() -> None:
    *_, q_weight, k_weight, cos, sin = draw(1, 2, 3, 32)
    x = torch.zeros(1, 2, 96, device=parity.DEVICE, requires_grad=True)
    with parity.triton("qk_norm_rope"):
        q, k = call(qk_norm_rope.qk_norm_rope, 3, x, x, q_weight, k_weight, cos, sin)
        (q.sum() + k.sum()).backward()
    assert not q.any() and not k.any() and not q_weight.grad.any() and torch.isfinite(x.grad).all()


def test_a_sample_does_not_depend_on_the_batch() -> None:
    q, k, *rest = (tensor.detach() for tensor in draw(3, 11, 3, 32))
    upstream = [parity.randn(seed, 3, 11, 3, 32) for seed in (7, 8)]

    def step(samples: slice) -> list[Tensor]:
        leaves = [tensor[samples].clone().requires_grad_() for tensor in (q, k)]
        outputs = call(qk_norm_rope.qk_norm_rope, 3, *leaves, *rest)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [gradient[samples] for gradient in upstream])]

    with parity.triton("qk_norm_rope"):
        whole, alone = step(slice(0, 3)), step(slice(1, 2))
    assert all(torch.equal(all_samples[1:2], one) for all_samples, one in zip(whole, alone, strict=True))


def test_custom_ops_are_registered_right() -> None:
    tensors = draw(2, 3, 3, 32)
    with dispatch.pinned("qk_norm_rope", "triton"):
        torch.library.opcheck(qk_norm_rope._op, (*tensors, 3, EPS, False))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda q: q.transpose(1, 2), "q has strides"),
        (1, lambda k: k[:, :48], r"k is \(2, 48, 96\)"),
        (1, lambda k: k.half(), "torch.float32 and torch.float16"),
        (2, lambda weight: weight[:48], r"q_weight is \(48,\)"),
        (4, lambda cos: cos[:4], r"cos is \(4, 16\).* must be \(96, 16\)"),
        (5, lambda sin: sin.t().contiguous().t(), r"sin is .* strides \(1, 96\)"),
        (0, lambda q: q.double(), "float64 is not one of"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(place: int, change: object, message: str) -> None:
    tensors = [parity.zeros(*shape) for shape in [(2, 96, 96)] * 2 + [(96,)] * 2 + [(96, 16)] * 2]
    tensors[place] = change(tensors[place])
    with parity.triton("qk_norm_rope"), pytest.raises(KernelError, match=message):
        call(qk_norm_rope.qk_norm_rope, 3, *tensors)


def test_heads_of_an_odd_dimension_are_named() -> None:
    tensors = draw(1, 2, 4, 10)
    with parity.triton("qk_norm_rope"), pytest.raises(KernelError, match="40 columns in 8 heads"):
        call(qk_norm_rope.qk_norm_rope, 8, *tensors)
