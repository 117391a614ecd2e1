"""The rewriter's loss against a loop over tokens in fp64, finite differences, and an enumerated distribution."""

import math

import pytest
import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.rl.text_loss import TextLossConfig, text_loss

LENGTHS = (7, 1, 4, 0)  # of the answers; the last one is not counted
CONFIG = TextLossConfig(clip_low=0.2, clip_high=0.3, kl=0.7)
NAMES = {"ratio", "kl_reference", "clipped_low", "clipped_high"}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Policies about 0.4 apart, so that every branch is taken; bool tokens."""
    draw = torch.Generator().manual_seed(3)
    logp, old, reference = (torch.randn(4, 7, generator=draw, dtype=torch.float64) * 0.4 - 2 for _ in range(3))
    advantages = torch.tensor([1.3, -0.4, -2.0, 0.9], dtype=torch.float64)
    tokens = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return (*(each.to(dtype) for each in (logp, old, reference, advantages)), tokens)


def by_hand(logp: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
    """Token by token: the pessimistic surrogate in its two cases, k3, and their derivatives."""
    total, gradient = 0.0, torch.zeros_like(logp)
    for row, place in tokens.nonzero().tolist():
        a, ratio = advantages[row].item(), math.exp(logp[row, place] - old[row, place])
        bound = 1.3 if a > 0 else 0.8
        outside = ratio > bound if a > 0 else ratio < bound
        away = reference[row, place].item() - logp[row, place].item()
        total += -a * (bound if outside else ratio) + 0.7 * (math.exp(away) - away - 1)
        gradient[row, place] = (0.0 if outside else -a * ratio) + 0.7 * (1 - math.exp(away))
    return total, gradient


def test_value_and_gradient_of_a_loop_over_tokens() -> None:
    logp, *others = batch()
    value, gradient = by_hand(logp, *others)
    loss, facts = text_loss(logp.requires_grad_(), *others, CONFIG)
    (found,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-13)
    assert facts.keys() == NAMES and facts["clipped_low"] > 0 and facts["clipped_high"] > 0
    old, reference, _, tokens = others
    away = (reference - logp)[tokens]
    assert facts["ratio"].item() == pytest.approx((logp - old)[tokens].exp().sum().item())
    assert facts["kl_reference"].item() == pytest.approx((away.exp() - away - 1).sum().item())


def test_gradient_is_that_of_finite_differences() -> None:
    logp, *others = batch()
    assert torch.autograd.gradcheck(lambda x: text_loss(x, *others, CONFIG)[0], logp.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("where", ["logp", "old", "reference", "advantage"])
def test_masked_tokens_change_nothing(rubbish: float, where: str) -> None:
    """Neither the loss nor a gradient, to the last bit; and they get none."""
    clean, dirty = batch(torch.float32), batch(torch.float32)
    place = ("logp", "old", "reference", "advantage").index(where)
    dirty[place][~clean[4] if place < 3 else 3] = rubbish
    found = []
    for logp, *others in (clean, dirty):
        loss, facts = text_loss(logp.requires_grad_(), *others, CONFIG)
        found.append((loss, *torch.autograd.grad(loss, logp), *(facts[name] for name in sorted(NAMES))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert not found[1][1][~clean[4]].any() and found[1][1][clean[4]].all()


def test_no_token_is_no_loss_and_a_gradient_of_zero() -> None:
    """What a rank has to give whose answers all do not count."""
    logp, *others, tokens = batch()
    loss, facts = text_loss(logp.requires_grad_(), *others, torch.zeros_like(tokens), CONFIG)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss == 0 and not gradient.any() and all(value == 0 for value in facts.values())


def test_k3_is_zero_at_equality_and_above_it_elsewhere() -> None:
    logp = -torch.rand(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 - 0.01
    none, every = torch.zeros(64, dtype=torch.float64), torch.ones(64, 5, dtype=torch.bool)
    config = TextLossConfig(kl=1.0)
    loss, facts = text_loss(logp.requires_grad_(), logp.detach(), logp.detach(), none, every, config)
    assert loss == 0 and facts["kl_reference"] == 0 and not torch.autograd.grad(loss, logp)[0].any()
    for away in (-3.0, -1e-3, 1e-3, 3.0):
        loss, facts = text_loss(logp, logp.detach(), logp.detach() + away, none, every, config)
        assert loss.item() == facts["kl_reference"].item() > 0


def test_k3_estimates_the_divergence_without_bias() -> None:
    """Its mean over a categorical policy's outcomes is KL(policy || reference)."""
    draw = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 9, dtype=torch.float64, generator=draw).mul(1.5).log_softmax(-1)
    mean = 0.0
    for outcome in range(9):
        one, other = policy[outcome].view(1, 1), reference[outcome].view(1, 1)
        loss, _ = text_loss(one, one, other, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), TextLossConfig(kl=1.0))
        mean += policy[outcome].exp().item() * loss.item()
    assert mean == pytest.approx((policy.exp() * (policy - reference)).sum().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient", "clipped"),
    [
        (2.0, 1.0, -2.0, ""), (2.0, 1.2, -2.4, ""), (2.0, 1.5, 0.0, "clipped_high"), (2.0, 0.1, -0.2, ""),
        (-2.0, 1.0, 2.0, ""), (-2.0, 0.9, 1.8, ""), (-2.0, 0.5, 0.0, "clipped_low"), (-2.0, 3.0, 6.0, ""),
        (0.0, 3.0, 0.0, ""),
    ],
)  # fmt: skip
def test_branches_of_the_clip(advantage: float, ratio: float, gradient: float, clipped: str) -> None:
    """A ratio that went the way its advantage wants stops pushing; the wrong way pushes back at any distance."""
    logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    every, config = torch.ones(1, 1, dtype=torch.bool), TextLossConfig(0.2, 0.28, 0.0)
    loss, facts = text_loss(logp, torch.zeros(1, 1), torch.zeros(1, 1), advantages, every, config)
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(gradient)
    assert facts["ratio"].item() == pytest.approx(ratio)
    assert [name for name in ("clipped_low", "clipped_high") if facts[name]] == ([clipped] if clipped else [])


def test_a_long_answer_weighs_by_its_tokens() -> None:
    """On policy every counted token of advantage A gets -A / N, whatever the length of its answer."""
    tokens = torch.arange(6) < torch.tensor([6, 2])[:, None]
    logp = torch.full((2, 6), -1.0, requires_grad=True)
    config = TextLossConfig(kl=0.0)
    loss, _ = text_loss(logp, logp.detach(), logp.detach(), torch.tensor([0.5, 0.5]), tokens, config)
    (gradient,) = torch.autograd.grad(loss / tokens.sum(), logp)
    assert torch.equal(gradient, torch.where(tokens, -0.5 / 8, 0.0))


@pytest.mark.parametrize("wrong", [{"clip_low": 0.0}, {"clip_high": -0.1}, {"kl": -0.01}], ids=str)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        TextLossConfig(**wrong)
