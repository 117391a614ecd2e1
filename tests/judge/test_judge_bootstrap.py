"""Intervals against scipy, closed forms and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reelforge.bench.judge.bootstrap import (
    mean_interval,
    paired_interval,
    ratio_interval,
    recentred_interval,
    resampled_clips,
)
from reelforge.engine.core.errors import DataError


def test_equal_clusters_agree_with_scipy_on_cluster_means() -> None:
    rng = np.random.default_rng(0)
    values, prompts = rng.normal(size=(40, 6)) + rng.normal(size=(40, 1)), np.repeat(np.arange(40), 6)
    ours = mean_interval(values.ravel(), prompts, seed=1)
    theirs = stats.bootstrap(
        (values.mean(axis=1),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    # Two Monte Carlo quantiles of 10,000 draws each: about 3 % of the width apart at two sigma.
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)
    assert ours.mean == pytest.approx(values.mean())


def test_unequal_clusters_agree_with_the_ratio_estimators_standard_error() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, size=400)
    prompts = np.repeat(np.arange(400), sizes)
    values = rng.normal(size=400)[prompts] + rng.normal(size=len(prompts))
    found = mean_interval(values, prompts, seed=0)
    residual = np.bincount(prompts, weights=values - values.mean())
    half_width = 1.96 * np.sqrt((residual**2).sum()) / len(values)  # linearised ratio of sums
    assert (found.high - found.low) / 2 == pytest.approx(half_width, rel=0.05)


def test_interval_covers_the_truth_when_clips_of_a_prompt_resemble_each_other() -> None:
    rng = np.random.default_rng(4)
    prompts = np.repeat(np.arange(40), 4)
    hits = {"by prompt": 0, "as if independent": 0}
    for trial in range(300):
        values = np.repeat(rng.normal(size=40), 4) + 0.5 * rng.normal(size=160)
        for name, unit in (("by prompt", prompts), ("as if independent", np.arange(160))):
            interval = mean_interval(values, unit, seed=trial, resamples=600)
            hits[name] += interval.low <= 0 <= interval.high
    # 300 trials at 95 %: standard error 1.3 points; a percentile interval of 40 prompts covers a little less.
    assert 270 <= hits["by prompt"] <= 296
    assert hits["as if independent"] < 240


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(30), 4)
    shared = 5 * rng.normal(size=120)
    first, second = shared + 0.3 + 0.1 * rng.normal(size=120), shared
    paired, alone = paired_interval(first, second, prompts, seed=0), mean_interval(first, prompts, seed=0)
    assert 0 < paired.low < 0.3 < paired.high
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


def test_missing_scores_are_left_out_not_made_up() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, 8.0])
    prompts = np.array([0, 0, 1, 1, 2, 3])
    kept = np.isfinite(values)
    assert mean_interval(values, prompts, seed=0) == mean_interval(values[kept], prompts[kept], seed=0)


def test_a_ratio_of_means_by_its_linearised_standard_error() -> None:
    """Var(a/b) is about Var(mean(a - r b)) / mean(b)^2 for independent prompts (Cochran 1977, ch. 2)."""
    draw = np.random.default_rng(3)
    below = draw.uniform(0.5, 1.5, 400)
    above = 0.9 * below + 0.2 * draw.standard_normal(400)
    found = ratio_interval(above, below, np.arange(400), seed=1)
    ratio = above.mean() / below.mean()
    error = (above - ratio * below).std(ddof=1) / 20 / below.mean()
    assert found.mean == pytest.approx(ratio)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    gone = np.where(np.arange(400) < 40, np.nan, below)
    assert ratio_interval(above, gone, np.arange(400), seed=1).mean == pytest.approx(
        above[40:].mean() / below[40:].mean()
    )


def test_one_prompt_has_no_interval() -> None:
    with pytest.raises(DataError, match="1 prompt.*too few.*at least 2"):
        mean_interval(np.ones(5), np.zeros(5), seed=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**40), st.data())
def test_deterministic_bounded_and_equivariant(clusters: int, seed: int, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.floats(-5, 5), min_size=clusters, max_size=clusters)))
    prompts = np.arange(clusters)
    found = mean_interval(values, prompts, seed, resamples=200)
    assert found == mean_interval(values, prompts, seed, resamples=200)
    assert values.min() - 1e-9 <= found.low <= found.high <= values.max() + 1e-9
    moved = mean_interval(3 + 2 * values, prompts, seed, resamples=200)
    assert [moved.mean, moved.low, moved.high] == pytest.approx(
        [3 + 2 * found.mean, 3 + 2 * found.low, 3 + 2 * found.high], abs=1e-9
    )


def test_a_draw_keeps_every_clip_of_a_drawn_prompt() -> None:
    prompts = np.array([7, 3, 7, 3, 3, 9])
    for clips in resampled_clips(prompts, seed=0, resamples=20):
        times = np.bincount(clips, minlength=6)
        assert times[0] == times[2] and times[1] == times[3] == times[4]
        assert times[0] + times[1] + times[5] == 3


def test_recentring_takes_the_bootstraps_bias_out() -> None:
    draws = np.random.default_rng(6).normal(9.0, 1.0, size=4000)
    found = recentred_interval(5.0, draws)
    assert found.mean == 5.0
    assert [found.low, found.high] == pytest.approx([5 - 1.96, 5 + 1.96], abs=0.15)
