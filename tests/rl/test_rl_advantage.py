"""Advantages by hand for every rule and scale, samples and groups that do not count, and step weights the long way."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.rl.advantage import AxisWeight, Fusion, FusionConfig, Scale, shuffle, step_weights

NAN = math.nan
SCALES: tuple[Scale, ...] = ("running", "batch", "max_group", "group", "none")
# Two rewards of two groups of four. Centred: a -3 -1 1 3 and -1 1 -1 1; b 2 -2 0 0 and 0 0 0 0.
A = [[1.0, 3.0, 5.0, 7.0], [0.0, 2.0, 0.0, 2.0]]
B = [[4.0, 0.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0]]


def exact(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(*rewards: object) -> Tensor:
    return exact(rewards)


CENTRED = exact([[[-3, -1, 1, 3], [-1, 1, -1, 1]], [[2, -2, 0, 0], [0, 0, 0, 0]]])
# Of each reward and group, the flat one at its floor. (9+1+1+9+1+1+1+1)/8 = 3 over a's batch, (4+4)/8 = 1 over b's.
DIVISORS = {
    "running": exact([[3**0.5] * 2, [1, 1]]),
    "batch": exact([[3**0.5] * 2, [1, 1]]),
    "max_group": exact([[5**0.5] * 2, [2**0.5] * 2]),
    "group": exact([[5**0.5, 1], [2**0.5, 1e-4]]),
    "none": exact([[1, 1], [1, 1]]),
}


def fuse(rewards: Tensor, wanted: Tensor | None = None, axes: str = "ab", **config: object):
    return Fusion(FusionConfig(**{"clip": 100.0, **config}), list(axes)[: len(rewards)])(rewards, wanted)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


# -- every rule and scale by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_each_reward_is_scaled_then_summed(scale: Scale, weights: tuple[float, float]) -> None:
    chosen = tuple(AxisWeight(axis, weight) for axis, weight in zip("ab", weights, strict=True))
    found = fuse(table(A, B), scale=scale, weights=chosen, normalise_batch=False)
    scaled = CENTRED / DIVISORS[scale][:, :, None]
    close(found.per_reward, scaled)
    close(found.values, (weights[0] * scaled[0] + weights[1] * scaled[1])[None])
    assert found.counted.all()
    together = fuse(table(A, B), scale=scale, weights=chosen)
    close(together.values, found.values / found.values.square().mean().sqrt())


@pytest.mark.parametrize("scale", ["batch", "max_group", "group", "none"])
def test_rewards_are_summed_then_scaled(scale: Scale) -> None:
    """1 a + 2 b: 9 3 9 11 centred 1 -5 1 3, variance 9; 18 20 18 20 centred -1 1 -1 1, variance 1; both 5."""
    found = fuse(table(A, B), rule="sum", scale=scale, normalise_batch=False, weights=(AxisWeight("b", 2.0),))
    centred = exact([[1.0, -5, 1, 3], [-1, 1, -1, 1]])
    divisor = {"batch": [[5**0.5]] * 2, "max_group": [[3]] * 2, "group": [[3], [1]], "none": [[1]] * 2}[scale]
    close(found.values, (centred / exact(divisor))[None])


def test_rewards_stay_separate() -> None:
    found = fuse(table(A, B), rule="separate", scale="group", weights=(AxisWeight("a", 0.25),))
    scaled = CENTRED / DIVISORS["group"][:, :, None]
    close(found.values, torch.stack((0.25 * scaled[0], scaled[1])))


def test_the_fused_advantage_is_normalised_over_the_batch() -> None:
    """GDPO: whatever is summed before, the mean square of what counts is 1."""
    for scale in SCALES:
        values = fuse(table(A, B), scale=scale).values
        assert values.square().mean().item() == pytest.approx(1.0, rel=1e-14)
    assert fuse(1e-9 * table(A, B), scale="none", floor=1e-4).values.abs().max() < 1e-4, "but not below the floor"


def test_no_divisor_below_the_floor() -> None:
    """A spread of 1e-6 that the scorer does not know is not blown up to 1."""
    tiny = table([[0.0, 1e-6, 0.0, 1e-6], [0.0, 0.0, 1e-6, 1e-6]])
    for scale in ("running", "batch", "max_group", "group"):
        assert fuse(tiny, scale=scale, floor=0.01, normalise_batch=False).values.abs().max() <= 1e-4
    high = fuse(table(A, B), scale="group", floor=3.0, normalise_batch=False)
    close(high.values[0, 0], CENTRED[:, 0].sum(0) / 3)


def test_clip() -> None:
    values = fuse(table(A, B), scale="none", normalise_batch=False, clip=2.5).values
    close(values, exact([[[-1.0, -2.5, 1, 2.5], [-1, 1, -1, 1]]]))


def test_extremes() -> None:
    """The two best and the two worst of six, of three that are there all three; statistics over everyone."""
    rewards = table([[5.0, 1, 4, 2, 3, 6], [1.0, NAN, 3, NAN, 2, NAN]])
    found = fuse(rewards, scale="none", normalise_batch=False, extremes=2)
    assert found.counted.tolist() == [[True, True, False, True, False, True], [True, False, True, False, True, False]]
    close(found.values, exact([[[1.5, -2.5, 0, -1.5, 0, 2.5], [-1, 0, 1, 0, 0, 0]]]))
    for enough in (0, 3, 9):
        assert torch.equal(fuse(rewards, extremes=enough).counted, ~rewards[0].isnan())
    scaled = fuse(rewards, scale="batch", normalise_batch=False, extremes=2).values[0, 0, 5].item()
    assert scaled == pytest.approx(2.5 / math.sqrt((17.5 + 2) / 9))


def test_running_scale() -> None:
    """First the batch's own, then an average of 0.9 and 0.1, in rewards of any size; an empty iteration leaves it."""
    fusion = Fusion(FusionConfig(normalise_batch=False, clip=100.0), ["a", "b"])
    close(fusion(table(A, B)).per_reward, CENTRED / DIVISORS["batch"][:, :, None])
    close(fusion.running, exact([3**0.5, 1.0]))
    second = fusion(table([[2 * value for value in row] for row in A], B))
    now = exact([0.9 * 3**0.5 + 0.1 * 2 * 3**0.5, 1.0])
    close(fusion.running, now)
    close(second.per_reward, torch.stack((2 * CENTRED[0], CENTRED[1])) / now[:, None, None])
    for nothing in (table(A, B).fill_(NAN), table(B[1:] * 2, B[1:] * 2)):
        assert not fusion(nothing).counted.any()
        close(fusion.running, now)
    fusion(table(A, B[1:] * 2))
    assert fusion.running[1] == now[1], "a reward that says nothing in an iteration keeps its scale"
    with pytest.raises(ConfigError, match="keeps a scale per reward"):
        fuse(table(A, B), rule="sum", scale="running")


