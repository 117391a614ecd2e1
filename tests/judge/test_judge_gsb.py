"""Automatic Good/Same/Bad: formulas, tests against scipy, the dead zone, planted preferences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reelforge.bench.judge.bootstrap import mean_interval
from reelforge.bench.judge.gsb import Gsb, Panel, Verifier, compare, fix_panel, sign_flip_test
from reelforge.engine.core.errors import DataError

SHARP, HAZE = Verifier("sharp", "higher", target=False), Verifier("haze", "lower", target=False)
REWARD = Verifier("reward", "higher", target=True)
UNIT_PANEL = Panel({"vote": 1.0}, dead_zone=0.5)


def judge(votes: np.ndarray, prompts: np.ndarray | None = None) -> Gsb:
    prompts = np.arange(len(votes)) if prompts is None else prompts
    return compare({"vote": votes}, {"vote": np.zeros(len(votes))}, prompts, UNIT_PANEL, "base", seed=0)


def votes_of(good: int, same: int, bad: int) -> np.ndarray:
    return np.repeat([1.0, 0.0, -1.0], [good, same, bad])


def draws(seed: int, prompts: int = 60, seeds: int = 4, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Scores with a prompt part that every draw shares."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(2, prompts))
    noise = rng.normal(size=(2, prompts * seeds))
    sharp, haze = np.repeat(shared, seeds, axis=1) + noise
    return {"sharp": 10 + 3 * (sharp + shift), "haze": 0.2 - 0.01 * (haze + shift), "reward": 100 * noise[0]}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_scores_and_their_relations(good: int, same: int, bad: int) -> None:
    if (n := good + same + bad) < 2:
        return
    found = judge(votes_of(good, same, bad))
    assert (found.good, found.same, found.bad) == (good, same, bad)
    assert found.net == pytest.approx((good - bad) / n)
    assert found.win_rate == pytest.approx((1 + found.net) / 2)
    assert found.no_tie_net * (good + bad) == pytest.approx(found.net * n)
    assert found.p_value == pytest.approx(stats.binomtest(good, good + bad).pvalue if good + bad else 1.0)


@pytest.mark.parametrize(("n", "half_width"), [(100, 0.152), (200, 0.108), (300, 0.088), (600, 0.062), (1000, 0.048)])
def test_interval_has_the_closed_forms_half_width(n: int, half_width: float) -> None:
    """se = sqrt((g + b - (g - b)^2) / n) at 30 % ties and a net of .31, one vote per prompt."""
    good, bad = round(0.505 * n), round(0.195 * n)
    found = judge(votes_of(good, n - good - bad, bad))
    g, b = good / n, bad / n
    closed = 1.96 * np.sqrt((g + b - (g - b) ** 2) / n)
    assert closed == pytest.approx(half_width, abs=0.002)
    assert (found.high - found.low) / 2 == pytest.approx(closed, rel=0.05)


def test_sign_flip_agrees_with_every_flip_enumerated() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(11), 3)
    votes = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.3, 0.5], size=33)
    sums = np.bincount(prompts, weights=votes)
    exact = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_test(votes, prompts, seed=0) == pytest.approx(exact, abs=0.015)


def test_clustered_test_is_not_fooled_by_repeated_clips() -> None:
    prompts = np.repeat(np.arange(8), 25)
    found = judge(np.repeat([1.0, 1, 1, 1, 1, -1, -1, 1], 25), prompts)
    assert found.p_value < 1e-10  # 150 against 50 votes, were they independent
    assert found.p_clustered > 0.2  # 6 prompts against 2
    assert found.low < 0 < found.high and found.verdict == "not separable at this N"


def test_dead_zone_ties_half_of_the_bases_own_pairs_and_only_held_out_verifiers_vote() -> None:
    first, second = draws(1), draws(2)
    panel = fix_panel(first, second, [REWARD, SHARP, HAZE])
    assert list(panel.scale) == ["sharp", "haze"]
    assert panel.scale["haze"] < 0 < panel.scale["sharp"]
    prompts = np.repeat(np.arange(60), 4)
    found = compare(second, first, prompts, panel, "base", seed=0)
    assert found.same == 120 and found.voters == ("sharp", "haze") and found.dead_zone == panel.dead_zone
    assert found.low < 0 < found.high
    wider = fix_panel(first, second, [SHARP, HAZE], tie_share=0.7)
    assert compare(second, first, prompts, wider, "base", seed=0).same == 168


def test_scale_is_the_pooled_standard_deviation() -> None:
    first, second = draws(1), draws(2)
    pooled = np.sqrt((first["sharp"].var(ddof=1) + second["sharp"].var(ddof=1)) / 2)
    assert fix_panel(first, second, [SHARP]).scale["sharp"] == pytest.approx(pooled)


def test_votes_do_not_depend_on_a_verifiers_unit() -> None:
    first, second, better = draws(1), draws(2), draws(3, shift=0.4)
    prompts = np.repeat(np.arange(60), 4)

    def counts(factor: float) -> tuple[int, int, int]:
        a, b, c = ({**table, "sharp": 7 + factor * table["sharp"]} for table in (first, second, better))
        found = compare(c, a, prompts, fix_panel(a, b, [SHARP, HAZE]), "base", seed=0)
        return found.good, found.same, found.bad

    assert counts(1.0) == counts(1000.0)


def test_planted_preference_is_inside_the_interval_in_most_studies() -> None:
    rng, truth, hits = np.random.default_rng(5), 0.3, 0
    prompts = np.repeat(np.arange(60), 3)
    for trial in range(200):
        taste = rng.normal(0, 0.12, size=60)[prompts]  # some prompts are easier to improve
        votes = np.where(rng.random(180) < 0.3, 0.0, np.where(rng.random(180) < (1 + (truth + taste) / 0.7) / 2, 1, -1))
        interval = mean_interval(votes, prompts, seed=trial, resamples=600)
        hits += interval.low <= truth <= interval.high
    assert hits >= 183  # 95 % less two standard errors of 200 trials


def test_pairs_without_a_score_are_counted_and_left_out() -> None:
    scores = {"vote": np.array([1.0, np.nan, -1.0, 1.0])}
    found = compare(scores, {"vote": np.zeros(4)}, np.arange(4), UNIT_PANEL, "base", seed=0)
    assert (found.good, found.same, found.bad, found.missing) == (2, 0, 1, 1)


def test_a_difference_equal_to_the_dead_zone_ties() -> None:
    assert judge(np.array([0.5, -0.5, 0.51, -0.51])).same == 2


@pytest.mark.parametrize(
    ("verifiers", "scores", "message"),
    [
        ([REWARD], draws(1), "training targets .reward."),
        ([SHARP], {"sharp": np.ones(240)}, "'sharp' is constant"),
    ],
)
def test_a_panel_that_cannot_vote_says_why(
    verifiers: list[Verifier], scores: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fix_panel(scores, scores, verifiers)
