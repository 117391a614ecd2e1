"""The plan: uniform, mirrored, the same for every world size and after a restart; what cannot be is refused."""

import itertools

import pytest
from scipy import stats

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.rl.plan import Group, PlanConfig, Planner, evaluations, stratified_pairs

T = 10


def planner(groups: int = 6, *, seed: int = 3, prompts: int = 24, **plan: object) -> Planner:
    return Planner(PlanConfig(**{"steps": (1, 8), **plan}), seed, prompts, groups, T)


def first_steps(found: tuple[Group, ...]) -> list[int]:
    return [group.stochastic[0] for group in found]


# -- which step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 5, 6, 8])
def test_steps_are_uniform_in_every_slot(groups: int) -> None:
    """Against chi-square's 99.9 % quantile per slot; one slot's draws over the iterations are independent."""
    plan, iterations, choices = planner(groups), 4200, 7
    drawn = [first_steps(plan.iteration(number)) for number in range(iterations)]
    assert {k for steps in drawn for k in steps} == set(range(1, 8))
    for slot in range(groups):
        counts = [sum(steps[slot] == k for steps in drawn) for k in range(1, 8)]
        statistic = sum((count - iterations / choices) ** 2 / (iterations / choices) for count in counts)
        assert statistic < stats.chi2.ppf(0.999, choices - 1), f"slot {slot}: {counts}"


@pytest.mark.parametrize("rounds", [1, 3])
def test_strata_take_each_step_equally_often(rounds: int) -> None:
    for number in range(50):
        first = stratified_pairs(5, 2 * 5 * rounds, seed=1, number=number)[::2]
        assert sorted(first) == [k for k in range(5) for _ in range(rounds)]


@pytest.mark.parametrize("groups", [2, 7, 12])
def test_pairs_are_mirrored_and_side_by_side(groups: int) -> None:
    for number in range(30):
        steps = first_steps(planner(groups).iteration(number))
        for one, other in zip(steps[::2], steps[1::2], strict=False):
            assert one + other == 1 + 7


def test_a_group_has_one_step_and_trains_it() -> None:
    assert all(len(g.stochastic) == 1 and g.trained == g.stochastic for g in planner().iteration(4))


def test_all_steps_and_a_share_of_them_trained_per_prompt() -> None:
    plan = planner(stochastic="all", trained_share=0.6)
    trained = []
    for number in range(60):
        for group in plan.iteration(number):
            assert group.stochastic == tuple(range(1, 8))
            assert len(group.trained) == 4 and set(group.trained) < set(group.stochastic)
            assert list(group.trained) == sorted(group.trained)
            trained.append(group.trained)
    assert len(set(trained[:6])) > 1, "drawn per prompt, not per iteration"
    counts = [sum(k in steps for steps in trained) for k in range(1, 8)]
    assert max(counts) < 1.3 * min(counts), counts
    assert all(len(g.trained) == 1 for g in planner(stochastic="all", trained_share=0.01).iteration(0))


def test_the_window_moves_on_and_stays_inside() -> None:
    plan = planner(stochastic="window", window=3, window_iterations=2)
    first = [plan.iteration(number)[0].stochastic for number in range(14)]
    assert first == [tuple(range(k, k + 3)) for k in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5)]
    assert len({group.stochastic for group in plan.iteration(3)}) == 1
    assert planner(stochastic="window", window=40).iteration(0)[0].stochastic == tuple(range(1, 8))


