"""The learning rate follows the signal: full on gradients that agree, none on noise, nothing lost over a resume."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.train.pace import Pace, PaceConfig
from reelforge.engine.train.state import OptimizerConfig, TrainState

SHAPES = ((3, 5), (7,), (1, 1))


def draws(count: int, common: float = 0.0, seed: int = 0) -> list[list[Tensor]]:
    """Gradients that share ``common`` of one direction."""
    generator = torch.Generator().manual_seed(seed)
    shared = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [[common * part + torch.randn(part.shape, generator=generator) for part in shared] for _ in range(count)]


def pace(full_cosine: float = 0.0, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: float) -> Pace:
    elements = {"elements": options.pop("elements")} if "elements" in options else {}
    return Pace(PaceConfig(full_cosine, **options), [torch.empty(shape) for shape in shapes], **elements)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def test_cosine_of_successive_gradients() -> None:
    told, steps = pace(), draws(4)
    for step in steps[:3]:
        assert told(step) == 1.0, "off by default"
    whole = [flat(step) for step in steps]
    expected = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(whole, whole[1:], strict=False)]
    assert told.read() == pytest.approx(sum(expected[:2]) / 2, abs=1e-6)
    assert told.read() is None, "nothing since"
    told(steps[3])
    assert told.read() == pytest.approx(expected[2], abs=1e-6), "the last one is remembered over a reading"
    told([-3 * gradient for gradient in steps[3]])
    assert told.read() == pytest.approx(-1)


def test_cosine_leaves_out_gradients_of_zero_and_keeps_a_copy() -> None:
    told, gradient = pace(shapes=[(4,)]), torch.ones(4)
    told([gradient])
    gradient.zero_()
    told([gradient])
    assert told.read() is None
    told([gradient + 1])
    told([gradient + 2])
    assert told.read() == pytest.approx(1)


def test_cosine_of_a_part_of_many_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    common, told = torch.randn(300, 400, generator=generator), pace(shapes=[(300, 400)], elements=10_000)
    for _ in range(2):
        told([common + torch.randn(300, 400, generator=generator)])
    assert told.carried["pace_last"].numel() == 10_000
    assert told.read() == pytest.approx(0.5, abs=0.03)


def test_the_factor_is_what_is_certain_of_the_mean_cosine_over_the_full_one() -> None:
    """Against numpy's weighted mean, and a variance written out over the pairs seen so far."""
    memory, doubt, full = 0.75, 0.4, 0.9
    told, steps = pace(full, memory=memory, doubt=doubt), draws(9, common=1.0)
    found = [told(step) for step in steps]
    whole = [flat(step).numpy() for step in steps]
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(whole, whole[1:], strict=False)]
    expected = [0.0, 0.0, 0.0]
    for count in range(3, len(steps)):
        seen, weights = np.array(cosines[:count]), memory ** np.arange(count)[::-1]
        mean = np.average(seen, weights=weights)
        share = (weights / weights.sum()) ** 2
        spread = np.average((seen - mean) ** 2, weights=weights) / (1 - share.sum())  # unbiased, reliability weights
        expected.append(np.clip((mean - doubt * np.sqrt(spread * share.sum())) / full, 0, 1))
    assert found == pytest.approx(expected, abs=1e-6)
    assert any(0 < factor < 1 for factor in found)


def test_doubt_alone_stands_between_noise_and_a_step() -> None:
    """Of 60 walks on noise hardly one moves under three standard errors; without doubt, all do."""

    def moves(doubt: float, seed: int) -> bool:
        told = pace(0.1, [(2000,)], doubt=doubt)
        generator = torch.Generator().manual_seed(seed)
        factors = [told([torch.randn(2000, generator=generator)]) for _ in range(40)]
        return max(factors) > 0

    moved = {doubt: sum(moves(doubt, seed) for seed in range(60)) for doubt in (0.0, 3.0)}
    assert moved[0.0] >= 55
    assert moved[3.0] <= 9, "one run in eight, says the rule on 2,000 rows of normal numbers"


def test_noise_goes_nowhere_and_signal_goes_on() -> None:
    """Adam moves 8,000 weights by the same length a step either way; paced, by noise hardly at all."""
    shape = [(8000,)]
    moved = {}
    for name, common, full in (("noise", 0.0, 0.1), ("unpaced noise", 0.0, 0.0), ("signal", 0.5, 0.1)):
        generator = torch.Generator().manual_seed(1)
        shared, weight = torch.randn(8000, generator=generator), nn.Parameter(torch.zeros(8000))
        config = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.0, grad_clip=1e9)
        state = TrainState({"w": weight}, config, 40, pace=pace(full, shape))
        for _ in range(40):
            gradient = common * shared + torch.randn(8000, generator=generator)
            state.optimizer_step([(weight * gradient).sum()])
        moved[name] = weight.detach().norm().item()
    assert moved["noise"] < 0.1 * moved["unpaced noise"]
    assert moved["signal"] > 2 * moved["unpaced noise"]


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_no_gradient_is_no_news(value: float) -> None:
    told, plain, steps = pace(0.9, doubt=0.5), pace(0.9, doubt=0.5), draws(6, common=1.0)
    for step in steps[:5]:
        before = (told(step), plain(step))[0]
    assert before > 0
    kept = {name: tensor.clone() for name, tensor in told.carried.items()}
    assert told([torch.full_like(part, value) for part in steps[5]]) == before
    assert all(torch.equal(kept[name], tensor) for name, tensor in told.carried.items())
    assert told(steps[5]) == plain(steps[5])


def test_what_is_carried_continues_it() -> None:
    steps = draws(8, common=1.0)
    whole, first, second = (pace(0.9, doubt=0.5) for _ in range(3))
    expected = [whole(step) for step in steps]
    assert len(set(expected[4:])) == 4
    for step in steps[:4]:
        first(step)
    for name, value in first.carried.items():
        second.carried[name].copy_(value)
    assert [second(step) for step in steps[4:]] == expected[4:]


def test_the_rate_that_is_logged_is_the_one_that_was_taken() -> None:
    weight = nn.Parameter(torch.zeros(4))
    state = TrainState({"w": weight}, OptimizerConfig(lr=1e-2, warmup_steps=0), 4, pace=lambda gradients: 0.25)
    state.optimizer_step([weight.sum()])
    assert state.rates() == {"lr": pytest.approx(2.5e-3)}
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"full_cosine": -0.1},
        {"full_cosine": 1.0},
        {"memory": 1.0},
        {"memory": 0.4},
        {"doubt": -1.0},
        {"doubt": torch.nan},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"pace.{next(iter(wrong))} is"):
        PaceConfig(**wrong)
