"""q/k norm, rotation and cache write: the Triton kernel against the reference in fp64, and what it must not touch."""

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, qk_norm_rope, qk_norm_rope_into
from reelforge.kernels.errors import KernelError

EPS = 1e-6
SPAN = slice(2, -1)  # where the slot lies in the cache
# batch, tokens, heads, head_dim: one token, odd counts, a head dimension that no chunk is a multiple of, Wan's
SHAPES = [(1, 1, 2, 12), (2, 5, 5, 60), (2, 3, 12, 128), (1, 2, 40, 128)]


def draw(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v as columns of one product, two weights, cos and sin."""
    width = heads * head_dim
    angle = parity.randn(9, tokens, head_dim // 2) * 3
    projected = parity.randn(0, batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)
    return [*projected, parity.randn(1, width), parity.randn(2, width), angle.cos(), angle.sin()]


def call(function: object, heads: int, tensors: list[Tensor], caches: Tensor, *, round_norm: bool = False) -> Tensor:
    *operands, cos, sin = tensors
    slots = [cache[:, SPAN] for cache in caches]
    return function(*operands, (cos, sin), heads, EPS, *slots, round_norm=round_norm)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("slot_dtype", [None, torch.bfloat16, torch.float32], ids=["same", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(
    shape: tuple[int, int, int, int], slot_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    batch, tokens, heads, head_dim = shape
    tensors = draw(*shape, dtype=dtype)
    caches = parity.randn(5, 2, batch, tokens + 3, heads, head_dim, dtype=slot_dtype or dtype)
    before, exact_caches = caches.clone(), caches.double()
    with parity.triton("qk_norm_rope_into"):
        out = call(qk_norm_rope_into.qk_norm_rope_into, heads, tensors, caches)
    exact = call(qk_norm_rope_into.reference, heads, parity.double(tensors), exact_caches)
    parity.assert_close(out, exact, dtype)
    parity.assert_close(caches[:, :, SPAN], exact_caches[:, :, SPAN], caches.dtype)
    for outside in (slice(0, 2), slice(-1, None)):
        assert torch.equal(caches[:, :, outside], before[:, :, outside])


@pytest.mark.parametrize("round_norm", [False, True])
def test_keys_are_those_of_the_op_that_returns_them(round_norm: bool) -> None:
    tensors = draw(2, 5, 3, 32, torch.bfloat16)
    caches = parity.randn(5, 2, 2, 8, 3, 32, dtype=torch.bfloat16)
    q, k, v, q_weight, k_weight, *rotation = tensors
    with parity.triton("qk_norm_rope_into"), parity.triton("qk_norm_rope"):
        out = call(qk_norm_rope_into.qk_norm_rope_into, 3, tensors, caches, round_norm=round_norm)
        expected = qk_norm_rope.qk_norm_rope(q, k, q_weight, k_weight, rotation, 3, EPS, round_norm=round_norm)
    assert torch.equal(out, expected[0])
    assert torch.equal(caches[0][:, SPAN], expected[1]) and torch.equal(caches[1][:, SPAN].flatten(2), v)


def test_custom_op_is_registered_right() -> None:
    tensors = [tensor.contiguous() for tensor in draw(2, 3, 3, 32)]
    keys, values = parity.randn(5, 2, 2, 3, 3, 32)
    with dispatch.pinned("qk_norm_rope_into", "triton"):
        torch.library.opcheck(qk_norm_rope_into._op, (*tensors, 3, EPS, keys.clone(), values.clone(), False))


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_gradient_is_refused(implementation: str) -> None:
    tensors = draw(1, 2, 3, 32)
    tensors[3].requires_grad_()
    caches = torch.zeros(2, 1, 5, 3, 32, device=parity.DEVICE)
    with dispatch.pinned("qk_norm_rope_into", implementation):
        with pytest.raises(KernelError, match="has no gradient"):
            call(qk_norm_rope_into.qk_norm_rope_into, 3, tensors, caches)
        with torch.no_grad():
            call(qk_norm_rope_into.qk_norm_rope_into, 3, tensors, caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache[:, :4], r"the key slot is torch.float32 \(1, 1, 3, 32\)"),
        (lambda cache: cache.transpose(2, 3).contiguous().transpose(2, 3), "each sample contiguous"),
        (lambda cache: cache.to(torch.float8_e4m3fn), "key slot is torch.float8_e4m3fn"),
    ],
)
def test_a_slot_that_the_kernel_does_not_take_is_named(change: object, message: str) -> None:
    caches = [change(parity.zeros(1, 5, 3, 32)), parity.zeros(1, 5, 3, 32)]
    with parity.triton("qk_norm_rope_into"), pytest.raises(KernelError, match=message):
        call(qk_norm_rope_into.qk_norm_rope_into, 3, draw(1, 2, 3, 32), caches)
