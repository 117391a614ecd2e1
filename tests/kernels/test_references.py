"""The ops' torch references against the formulas written out in another way, in fp64, and their rounding in bf16."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from reelforge.kernels.attention import attention, explicit_attention
from reelforge.kernels.gated_residual_norm import gated_residual_norm
from reelforge.kernels.gelu import gelu
from reelforge.kernels.norm_modulate import norm_modulate
from reelforge.kernels.qk_norm_rope import qk_norm_rope
from reelforge.kernels.qk_norm_rope_into import qk_norm_rope_into
from reelforge.kernels.rms_norm import rms_norm

EPS = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


@pytest.mark.parametrize(("batch", "rows"), [(2, 1), (2, 3), (1, 3)])
def test_norm_modulate(batch: int, rows: int) -> None:
    x, gain, shift = draw(2, 6, 5), draw(batch, rows, 5, seed=1), draw(batch, rows, 5, seed=2)
    spread = [np.repeat(np.broadcast_to(t, (2, rows, 5)), 6 // rows, axis=1) for t in (gain.numpy(), shift.numpy())]
    expected = layer_norm(x.numpy()) * spread[0] + spread[1]
    np.testing.assert_allclose(norm_modulate(x, gain, shift, EPS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_norm(gated: bool) -> None:
    x, y, gate = draw(2, 6, 5), draw(2, 6, 5, seed=1), draw(2, 3, 5, seed=2) if gated else None
    gain, shift = draw(1, 1, 5, seed=3), draw(1, 1, 5, seed=4)
    factor = np.repeat(gate.numpy(), 2, axis=1) if gated else 1.0
    residual = x.numpy() + factor * y.numpy()
    new, normed = gated_residual_norm(x, y, gate, gain, shift, EPS)
    np.testing.assert_allclose(new, residual, rtol=1e-13)
    np.testing.assert_allclose(normed, layer_norm(residual) * gain.numpy() + shift.numpy(), rtol=1e-11, atol=1e-12)


def test_residual_rounding_points_differ_in_bf16_only() -> None:
    x, y = draw(1, 64, 32).bfloat16(), draw(1, 64, 32, seed=1).bfloat16()
    gate, gain, shift = (draw(1, 1, 32, seed=s).float() for s in (2, 3, 4))
    once, twice = (gated_residual_norm(x, y, gate, gain, shift, EPS, round_residual=r) for r in (False, True))
    assert torch.equal(once[0], twice[0]) and not torch.equal(once[1], twice[1])
    exact = gated_residual_norm(*(t.double() for t in (x, y, gate, gain, shift)), EPS)[1]
    assert (once[1] - exact).square().mean() < (twice[1] - exact).square().mean()


def test_rms_norm() -> None:
    x, weight = draw(2, 3, 8), draw(8, seed=1)
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + EPS) * weight.numpy()
    np.testing.assert_allclose(rms_norm(x, weight, EPS), expected, rtol=1e-12)


def test_qk_norm_rope_rotates_interleaved_pairs() -> None:
    q, k, heads = draw(2, 3, 8), draw(2, 3, 8, seed=1), 2
    angle = draw(3, 2, seed=2)
    weights = draw(8, seed=3), draw(8, seed=4)
    outputs = qk_norm_rope(q, k, *weights, (angle.cos(), angle.sin()), heads, EPS)
    for x, weight, out in zip((q, k), weights, outputs, strict=True):
        normed = rms_norm(x, weight, EPS).numpy().reshape(2, 3, heads, 2, 2)
        for pair in range(2):
            theta = angle[:, pair].numpy()
            turn = np.stack([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]).transpose(2, 0, 1)
            expected = np.einsum("lij,blnj->blni", turn, normed[..., pair, :])
            np.testing.assert_allclose(out[..., 2 * pair : 2 * pair + 2], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("round_norm", [False, True])
def test_qk_norm_rope_into_stores_what_qk_norm_rope_returns(round_norm: bool) -> None:
    q, k, v = (draw(2, 3, 8, seed=seed).bfloat16() for seed in range(3))
    angle, weights = draw(3, 2, seed=3).float(), (draw(8, seed=4).float(), draw(8, seed=5).float())
    operands = (*weights, (angle.cos(), angle.sin()), 2, EPS)
    keys, values = torch.zeros(2, 2, 5, 2, 4, dtype=torch.bfloat16)
    out = qk_norm_rope_into(q, k, v, *operands, keys[:, 1:4], values[:, 1:4], round_norm=round_norm)
    expected = qk_norm_rope(q, k, *operands, round_norm=round_norm)
    assert torch.equal(out, expected[0]) and torch.equal(keys[:, 1:4], expected[1])
    assert torch.equal(values[:, 1:4].flatten(2), v)
    assert not keys[:, [0, 4]].any() and not values[:, [0, 4]].any()


@pytest.mark.parametrize("lengths", [(1, 1), (5, 7), (130, 140)])
def test_attention(lengths: tuple[int, int]) -> None:
    q, k, v = draw(2, lengths[0], 3, 4), draw(2, lengths[1], 3, 4, seed=1), draw(2, lengths[1], 3, 4, seed=2)
    scores = np.einsum("blnd,bmnd->bnlm", q.numpy(), k.numpy()) / 2.0
    expected = np.einsum("bnlm,bmnd->blnd", softmax(scores, axis=-1), v.numpy())
    np.testing.assert_allclose(attention(q, k, v), expected, rtol=1e-10, atol=1e-12)
    explicit = explicit_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    np.testing.assert_allclose(explicit, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_gelu(biased: bool) -> None:
    x, bias = np.linspace(-6, 6, 101)[:, None], np.array([0.0, -1.5, 0.25]) if biased else np.zeros(1)
    z = x + bias
    expected = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    given = np.broadcast_to(x, z.shape).copy()
    result = gelu(torch.from_numpy(given), torch.from_numpy(bias) if biased else None)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def test_gelus_bias_is_added_in_fp32() -> None:
    x, bias = draw(4, 32).bfloat16(), draw(32, seed=1).bfloat16()
    exact = gelu(x.double(), bias.double())
    once, twice = gelu(x, bias), gelu(x + bias)
    assert torch.equal(once, exact.bfloat16()) and not torch.equal(once, twice)