# -- what is missing --------------------------------------------------------------------------------------------------


def test_a_sample_without_one_of_its_rewards_does_not_count() -> None:
    rewards = table(A, B)
    rewards[1, 0, 3] = NAN
    found = fuse(rewards, scale="none", normalise_batch=False)
    assert found.counted.tolist() == [[True, True, True, False], [True] * 4]
    close(found.values[0, 0], exact([0.0, -2, 2, 0]))  # a -2 0 2 and b 2 -2 0 over three members
    assert found.per_reward[:, 0, 3].isnan().all() and not found.values.isnan().any()


def test_prompts_may_want_some_rewards_only() -> None:
    """The second prompt does not want b: its b counts for nothing, missing or not, nor in b's scale."""
    wanted = torch.tensor([[True, True], [True, False]])
    expected = None
    for b in ([1.0, 5.0, 2.0, 0.0], [NAN] * 4, [0.0, 9.0, NAN, 100.0]):
        for scale in SCALES:
            found = fuse(table(A, [B[0], b]), wanted, scale=scale, normalise_batch=False)
            assert found.counted.all()
            divisor = {"running": 2**0.5, "batch": 2**0.5, "max_group": 2**0.5, "group": 2**0.5, "none": 1.0}[scale]
            a = CENTRED[0] / DIVISORS[scale][0][:, None]
            close(found.values[0], torch.stack((a[0] + CENTRED[1, 0] / divisor, a[1])))
            assert found.per_reward[1, 1].isnan().all()
        summed = fuse(table(A, [B[0], b]), wanted, rule="sum", scale="none", normalise_batch=False).values
        assert expected is None or torch.equal(summed, expected)
        expected = summed
    close(expected[0], torch.stack((CENTRED[:, 0].sum(0), CENTRED[0, 1])))