# -- whose prompt, whose rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", ["one", "all", "window"])
@pytest.mark.parametrize("groups", [8, 9])
def test_ranks_share_one_plan(groups: int, stochastic: str) -> None:
    """Whole pairs, each group once, whatever the world size; nobody draws anything of his own."""
    plan = planner(groups, stochastic=stochastic, trained_share=0.5)
    for number, world in itertools.product(range(5), range(1, 5)):
        shares = [plan.share(number, rank, world) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(groups))
        assert all(share for share in shares)
        for pair in range(groups // 2):
            assert any({2 * pair, 2 * pair + 1} <= set(share) for share in shares)
        for share in shares:
            steps = [plan.iteration(number)[slot].stochastic for slot in share]
            assert steps == sorted(steps)


@pytest.mark.parametrize("distinct_noise", [1, 2, 8])
def test_every_rank_pays_the_same_whatever_the_steps_are(distinct_noise: int) -> None:
    plan = planner(8, distinct_noise=distinct_noise)
    costs = set()
    for number, world in itertools.product(range(20), (1, 2, 4)):
        groups = plan.iteration(number)
        for rank in range(world):
            share = plan.share(number, rank, world)
            costs.add(sum(evaluations(groups[slot], plan.config, T) for slot in share) / len(share))
    assert costs == {(distinct_noise * 10 + 8 * (2 * T - 10)) / 2}  # steps of a pair sum to 8: 10 with both included


def test_the_plan_is_a_function_of_seed_and_iteration() -> None:
    again = planner(stochastic="all", trained_share=0.5)
    for number in (7, 0, 7, 100):
        assert planner(stochastic="all", trained_share=0.5).iteration(number) == again.iteration(number)
    assert planner().iteration(0) != planner(seed=4).iteration(0)
    assert planner().iteration(0) != planner().iteration(1)


@pytest.mark.parametrize(("prompts", "groups"), [(24, 6), (25, 6), (6, 6), (7, 4)])
def test_prompts_come_once_a_pass(prompts: int, groups: int) -> None:
    plan, per_pass = planner(groups, prompts=prompts), prompts // groups
    seen = set()
    for epoch in range(40):
        numbers = range(epoch * per_pass, (epoch + 1) * per_pass)
        drawn = [group.prompt for number in numbers for group in plan.iteration(number)]
        assert len(drawn) == len(set(drawn)) == per_pass * groups
        assert prompts % groups or set(drawn) == set(range(prompts))
        seen |= set(drawn)
    assert seen == set(range(prompts)), "what one pass leaves over, another takes"


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "group_size", "steps"), [*itertools.product(range(10), (2, 8), (10, 20))])
def test_evaluations(k: int, group_size: int, steps: int) -> None:
    group = Group(0, (k,), (k,))
    shared = evaluations(group, PlanConfig(group_size=group_size), steps)
    assert shared == (k + 1) + group_size * (steps - 1 - k)
    independent = evaluations(group, PlanConfig(group_size=group_size, distinct_noise=group_size), steps)
    assert independent == group_size * steps
    two = evaluations(group, PlanConfig(group_size=group_size, distinct_noise=2), steps)
    assert two == 2 * (k + 1) + group_size * (steps - 1 - k)
    later = evaluations(Group(0, (k, k + 1), (k,)), PlanConfig(group_size=group_size), steps)
    assert later == shared, "after the first fork every member is on its own anyway"


def test_published_savings() -> None:
    """T 20, K 10, G 8: 24.1 % of the evaluations are shared (R 3.5), on every pair alike."""
    plan = Planner(PlanConfig(), 0, 48, 48, 20)
    spent = sum(evaluations(group, plan.config, 20) for group in plan.iteration(0))
    assert 1 - spent / (48 * 8 * 20) == pytest.approx(0.241, abs=5e-4)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"group_size": 1}, "group_size is 1", "at least 2"),
        ({"distinct_noise": 3}, "distinct_noise is 3 and group_size 8", "nearest that does is 2"),
        ({"distinct_noise": 7}, "distinct_noise is 7", "nearest that does is 8"),
        ({"distinct_noise": 16}, "distinct_noise is 16", "nearest that does is 8"),
        ({"distinct_noise": 0}, "distinct_noise is 0", "above 0"),
        ({"window": 0}, "window is 0", "above 0"),
        ({"window_iterations": -1}, "window_iterations is -1", "above 0"),
        ({"steps": (4, 4)}, r"steps is \[4, 4\]", "rising"),
        ({"steps": (-1, 4)}, r"steps is \[-1, 4\]", "rising"),
        ({"trained_share": 0.0}, "trained_share is 0.0", "share"),
        ({"trained_share": 1.1}, "trained_share is 1.1", "share"),
    ],
)
def test_impossible_layouts_are_refused(settings: dict[str, object], what: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        PlanConfig(**settings)
    assert hint in error.value.hint


def test_impossible_iterations_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 prompts for 6 groups") as few:
        planner(6, prompts=5)
    assert "train.batch_size to 5 or less" in few.value.hint
    with pytest.raises(ConfigError, match=r"steps is \[0, 11\], the sampler takes 10") as outside:
        planner(steps=(0, 11))
    assert "end at 10" in outside.value.hint
    with pytest.raises(ConfigError, match="5 groups an iteration make 3 pairs for 4 processes") as ranks:
        planner(5).share(0, 0, 4)
    assert "train.batch_size to 8 or more" in ranks.value.hint
