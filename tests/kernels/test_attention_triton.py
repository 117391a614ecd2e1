"""Attention's Triton forward against the formula in fp64: lengths around its tiles, head sizes, hard score rows."""

import math

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import attention_triton
from reelforge.kernels.attention import attention, reference
from reelforge.kernels.errors import KernelError

# Each length of 1, one short of a tile, a tile, one past it and two past two, with another on the other side.
LENGTHS = [(1, 1), (1, 130), (130, 1), (63, 64), (64, 63), (65, 65), (64, 130), (130, 65)]
HEAD_DIMS = [12, 32, 64, 128]
# The probabilities are rounded to v's dtype before the product, the result once more: 2.0 at worst was seen.
SLACK = 3.0


def operands(lengths: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    queries, keys = lengths
    return tuple(parity.randn(seed, 2, n, 2, head_dim, dtype=dtype) for seed, n in enumerate((queries, keys, keys)))


def run(*tensors: Tensor) -> Tensor:
    with parity.triton("attention"):
        return attention(*tensors)


def assert_near_fp64(*tensors: Tensor, slack: float = SLACK) -> Tensor:
    """Result of the kernel, which must be within rounding of the formula."""
    out = run(*tensors)
    assert out.dtype == tensors[0].dtype and out.is_contiguous()
    parity.assert_close(out, reference(*(tensor.double() for tensor in tensors)), out.dtype, slack)
    return out


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_kernel_against_fp64(lengths: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    assert_near_fp64(*operands(lengths, head_dim, dtype))


@pytest.mark.parametrize("head_dim", [1, 96, 200, 256])
def test_other_head_sizes(head_dim: int) -> None:
    assert_near_fp64(*operands((17, 70), head_dim, torch.bfloat16))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_views_of_caches_are_read_in_place(dtype: torch.dtype) -> None:
    """No two operands share a stride, and all around them is NaN."""
    tensors = operands((65, 130), 32, dtype)
    shapes = (2, 70, 3, 2, 32), (2, 300, 1, 3, 32), (2, 250, 1, 2, 40)
    views = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        buffer = torch.full(shape, torch.nan, dtype=dtype, device=parity.DEVICE)
        views.append(buffer[:, 3 : 3 + tensor.shape[1], -1, -2:, :32])
        views[-1].copy_(tensor)
    assert torch.equal(assert_near_fp64(*views), run(*tensors))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_one_score_far_above_the_rest(dtype: torch.dtype) -> None:
    q, k, v = operands((70, 130), 64, dtype)
    k[:, 100] = q[:, 3] * (50 * 8 / q[:, 3].float().square().sum(-1, keepdim=True)).to(dtype)
    out = assert_near_fp64(q, k, v)
    torch.testing.assert_close(out[:, 3], v[:, 100], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_the_maximum_moves_with_every_tile(order: int, dtype: torch.dtype) -> None:
    q, k, v = operands((33, 300), 32, dtype)
    q[..., 0], k[..., 0] = 8.0, order * torch.arange(300, device=k.device)[None, :, None].to(dtype) / 32
    assert_near_fp64(q, k, v)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_equal_keys_average_the_values(dtype: torch.dtype) -> None:
    q, k, v = operands((33, 130), 32, dtype)
    out = assert_near_fp64(q, k[:, :1].expand_as(k).contiguous(), v)
    parity.assert_close(out, v.double().mean(1, keepdim=True).expand_as(out), dtype, SLACK)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_zero_rows_give_no_nan(dtype: torch.dtype) -> None:
    q, k, v = operands((33, 130), 32, dtype)
    q[:, ::2], k[:, ::3], v[:, ::5] = 0, 0, 0
    out = assert_near_fp64(q, k, v)
    parity.assert_close(out[:, ::2], v.double().mean(1, keepdim=True).expand_as(out[:, ::2]), dtype, SLACK)
    assert not run(q, k, torch.zeros_like(v)).any()


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Integers times 64, whose scores up to 1e5 are exact in fp32: ties share, all else vanishes."""
    q, k = (parity.randn(seed, 2, n, 2, 16).round() * 64 for seed, n in ((0, 33), (1, 130)))
    assert_near_fp64(q.to(dtype), k.to(dtype), parity.randn(2, 2, 130, 2, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (65, 130), (33, 64)], ids=str)
def test_log_sum_exp(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = operands(lengths, 32, dtype)
    k *= 4
    with parity.triton("attention"):
        _, lse = attention_triton.forward(q, k, v)
    scores = torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / math.sqrt(32)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=2e-6, atol=2e-6)


def test_a_sample_does_not_depend_on_the_batch() -> None:
    q, k, v = (torch.cat((tensor, tensor.flip(0))) for tensor in operands((65, 130), 32, torch.bfloat16))
    whole = run(q, k, v)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], run(q[i : i + 1], k[i : i + 1], v[i : i + 1]))
    assert torch.equal(whole[:, :, :1], run(q[:, :, :1], k[:, :, :1], v[:, :, :1])), "nor a head on other heads"


def test_a_query_does_not_depend_on_the_others() -> None:
    q, k, v = operands((200, 130), 32, torch.bfloat16)
    assert torch.equal(run(q, k, v)[:, 50:70], run(q[:, 50:70], k, v))


def test_the_custom_op_is_registered_right() -> None:
    torch.library.opcheck(attention_triton.forward, operands((5, 7), 12))
    q, k, v = operands((5, 7), 12)
    torch.library.opcheck(attention_triton.forward, (q, k[:, 2:], v[:, 2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64 is not one of"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "it has no backward pass"),
        (lambda q, k, v: (q.repeat(1, 1, 1, 10), k.repeat(1, 1, 1, 10), v.repeat(1, 1, 1, 10)), "320 is above 256"),
        (lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v), "k has strides .*must be contiguous"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    tensors = change(*operands((5, 7), 32))
    with parity.triton("attention"), pytest.raises(KernelError, match=message):
        attention(*tensors)


def test_gradients_of_the_bare_op_are_an_error_too() -> None:
    q, k, v = operands((5, 7), 12)
    with parity.triton("attention"):
        out, _ = attention_triton.forward(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()