def test_a_reward_of_weight_zero_is_watched_only() -> None:
    """It may be missing, and changes nothing; its own advantage is still told."""
    rewards = table(A, [[NAN, 1.0, 2.0, 3.0], [NAN] * 4])
    weightless = fuse(rewards, weights=(AxisWeight("b", 0.0),))
    alone = fuse(table(A))
    assert torch.equal(weightless.values, alone.values) and torch.equal(weightless.counted, alone.counted)
    assert weightless.per_reward[1, 0].isnan().tolist() == [True, False, False, False]
    close(weightless.per_reward[1, 0, 1:], exact([-1.0, 0, 1]) / (2 / 3) ** 0.5)


def test_weights_name_rewards_that_exist() -> None:
    with pytest.raises(ConfigError, match="names 'c'"):
        Fusion(FusionConfig(weights=(AxisWeight("c", 1.0),)), ["a", "b"])


RULES = [
    (rule, scale, batch)
    for rule, scale, batch in itertools.product(("each", "sum", "separate"), SCALES, (True, False))
    if not (rule == "sum" and scale == "running") and not (rule == "separate" and batch)
]


@pytest.mark.parametrize(("rule", "scale", "batch"), RULES)
def test_empty_and_flat_groups_change_nothing_but_the_count(rule: str, scale: Scale, batch: bool) -> None:
    """Bit for bit: the others' advantages and weights are those of the batch without them."""
    lambda_ = sde.sde_lambda(FlowSchedule().grid(10), range(10), NoiseRate("trunc"))
    for seed in range(40):
        rewards, generator = draw(seed)
        groups, members = rewards.shape[1:]
        silent = sorted(torch.randperm(groups, generator=generator)[: max(1, groups // 2)].tolist())
        for place, group in enumerate(silent):
            if place % 2:
                rewards[:, group] = torch.randn(3, 1, generator=generator, dtype=torch.float64)  # all members alike
            else:
                rewards[0, group, 1:] = NAN  # one valid member
        speaking = [group for group in range(groups) if group not in silent]
        config = {"rule": rule, "scale": scale, "normalise_batch": batch, "clip": 3.0}
        whole = fuse(rewards, axes="abc", **config)
        without = fuse(rewards[:, speaking], axes="abc", **config)
        assert not whole.counted[silent].any() and (whole.values[:, silent] == 0).all()
        assert torch.equal(whole.values[:, speaking], without.values)
        assert torch.equal(whole.counted[speaking], without.counted)
        steps = [(int(k),) for k in torch.randint(0, 10, (groups,), generator=generator)]
        kept = [steps[group] for group in speaking]
        assert torch.equal(
            step_weights(lambda_, steps, whole.counted, True), step_weights(lambda_, kept, without.counted, True)
        )


def draw(seed: int) -> tuple[Tensor, torch.Generator]:
    """Three rewards of 2 to 17 groups of 2 to 12 members on very different scales, some missing."""
    generator = torch.Generator().manual_seed(seed)
    groups, members = (int(torch.randint(2, top, (), generator=generator)) for top in (18, 13))
    rewards = torch.randn(3, groups, members, generator=generator, dtype=torch.float64)
    rewards = rewards * exact([10.0, 0.1, 1.0])[:, None, None] + exact([7.0, 0.3, -2.0])[:, None, None]
    rewards[torch.rand(rewards.shape, generator=generator) < 0.05] = NAN
    return rewards, generator


@pytest.mark.parametrize(("rule", "scale", "batch"), RULES)
def test_properties(rule: str, scale: Scale, batch: bool) -> None:
    """Finite, in the clip, nothing where it does not count; shifting a prompt's rewards changes nothing; a group's
    members may come in any order."""
    for seed in range(100, 130):
        rewards, generator = draw(seed)
        config = {"rule": rule, "scale": scale, "normalise_batch": batch, "clip": 5.0}
        found = fuse(rewards, axes="abc", **config)
        assert found.values.isfinite().all() and found.values.abs().max() <= 5
        assert (found.values[:, ~found.counted] == 0).all()
        assert not (found.counted & rewards.isnan().any(0)).any()
        assert (found.counted.sum(1) != 1).all()
        shifted = fuse(rewards + torch.randn(3, rewards.shape[1], 1, generator=generator), axes="abc", **config)
        torch.testing.assert_close(shifted.values, found.values, rtol=1e-9, atol=1e-9)
        order = torch.randperm(rewards.shape[2], generator=generator)
        turned = fuse(rewards[:, :, order], axes="abc", **config)
        torch.testing.assert_close(turned.values, found.values[:, :, order], rtol=1e-9, atol=1e-9)


def test_nothing_counts() -> None:
    for rewards in (table(A, B).fill_(NAN), table(B[1:] * 2, B[1:] * 2), table(A, B)[:, :, :1].expand(2, 2, 4)):
        for rule, scale, batch in RULES:
            found = fuse(rewards, rule=rule, scale=scale, normalise_batch=batch)
            assert not found.counted.any() and (found.values == 0).all()


# -- the control ------------------------------------------------------------------------------------------------------


def test_shuffle_permutes_what_counts() -> None:
    rewards = table(A, B)
    rewards[0, 0, 1] = NAN
    for rule in ("each", "separate"):
        told = fuse(rewards, rule=rule)
        mixed = shuffle(told, seed=1, iteration=2)
        assert torch.equal(mixed.counted, told.counted) and (mixed.values[:, ~told.counted] == 0).all()
        pairs = sorted(map(tuple, told.values[:, told.counted].T.tolist()))
        assert sorted(map(tuple, mixed.values[:, told.counted].T.tolist())) == pairs, "a sample's rewards stay together"
        assert not torch.equal(mixed.values, told.values)
        assert torch.equal(shuffle(told, 1, 2).values, mixed.values)
        assert any(not torch.equal(shuffle(told, 1, n).values, mixed.values) for n in range(5))
    nothing = told._replace(counted=torch.zeros_like(told.counted), values=0 * told.values)
    assert torch.equal(shuffle(nothing, 1, 2).values, nothing.values)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("kind", ["trunc", "wan", "flow", "dance"])
def test_weights_the_long_way(kind: str, rectify: bool) -> None:
    """Sample by sample: (1 / lambda_k) / mean over all decisions of 1 / lambda, over their number."""
    lambda_ = sde.sde_lambda(FlowSchedule().grid(10), range(10), NoiseRate(kind))
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        groups, members = (int(torch.randint(1, top, (), generator=generator)) for top in (10, 9))
        counted = torch.rand(groups, members, generator=generator) < 0.7
        trained = [
            tuple(sorted(torch.randperm(10, generator=generator)[: int(torch.randint(1, 5, (), generator=generator))]))
            for _ in range(groups)
        ]
        trained = [tuple(int(k) for k in steps) for steps in trained]
        weights = step_weights(lambda_, trained, counted, rectify)
        forces = [
            (1 / lambda_[k].item() if rectify else 1.0, k)
            for steps, row in zip(trained, counted.tolist(), strict=True)
            for valid in row
            if valid
            for k in steps
        ]
        if not forces:
            assert torch.equal(weights, torch.zeros(10, dtype=torch.float64))
            continue
        mean = sum(force for force, _ in forces) / len(forces)
        for force, k in forces:
            assert weights[k].item() == pytest.approx(force / mean / len(forces), rel=1e-12)
        assert sum(weights[k].item() for _, k in forces) == pytest.approx(1.0, rel=1e-12)
        assert len(forces) * sum(weights[k].item() for _, k in forces) / len(forces) == pytest.approx(1.0)


def test_the_mean_weight_is_one_over_ranks_and_ragged_micro_batches() -> None:
    """What every rank uses for its part, in any split, sums over the step to what one process would use."""
    lambda_ = sde.sde_lambda(FlowSchedule().grid(10), range(10), NoiseRate("wan"))
    trained = [(0,), (9,), (3,), (6,), (1,), (8,), (4,)]
    counted = torch.tensor([[k < g + 1 for k in range(5)] for g in (0, 4, 1, 3, 2, 4, 4)])
    counted[0] = False
    weights = step_weights(lambda_, trained, counted, True)
    total, samples = 0.0, int(counted.sum())
    for rank in ([0, 1, 2, 3], [4, 5, 6]):
        for micro_batch in (rank[:1], rank[1:]):
            per_sample = [samples * weights[trained[group][0]].item() for group in micro_batch for _ in range(1)]
            total += sum(w * int(counted[g].sum()) for g, w in zip(micro_batch, per_sample, strict=True))
    assert total / samples == pytest.approx(1.0, rel=1e-12)
