"""Draws: their layout, distribution and independence of the batch split, and naming. Bits are test_philox.py's."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from reelforge.engine.core import rng
from reelforge.kernels import philox

KEYS = [rng.key("test", seed) for seed in range(6)]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, with Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0, k1 = ((k + i * weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
    return [c0, c1, c2, c3]


def test_normals_are_box_muller_of_the_counters_words() -> None:
    """Element i is word i % 4 of counter i // 4, paired as Triton's randn4x pairs them."""
    key = KEYS[0]
    drawn = rng.normal([key], (10,))[0]
    for i in range(10):
        bits = python_philox([i // 4, 0, 0, 0], [key % 2**32, key >> 32])
        signed = [word - 2**32 if word >= 2**31 else word for word in bits]
        u = [(-s - 1 if s < 0 else s) * 4.6566127342e-10 for s in signed]
        pair = i % 4 // 2 * 2
        wave = math.sin if i % 2 else math.cos
        expected = math.sqrt(-2 * math.log(max(u[pair], 1e-7))) * wave(2 * math.pi * u[pair + 1])
        assert drawn[i].item() == pytest.approx(expected, abs=2e-6)


def test_keys_may_lie_on_the_device_already() -> None:
    assert torch.equal(rng.normal(torch.tensor(KEYS), (3, 5)), rng.normal(KEYS, (3, 5)))


@pytest.mark.parametrize("count", [1, 3, 4, 1001])
def test_rows_do_not_depend_on_the_batch_split(count: int) -> None:
    whole = rng.normal(KEYS, (count,))
    assert whole.shape == (6, count)
    assert torch.equal(whole, torch.cat([rng.normal([key], (count,)) for key in KEYS]))
    assert torch.equal(whole[[4, 1]], rng.normal([KEYS[4], KEYS[1]], (count,)))


def test_a_longer_draw_continues_a_shorter_one() -> None:
    assert torch.equal(rng.normal(KEYS, (9,)), rng.normal(KEYS, (5, 7)).flatten(1)[:, :9])
    assert torch.equal(rng.uniform(KEYS[0], 9), rng.uniform(KEYS[0], 100)[:9])


def test_normals_are_normal() -> None:
    sample = rng.normal([rng.key("distribution", 1)], (200_000,))[0].double().numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    n = len(sample)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((sample**power).mean() - moment) < 4 * math.sqrt(variance / n)


def test_uniforms_are_uniform_and_below_one() -> None:
    sample = rng.uniform(rng.key("distribution", 2), 200_000).numpy()
    assert sample.dtype == np.float32
    assert sample.min() >= 0
    assert sample.max() < 1
    assert stats.kstest(sample, "uniform").pvalue > 1e-3


def test_the_largest_word_stays_below_one() -> None:
    """2^31 - 1 rounds up to 2^31 in float32; the unit is just small enough to make up for it."""
    words = torch.tensor([2**31 - 1, -(2**31), -1, 0], dtype=torch.int32)
    assert philox.uniform(words).tolist() == [1 - 2**-24, 1 - 2**-24, 0, 0]


def test_draws_of_different_names_are_uncorrelated() -> None:
    """Neighbouring elements too: lag 1 to 4 within a draw, which share a counter."""
    draws = rng.normal(KEYS, (20_000,)).double().numpy()
    bound = stats.norm.ppf(1 - 1e-5) / math.sqrt(20_000)
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < bound
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(draws[0, :-lag], draws[0, lag:])[0, 1]) < bound


def test_keys_are_stable_and_told_apart() -> None:
    names = [("x_T", 0), ("x_T", 0, 0), ("x_T", 1), ("x_T", -1), ("sde", 0), ("x_T", 2**63 - 1), ("x_T",)]
    keys = [rng.key(name, *counters) for name, *counters in names]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    assert rng.key("x_T", 0, 1, 2, 3) == rng.key("x_T", 0, 1, 2, 3)


def test_drawing_leaves_torchs_global_state_alone() -> None:
    before = torch.get_rng_state()
    rng.normal(KEYS, (10,))
    assert torch.equal(before, torch.get_rng_state())


def test_host_generator_is_named_too() -> None:
    draw = rng.generator("shuffle", 3, 1).permutation(50)
    assert (draw == rng.generator("shuffle", 3, 1).permutation(50)).all()
    assert (draw != rng.generator("shuffle", 3, 2).permutation(50)).any()


def test_epochs_show_everything_once_and_do_not_depend_on_who_asks() -> None:
    whole = rng.in_epochs("order", 3, 5, range(15))
    assert [sorted(whole[first : first + 5]) for first in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    assert rng.in_epochs("order", 3, 5, [12, 1, 7]) == [whole[12], whole[1], whole[7]]
    assert whole[:5] == rng.generator("order", 3, 0).permutation(5).tolist()


@pytest.mark.parametrize("count", [1, 4, 1001])
def test_uniforms_are_those_of_each_key(count: int) -> None:
    whole = rng.uniforms(KEYS, count)
    assert whole.shape == (6, count) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.stack([rng.uniform(key, count) for key in KEYS]))
    assert torch.equal(whole[[4, 1]], rng.uniforms([KEYS[4], KEYS[1]], count))


def test_gumbel_noise_is_that_of_the_uniforms_and_of_each_key_alone() -> None:
    """-log(-log(1 - u)), the distribution function's inverse at 1 - u."""
    drawn = rng.gumbel(KEYS, 1001)
    u = rng.uniforms(KEYS, 1001).double()
    assert drawn.dtype == torch.float32
    assert np.allclose(drawn.double(), stats.gumbel_r.ppf(1 - u), rtol=2e-6, atol=1e-6)
    assert torch.equal(drawn[2:3], rng.gumbel([KEYS[2]], 1001))
    assert torch.equal(drawn[:, :7], rng.gumbel(KEYS, 7))


def test_gumbel_noise_is_gumbel() -> None:
    sample = rng.gumbel([rng.key("distribution", 3)], 200_000)[0].double().numpy()
    assert np.isfinite(sample).all()
    assert stats.kstest(sample, "gumbel_r").pvalue > 1e-3
    tail = stats.gumbel_r.sf(8.0) * len(sample)  # 67 of them, where float32 next to 1 would begin to step
    assert abs((sample > 8.0).sum() - tail) < 4 * math.sqrt(tail)


def test_gumbel_noise_is_finite_at_both_ends(monkeypatch) -> None:
    """Of all uniforms, the two at the ends would be infinite; the upper tail still tells neighbours apart."""
    ends = torch.tensor([[0.0, 2.0**-31, 2.0**-30, 0.5, 1 - 2.0**-24]])
    monkeypatch.setattr(rng, "uniforms", lambda keys, count, device: ends)
    drawn = rng.gumbel(KEYS[:1], 5)[0]
    assert torch.isfinite(drawn).all() and (drawn.diff() < 0).all()
    assert drawn[1].item() == pytest.approx(31 * math.log(2), rel=1e-6)


def test_the_largest_of_logits_and_gumbel_noise_is_a_draw_from_their_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0, -torch.inf])
    drawn = (logits + rng.gumbel([rng.key("choice", n) for n in range(30_000)], 6)).argmax(1)
    expected = torch.softmax(logits.double(), 0)[:5].numpy() * 30_000
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert counts[5] == 0
    assert stats.chisquare(counts[:5], expected).pvalue > 1e-3
