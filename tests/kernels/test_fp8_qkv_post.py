"""From q, k, v to e4m3 queries and a page: the kernel against its reference, and both against plain attention."""

import math
from dataclasses import dataclass, replace

import parity
import pytest
import torch
from fp8_operands import DIM, E4M3_NAN, rel_l2
from torch import Tensor

from reelforge.kernels import fp8_qkv_post as module
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import E4M3, GROUP, LARGEST, dequantise
from reelforge.kernels.fp8_attention import fp8_attention
from reelforge.kernels.fp8_qkv_post import fp8_qkv_post, hadamard_matrix, statistics
from reelforge.kernels.qk_norm_rope import norm_rope_wide

HEADS, EPS = 2, 1e-6


@dataclass(frozen=True)
class Cache:
    """Pages whose every byte is NaN until it is written."""

    keys: Tensor
    key_scale: Tensor
    values: Tensor

    @classmethod
    def empty(cls, pages: int, size: int) -> "Cache":
        keys, values = (
            torch.full((pages, HEADS, *shape), E4M3_NAN, dtype=torch.uint8, device=parity.DEVICE).view(E4M3)
            for shape in ((size, DIM), (DIM, size))
        )
        return cls(keys, torch.full((pages, HEADS, size // GROUP), torch.nan, device=parity.DEVICE), values)

    def bytes(self) -> list[Tensor]:
        return [self.keys.view(torch.uint8), self.key_scale.view(torch.uint8), self.values.view(torch.uint8)]


@dataclass(frozen=True)
class Chunk:
    """What the projections give for a chunk, with the norms' weights and the angles."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rotation: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, batch: int, tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> "Chunk":
        width = HEADS * DIM
        q, k, v = (parity.randn(seed + i, batch, tokens, width, dtype=dtype) for i in range(3))
        weights = [1 + 0.1 * parity.randn(seed + 3 + i, width) for i in range(2)]
        angle = parity.randn(seed + 5, tokens, DIM // 2)
        return cls(q, k, v, *(weight.to(dtype) for weight in weights), (angle.cos(), angle.sin()))

    def statistics(self) -> tuple[Tensor, Tensor]:
        return statistics(self.k, self.v, self.k_weight, self.rotation, HEADS, EPS)

    def first(self) -> tuple[Tensor, Tensor]:
        """Statistics of the stream's first chunk, which was another one."""
        return Chunk.make(len(self.q), 64, self.q.dtype, seed=20).statistics()

    def write(self, implementation: str, cache: Cache, pages: Tensor, hadamard: bool = False) -> tuple[Tensor, Tensor]:
        with parity.triton("fp8_qkv_post", implementation):
            return fp8_qkv_post(
                self.q, self.k, self.v, self.q_weight, self.k_weight, self.rotation, HEADS, EPS, *self.first(),
                cache.keys, cache.key_scale, cache.values, pages, hadamard=hadamard,
            )  # fmt: skip


def page_numbers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=parity.DEVICE)


def assert_same_rounding(actual: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    """e4m3 of numbers that agree to fp32's rounding, or to ``slack``: a rare one falls on the other side of a tie."""
    actual, expected = actual.float(), expected.float()
    assert torch.equal(actual.isnan(), expected.isnan()), "another element was written"
    off = (actual - expected).nan_to_num()
    assert (off != 0).float().mean() < 0.002
    assert (off.abs() <= 2**-3 * expected.nan_to_num().abs().clamp(min=2**-6) + slack).all()


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_kernel_against_the_reference(tokens: int, dtype: torch.dtype, hadamard: bool) -> None:
    chunk, caches = Chunk.make(2, tokens, dtype), [Cache.empty(4, 384) for _ in range(2)]
    (q, q_scale), (q_right, q_scale_right) = (
        chunk.write(name, cache, page_numbers(3, 1), hadamard)
        for name, cache in zip(("triton", "torch"), caches, strict=True)
    )
    # An element that is rounded the other way in front of the Hadamard matrix moves all 128 by 2^-8 / sqrt(128) of it.
    moved = 2e-3 if hadamard and dtype != torch.float32 else 2e-6
    torch.testing.assert_close(q_scale, q_scale_right, rtol=moved, atol=0)
    torch.testing.assert_close(caches[0].key_scale, caches[1].key_scale, rtol=moved, atol=0, equal_nan=True)
    assert_same_rounding(q, q_right, moved * LARGEST)
    assert_same_rounding(caches[0].keys, caches[1].keys, moved * LARGEST)
    assert_same_rounding(caches[0].values, caches[1].values)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_only_the_named_pages_and_tokens_are_written(implementation: str) -> None:
    chunk, cache = Chunk.make(2, 130), Cache.empty(4, 384)
    before = [tensor.clone() for tensor in cache.bytes()]
    chunk.write(implementation, cache, page_numbers(2, 0))
    for now, then in zip(cache.bytes(), before, strict=True):
        assert torch.equal(now[[1, 3]], then[[1, 3]])
    assert cache.keys[[0, 2], :, :130].float().isfinite().all() and cache.keys[[0, 2], :, 130:].float().isnan().all()
    assert cache.key_scale[[0, 2], :, :2].isfinite().all() and cache.key_scale[[0, 2], :, 2:].isnan().all()
    assert not cache.values[[0, 2], :, :, 130:256].float().any(), "zeros up to the next 128"
    assert cache.values[[0, 2], :, :, 256:].float().isnan().all()


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_the_reference_is_the_formula(implementation: str) -> None:
    """Each operand, its scale multiplied in, is within half a step of the norm and rotation in fp64."""
    chunk, cache = Chunk.make(1, 200), Cache.empty(1, 256)
    q8, q_scale = chunk.write(implementation, cache, page_numbers(0))
    mean, value_scale = chunk.first()
    rotation = tuple(table.double() for table in chunk.rotation)
    q, k = (
        norm_rope_wide(x.double(), weight.double(), rotation, HEADS, EPS, False)[0].transpose(0, 1)
        for x, weight in ((chunk.q, chunk.q_weight), (chunk.k, chunk.k_weight))
    )
    k = k - mean[0, :, None].double()
    v = chunk.v[0].double().unflatten(-1, (HEADS, DIM)).transpose(0, 1)
    step = cache.key_scale[0].double().repeat_interleave(GROUP, 1)[:, :200, None]
    pairs = (
        (dequantise(q8.transpose(1, 2), q_scale[..., None])[0].double(), q, q_scale[0, ..., None].double()),
        (cache.keys[0, :, :200].double() * step, k, step),
        (
            cache.values[0, :, :, :200].double().transpose(1, 2) * value_scale[0, :, None].double(),
            v,
            value_scale[0, :, None].double(),
        ),
    )
    for found, right, scale in pairs:
        assert ((found - right).abs() <= torch.maximum(right.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()
    assert (cache.keys[0].float().nan_to_num().unflatten(1, (-1, GROUP)).abs().amax((2, 3)) == LARGEST).all()


# --- the whole way: what attention sees ---


def attended(chunk: Chunk, hadamard: bool = False, mean: bool = True) -> tuple[Tensor, Tensor]:
    """Output of the quantised way, and of plain attention in fp64 on the same projections."""
    batch, tokens, _ = chunk.q.shape
    cache, pages = Cache.empty(batch, -(-tokens // GROUP) * GROUP), page_numbers(*range(batch))
    key_mean, value_scale = chunk.statistics()
    q, q_scale = fp8_qkv_post(
        chunk.q, chunk.k, chunk.v, chunk.q_weight, chunk.k_weight, chunk.rotation, HEADS, EPS,
        key_mean if mean else torch.zeros_like(key_mean), value_scale,
        cache.keys, cache.key_scale, cache.values, pages, hadamard=hadamard,
    )  # fmt: skip
    lengths = torch.full((batch, 1), tokens, dtype=torch.int32, device=parity.DEVICE)
    out, _ = fp8_attention(q, q_scale, cache.keys, cache.key_scale, cache.values, value_scale, pages[:, None], lengths)
    q, k = (
        norm_rope_wide(x.double(), weight.double(), chunk.rotation, HEADS, EPS, False).transpose(1, 2)
        for x, weight in ((chunk.q, chunk.q_weight), (chunk.k, chunk.k_weight))
    )
    v = chunk.v.double().unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    right = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM), -1) @ v
    return out, right.transpose(1, 2)


@pytest.mark.parametrize("hadamard", [False, True])
def test_attention_of_a_chunk(hadamard: bool) -> None:
    chunk = Chunk.make(2, 300)
    chunk = replace(chunk, v=chunk.v + 2 * parity.randn(9, 1, 1, HEADS * DIM, dtype=chunk.v.dtype))
    assert rel_l2(*attended(chunk, hadamard)) < 0.01


def test_the_mean_of_the_keys_takes_what_they_share() -> None:
    """Keys that share a vector, unrotated: with it their e4m3 has no bits left for what tells them apart."""
    chunk = Chunk.make(1, 300)
    still = tuple(torch.full_like(table, value) for table, value in zip(chunk.rotation, (1.0, 0.0), strict=True))
    shared = 6 * parity.randn(9, 1, 1, HEADS * DIM, dtype=chunk.k.dtype)
    chunk = replace(chunk, rotation=still, k=chunk.k + shared, q_weight=chunk.q_weight * 6)
    assert rel_l2(*attended(chunk)) < 0.6 * rel_l2(*attended(chunk, mean=False))


def test_the_hadamard_matrix_spreads_a_channel_that_stands_out() -> None:
    matrix = hadamard_matrix(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, matrix.T) and (matrix.abs() == matrix[0, 0]).all()
    x = torch.zeros(128, dtype=torch.float64)
    x[5] = 1
    assert (matrix @ x).abs().max() == pytest.approx(1 / math.sqrt(128))


def test_statistics_are_a_mean_and_a_largest() -> None:
    chunk = Chunk.make(2, 50, torch.float32)
    mean, value_scale = chunk.statistics()
    k = norm_rope_wide(chunk.k, chunk.k_weight, chunk.rotation, HEADS, EPS, False)
    torch.testing.assert_close(mean, k.sum(1) / 50)
    largest = chunk.v.unflatten(-1, (HEADS, DIM)).abs().amax(1)
    torch.testing.assert_close(value_scale * LARGEST, module.HEADROOM * largest)


# --- layouts, errors ---


def test_columns_of_one_fused_projection() -> None:
    chunk = Chunk.make(2, 130)
    fused = torch.cat((chunk.q, chunk.k, chunk.v), -1)
    parts = dict(zip("qkv", fused.chunk(3, -1), strict=True))
    caches = [Cache.empty(2, 256) for _ in range(2)]
    results = [
        made.write("triton", cache, page_numbers(0, 1))
        for made, cache in zip((chunk, replace(chunk, **parts)), caches, strict=True)
    ]
    for one, other in zip(
        *([*cache.bytes(), *found] for cache, found in zip(caches, results, strict=True)), strict=True
    ):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_the_custom_op_is_registered_right() -> None:
    chunk, cache = Chunk.make(1, 20), Cache.empty(1, 128)
    operands = (
        chunk.q, chunk.k, chunk.v, chunk.q_weight, chunk.k_weight, *chunk.rotation, HEADS, EPS, *chunk.first(),
        cache.keys, cache.key_scale, cache.values, page_numbers(0), False,
    )  # fmt: skip
    # Its other checks compare e4m3 operands by torch.allclose, which torch has not for them.
    torch.library.opcheck(module._op, operands, test_utils="test_faketensor")


def test_a_page_too_short_and_a_gradient_are_errors() -> None:
    chunk = Chunk.make(1, 129)
    with pytest.raises(KernelError, match=r"129 tokens.*holds all tokens"):
        chunk.write("torch", Cache.empty(1, 128), page_numbers(0))
    with pytest.raises(KernelError, match=r"pages is torch.int64.*torch.int32 \(1,\)"):
        chunk.write("torch", Cache.empty(1, 256), page_numbers(0).long())
    with pytest.raises(KernelError, match="no gradient"):
        replace(chunk, q=chunk.q.requires_grad_()).write("torch", Cache.empty(1, 256), page_numbers(0))
