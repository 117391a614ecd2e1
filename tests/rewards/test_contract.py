"""A missing score is never a number."""

import math

import pytest
import torch

from reelforge.engine.rewards.contract import Scores


def test_what_is_not_finite_is_missing() -> None:
    scores = Scores.of(torch.tensor([1.0, math.nan, math.inf, 2.0], dtype=torch.float64))
    assert scores.values.dtype == torch.float32
    assert scores.valid.tolist() == [True, False, False, True]
    assert scores.mean() == 1.5


def test_mask_poisons_the_value() -> None:
    scores = Scores.of(torch.tensor([1.0, -1.0]), valid=torch.tensor([True, False]))
    assert scores.valid.tolist() == [True, False] and math.isnan(scores.values.sum())


def test_whole_batch_missing() -> None:
    scores = Scores.missing(3)
    assert not scores.valid.any() and math.isnan(scores.mean())


@pytest.mark.parametrize("values", [torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), torch.tensor([math.inf])])
def test_other_shapes_and_types_are_refused(values) -> None:
    with pytest.raises(AssertionError):
        Scores(values)
