"""What is logged of an iteration's rewards and gradients, by hand and against what the numbers were drawn from."""

import math

import pytest
import torch
from torch import Tensor

from reelforge.engine.rl.advantage import Advantages, Fusion, FusionConfig
from reelforge.engine.rl.plan import Group
from reelforge.engine.rl.statistics import describe_rewards, noise_share

NAN = math.nan
GROUPS = (Group(0, (2,), (2,)), Group(1, (5,), (5,)), Group(2, (2,), (2,)))


def exact(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def describe(rewards: Tensor, distinct_noise: int = 1, **config: object) -> dict:
    axes = ("vq", "ta")[: len(rewards)]
    advantages = Fusion(FusionConfig(**config), axes)(rewards)
    return describe_rewards(axes, rewards, advantages, GROUPS, distinct_noise)


REWARDS = exact([
    [[1, 2, 3, 4], [5, 5, 5, 5], [7, 7, 9, NAN]],
    [[0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 1, 1]],
])  # fmt: skip


def test_rewards_by_hand() -> None:
    found = describe(REWARDS, scale="none")
    vq = found["reward"]["vq"]
    assert vq["mean"] == pytest.approx(53 / 11)
    assert vq["std"] == pytest.approx(exact([1, 2, 3, 4, 5, 5, 5, 5, 7, 7, 9]).std(correction=0).item())
    assert vq["by_step"] == {"2": pytest.approx(33 / 7), "5": 5.0}
    assert found["reward"]["ta"]["by_step"] == {"2": 0.5, "5": 1.0}
    assert found["missing_share"] == pytest.approx(1 / 24)
    assert found["zero_std_share"] == pytest.approx(1 / 3)
    assert found["counted_share"] == pytest.approx(7 / 12)
    inside = (5 + (2 / 3) ** 2 * 2 + (4 / 3) ** 2) / 11
    assert found["within_group"]["vq"] == pytest.approx(inside / vq["std"] ** 2)


def test_normalised_deviation() -> None:
    """Of every sample that is there; 1 over those that count when the batch's own is the scale."""
    full = REWARDS.nan_to_num(8.0)
    scaled = describe(full[:, ::2].repeat(1, 2, 1)[:, :3], scale="batch")["reward"]["vq"]
    assert scaled["normalised_std"] == pytest.approx(1.0)
    assert "normalised_std" not in describe(full, scale="batch", rule="sum")["reward"]["vq"], "there is none of its own"


def test_flat_and_missing_groups_are_told_apart() -> None:
    """A group is flat when all that is there is alike; one that is not there is missing, not flat."""
    rewards = exact([[[1, 1, NAN, 1], [NAN] * 4, [NAN, NAN, NAN, 2]]])
    found = describe(rewards)
    assert found["zero_std_share"] == pytest.approx(1 / 3)
    assert found["missing_share"] == pytest.approx(8 / 12)
    assert found["counted_share"] == 0
    assert found["correlation"] == [] and found["reward"]["vq"]["mean"] == 1.25


def test_nothing_is_there() -> None:
    found = describe(torch.full((2, 3, 4), NAN, dtype=torch.float64))
    assert found["reward"]["ta"]["mean"] is None and found["within_group"]["vq"] is None
    assert found["missing_share"] == 1 and found["zero_std_share"] == 0


def test_correlation_of_advantages() -> None:
    """Two rewards that pull apart within groups, however alike their groups' means are."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    level = exact([[0.0], [100.0], [200.0]])
    found = describe(torch.stack((base + level, level - base)), scale="batch")["correlation"]
    assert found[0][1] == pytest.approx(-1, abs=1e-9) and found[0][0] == pytest.approx(1)
    other = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    centred = [(x - x.mean(1, keepdim=True)).flatten() for x in (base, other)]
    expected = torch.corrcoef(torch.stack(centred))[0, 1].item()
    assert describe(torch.stack((base, other)))["correlation"][0][1] == pytest.approx(expected)
    assert describe(REWARDS[:1])["correlation"] == []


def test_rho_of_a_known_mixture() -> None:
    """Rewards of variance 1 between noises and 0.25 within one: rho is 0.2, whatever prompts add."""
    generator = torch.Generator().manual_seed(1)
    for noises, each in ((2, 4), (4, 2)):
        prompts, between = 20_000, torch.randn(20_000, noises, 1, generator=generator)
        within = 0.5 * torch.randn(prompts, noises, each, generator=generator)
        values = 30 * torch.randn(prompts, 1, generator=generator) + (between + within).flatten(1)
        assert noise_share(values, noises) == pytest.approx(0.25 / 1.25, abs=0.006)
        only = noise_share(within.flatten(1), noises)
        assert only is not None and only > 0.98, "the noise makes no difference"


def test_rho_by_hand_and_without_an_answer() -> None:
    values = exact([[1, 3, 7, 9], [0, 0, NAN, 5]])
    assert noise_share(values, 2) == pytest.approx(2 / (2 + 18 - 1))  # within 2; means 2 and 8: 18 less 2 / 2
    assert noise_share(values, 1) is None and noise_share(values, 4) is None
    assert noise_share(values[1:], 2) is None and noise_share(torch.ones(3, 4), 2) is None


def test_facts_are_plain_numbers() -> None:
    """They go into a JSON line as they are."""
    found = describe(REWARDS, distinct_noise=2)
    assert isinstance(found["counted_share"], float) and isinstance(found["correlation"][0][1], float)
    advantages = Advantages(torch.zeros(1, 3, 4), torch.zeros(3, 4, dtype=torch.bool), torch.zeros(2, 3, 4))
    empty = describe_rewards(("vq", "ta"), REWARDS, advantages, GROUPS, 1)
    assert empty["counted_share"] == 0 and empty["rho"] == {"vq": None, "ta": None}
