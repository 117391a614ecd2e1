"""The collapsed loss against log-densities, against one forward a member, and against the closed first update."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow import sde
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.rl.loss import KlConfig, LossConfig, LossMeter, Targets, losses
from reelforge.engine.rl.plan import Group, PlanConfig
from reelforge.engine.rl.policy import TrainingPath
from reelforge.engine.rl.rollout import Decision, Sampler
from reelforge.kernels import philox

CPU = torch.device("cpu")
PLAN = PlanConfig(group_size=4, steps=(0, 5))
GROUPS = (Group(2, (0,), (0,)), Group(5, (3,), (3,)), Group(0, (1,), (1,)), Group(7, (3,), (3,)), Group(3, (1,), (1,)))
NO_CLIP = LossConfig(ratio="exact", clip="none")
WIDE = {"rtol": 1e-9, "atol": 1e-12}


class Leaf:
    """A policy whose velocity is a tensor, so that its gradient can be looked at; its reference another."""

    def __init__(self, velocity: Tensor, reference: Tensor | None = None) -> None:
        self.velocity, self.v_reference = velocity, reference

    def train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        return self.velocity

    def reference(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        return self.v_reference

    def path(self, rows: int) -> TrainingPath:
        return TrainingPath(rows, torch.float64, None, 0, True, ())


@dataclasses.dataclass
class Case:
    """A rollout in fp64 and random advantages for it."""

    policy: object
    sampler: Sampler
    decisions: tuple[Decision, ...]
    targets: Targets

    def gradients(self, decisions: Sequence[Decision], config: LossConfig, meter: LossMeter | None = None) -> Tensor:
        """Of the sum over decisions, all weights in one vector."""
        self.policy.model.zero_grad()
        for loss in losses(self.policy, decisions, self.targets, config, meter or LossMeter(CPU)):
            loss.backward()
        return torch.cat([p.grad.flatten() for p in self.policy.model.parameters() if p.grad is not None])


def make(parts, tiny, plan: PlanConfig = PLAN, groups: Sequence[Group] = GROUPS, axes: int = 1, **sampler) -> Case:
    policy = parts.policy(tiny(0, torch.float64))
    sampler = parts.sampler(plan, dtype=torch.float64, **sampler)
    decisions = parts.roll_out(policy, sampler, groups).decisions
    advantages = torch.randn(axes, len(groups), plan.group_size, generator=torch.Generator().manual_seed(3))
    return Case(policy, sampler, decisions, parts.targets(sampler, groups, advantages))


def split(decision: Decision) -> Iterator[Decision]:
    """The same members, each with a state and a forward of its own."""
    for state, (first, end) in enumerate(pairwise(decision.offsets.tolist())):
        one = slice(state, state + 1)
        for member in range(first, end):
            own = slice(member, member + 1)
            yield dataclasses.replace(
                decision, x=decision.x[one], velocity=decision.velocity[one], timestep=decision.timestep[one],
                prompts=decision.prompts[one], keys=decision.keys[own], members=decision.members[own],
                offsets=torch.tensor([0, 1], dtype=torch.int32),
                path=dataclasses.replace(decision.path, rows=1),
            )  # fmt: skip


def noise(decision: Decision) -> Tensor:
    return rng.normal(decision.keys, decision.x.shape[1:]).to(decision.x)


def log_density_ratio(velocity: Tensor, decision: Decision, sampler: Sampler) -> Tensor:
    """log p_theta(x') - log p_old(x') of a single-member decision, from x' itself."""
    at = sde.coefficients(sampler.grid, [decision.step], sampler.rate)
    x_next = sde.step(decision.x, decision.velocity, at, noise(decision))
    now, then = (sde.log_prob(x_next, sde.mean(decision.x, v, at), at.std) for v in (velocity, decision.velocity))
    return (now - then)[0]


def direct(case: Case, decision: Decision, low: float, high: float) -> Tensor:
    """The PPO loss of a single-member decision by the book."""
    velocity = case.policy.train(decision.x, decision.timestep, decision.prompts)
    ratio = log_density_ratio(velocity, decision, case.sampler).exp()
    advantage = case.targets.advantages[0, decision.members[0]]
    held = ratio.clamp(1 - low, 1 + high) * advantage
    return -case.targets.weights[decision.step] * torch.minimum(ratio * advantage, held) * math.sqrt(decision.x.numel())


# -- ratios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunc", "wan", "flow", "dance", "cps"])
def test_ratio_is_the_difference_of_log_densities(parts, tiny, moved, kind: str) -> None:
    rate = NoiseRate(kind, 0.7)
    case = make(parts, tiny, rate=rate)
    moved(case.policy.model, 0.02)
    for decision in case.decisions:
        for single in split(decision):
            expected = log_density_ratio(
                case.policy.train(single.x, single.timestep, single.prompts), single, case.sampler
            )
            assert abs(expected) > 1e-7
            for form in ("exact", "debiased"):
                meter = LossMeter(CPU)
                list(losses(case.policy, [single], case.targets, dataclasses.replace(NO_CLIP, ratio=form), meter))
                found = meter.means()
                bias = found["kl"] if form == "debiased" else 0.0
                assert math.log(found["ratio"]) - bias == pytest.approx(expected.item(), abs=1e-9)


FIXTURES = {  # R 2.6: x, v, e and z of four elements, 20 steps, shift 3
    (1, "wan"): -0.002246614, (1, "dance"): -0.007242604, (1, "flow"): -0.000509901,
    (4, "wan"): -0.002745148, (4, "dance"): -0.008132212, (4, "flow"): -0.001234613,
    (9, "wan"): -0.004205963, (9, "dance"): -0.010241967, (9, "flow"): -0.002782791,
}  # fmt: skip


@pytest.mark.parametrize(("k", "kind"), FIXTURES)
def test_worked_ratios(parts, monkeypatch: pytest.MonkeyPatch, k: int, kind: str) -> None:
    x, v, z, e = torch.tensor(
        [[0.5, -1.0, 0.25, 2.0], [1.0, 0.5, -0.75, -0.25], [0.3, -0.6, 1.2, 0.0], [0.05, -0.02, 0.03, 0.01]],
        dtype=torch.float64,
    ).view(4, 1, 4, 1, 1, 1)
    monkeypatch.setattr(philox, "reference", lambda keys, count: z.view(1, 4))
    grid = dataclasses.replace(parts, num_steps=20).sampler(PLAN).grid
    lambda_ = sde.sde_lambda(grid, range(20), NoiseRate(kind, {"flow": 0.7, "dance": 0.3}.get(kind, 1.0)))
    one = torch.ones(1, dtype=torch.float64)
    targets = Targets(one[None], torch.ones(1, dtype=torch.bool), torch.ones(20).double(), lambda_, one)
    policy, meter = Leaf(v + e), LossMeter(CPU)
    decision = Decision(
        k, x, v, torch.zeros(1), (0,), torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0]),
        policy.path(1),
    )  # fmt: skip
    (loss,) = losses(policy, [decision], targets, NO_CLIP, meter)
    assert math.log(meter.means()["ratio"]) == pytest.approx(FIXTURES[k, kind], abs=1e-9)
    assert loss.item() == pytest.approx(-math.exp(FIXTURES[k, kind]) * math.sqrt(4), abs=2e-9)
    if (k, kind) == (4, "wan"):
        assert meter.means()["kl"] == pytest.approx(1.4652e-5, abs=5e-10)


# -- one forward for a group ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "low", "high"), [("exact", 2.5e-3, 3.5e-3), ("debiased", 1.5e-3, 5.8e-3)])
@pytest.mark.parametrize("plan", [PLAN, dataclasses.replace(PLAN, distinct_noise=2)], ids=["M=1", "M=2"])
def test_collapsed_gradient_is_the_sum_of_separate_ones(
    parts, tiny, moved, plan: PlanConfig, form: str, low: float, high: float
) -> None:
    """With ratios on both sides of both clips under advantages of both signs."""
    case = make(parts, tiny, plan)
    moved(case.policy.model, 0.02)
    config = LossConfig(ratio=form, clip_low=low, clip_high=high)
    meter = LossMeter(CPU)
    collapsed = case.gradients(case.decisions, config, meter)
    singles = [single for decision in case.decisions for single in split(decision)]
    assert len(singles) == 20 and len(case.decisions) < 20
    separate = case.gradients(singles, config)
    assert (collapsed - separate).norm() < 1e-9 * separate.norm()
    found = meter.means()
    assert found["clipped_low"] > 0 and found["clipped_high"] > 0
    assert found["clipped_low"] + found["clipped_high"] < 0.9


def test_collapsed_gradient_is_that_of_log_densities(parts, tiny, moved) -> None:
    """Nothing of ours but the forward and the step's formula."""
    case = make(parts, tiny)
    moved(case.policy.model, 0.02)
    config = LossConfig(ratio="exact", clip_low=2.5e-3, clip_high=3.5e-3)
    collapsed = case.gradients(case.decisions, config)
    case.policy.model.zero_grad()
    for decision in case.decisions:
        for single in split(decision):
            direct(case, single, 2.5e-3, 3.5e-3).backward()
    expected = torch.cat([p.grad.flatten() for p in case.policy.model.parameters() if p.grad is not None])
    assert (collapsed - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("plan", [PLAN, dataclasses.replace(PLAN, distinct_noise=4)], ids=["shared", "independent"])
def test_micro_batches_may_be_ragged(parts, tiny, moved, plan: PlanConfig) -> None:
    gradients = []
    for rows in (1, 2, 3, 64):
        case = make(parts, tiny, plan, train_rows=rows)
        moved(case.policy.model, 0.02)
        config = LossConfig(clip_low=2.5e-3, clip_high=3.5e-3, kl=KlConfig(weight=0.1))
        case.policy.frozen = tiny(0, torch.float64)
        gradients.append(case.gradients(case.decisions, config))
        sizes = {len(decision.x) for decision in case.decisions}
        assert max(sizes) <= rows and (rows != 3 or plan.distinct_noise == 1 or len(sizes) > 1)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-11 * other.norm()


def test_first_update_in_closed_form(parts, tiny) -> None:
    """At e = 0, dL/dv = sqrt(n) (w_k lambda_k / n) sum over the members of A z (R 3.9)."""
    for plan in (PLAN, dataclasses.replace(PLAN, distinct_noise=2)):
        case = make(parts, tiny, plan)
        for decision in case.decisions:
            leaf = decision.velocity.clone().requires_grad_()
            path = dataclasses.replace(decision, path=Leaf(leaf).path(len(leaf)))
            (loss,) = losses(Leaf(leaf), [path], case.targets, LossConfig(), LossMeter(CPU))
            loss.backward()
            pushes = case.targets.advantages[0, decision.members].view(-1, 1, 1, 1, 1) * noise(decision)
            sums = torch.stack([pushes[first:end].sum(0) for first, end in pairwise(decision.offsets.tolist())])
            n = decision.x[0].numel()
            force = case.targets.weights[decision.step] * case.targets.lambda_[decision.step] / n
            torch.testing.assert_close(leaf.grad, math.sqrt(n) * force * sums, rtol=1e-10, atol=1e-15)


def test_rectified_steps_push_alike(parts, tiny) -> None:
    """w_k lambda_k is the same for every step; without rectification it is lambda_k's."""
    case = make(parts, tiny)
    forces = (case.targets.weights * case.targets.lambda_)[[0, 1, 3]]
    torch.testing.assert_close(forces, forces[:1].expand(3))
    plain = parts.targets(case.sampler, GROUPS, torch.ones(1, 5, 4), rectify=False)
    assert torch.equal(plain.weights, torch.full((5,), 1 / 20, dtype=torch.float64))


def test_what_does_not_count_leaves_no_trace(parts, tiny, moved) -> None:
    """A group of weight 0 and a member of weight 0: the gradient is that of the others alone; their advantages may be
    anything."""
    case = make(parts, tiny, train_rows=1)
    moved(case.policy.model, 0.02)
    counted = torch.ones(5, 4, dtype=torch.bool)
    counted[1] = counted[2, 3] = False
    advantages = torch.randn(1, 5, 4)
    advantages[0, ~counted] = torch.tensor([torch.nan, torch.inf, 1e30, -7.0, 0.0])
    case.targets = parts.targets(case.sampler, GROUPS, advantages, counted)
    singles = [single for decision in case.decisions for single in split(decision)]
    kept = [single for single in singles if counted.flatten()[single.members[0]]]
    for config in (LossConfig(), LossConfig(clip="kl", kl_limit=1e-9), LossConfig(clip="none", ratio="exact")):
        meter, others = LossMeter(CPU), LossMeter(CPU)
        found, expected = case.gradients(case.decisions, config, meter), case.gradients(kept, config, others)
        assert found.isfinite().all() and (found - expected).norm() < 1e-9 * expected.norm()
        assert meter.sums[0] == others.sums[0] == 15
        torch.testing.assert_close(meter.sums, others.sums, **WIDE)


def test_the_meter_by_hand(parts, tiny, moved) -> None:
    case = make(parts, tiny)
    moved(case.policy.model, 0.02)
    config, meter = LossConfig(ratio="exact", clip_low=2.5e-3, clip_high=3.5e-3), LossMeter(CPU)
    case.gradients(case.decisions, config, meter)
    ratios, cut, gap = [], [], 0.0
    for decision in case.decisions:
        gap = max(
            gap, (case.policy.train(decision.x, decision.timestep, decision.prompts) - decision.velocity).abs().max()
        )
        for single in split(decision):
            velocity = case.policy.train(single.x, single.timestep, single.prompts)
            ratios.append(log_density_ratio(velocity, single, case.sampler).exp().item())
            advantage = case.targets.advantages[0, single.members[0]].item()
            cut.append((ratios[-1] < 1 - 2.5e-3 and advantage < 0, ratios[-1] > 1 + 3.5e-3 and advantage > 0))
    found = meter.means()
    assert found["ratio"] == pytest.approx(sum(ratios) / 20, abs=1e-9)
    assert (found["clipped_low"], found["clipped_high"]) == tuple(sum(side) / 20 for side in zip(*cut, strict=True))
    assert meter.gap.item() == pytest.approx(gap.item())
    assert LossMeter(CPU).means() == dict.fromkeys(LossMeter.NAMES[1:], 0.0)


# -- the objective's variants -----------------------------------------------------------------------------------------


def test_separate_rewards_clip_one_by_one(parts, tiny, moved) -> None:
    """The sum of two losses on one ratio, each clipped by its own advantage's sign."""
    case = make(parts, tiny, axes=2)
    moved(case.policy.model, 0.02)
    config = LossConfig(ratio="exact", clip_low=2.5e-3, clip_high=3.5e-3)
    both, parts_of = case.gradients(case.decisions, config), []
    whole = case.targets
    for axis in range(2):
        case.targets = dataclasses.replace(whole, advantages=whole.advantages[axis : axis + 1])
        parts_of.append(case.gradients(case.decisions, config))
    assert (both - sum(parts_of)).norm() < 1e-12 * both.norm()
    one = dataclasses.replace(whole, advantages=whole.advantages.sum(0, keepdim=True))
    case.targets = one
    assert (both - case.gradients(case.decisions, config)).norm() > 1e-3 * both.norm()
    case.policy.frozen, told = tiny(2, torch.float64), []
    for case.targets in (whole, one):
        meter = LossMeter(CPU)
        case.gradients(case.decisions, dataclasses.replace(config, kl=KlConfig(weight=0.1)), meter)
        told.append(meter.means())
    assert all(told[0][name] == pytest.approx(told[1][name]) for name in ("ratio", "kl", "kl_reference"))


def test_kl_clip_drops_what_is_too_far_and_would_go_farther(parts, tiny, moved) -> None:
    case = make(parts, tiny)
    moved(case.policy.model, 0.02)
    singles = [single for decision in case.decisions for single in split(decision)]
    kept, kls = [], []
    for single in singles:
        meter = LossMeter(CPU)
        case.gradients([single], NO_CLIP, meter)
        found = meter.means()
        kls.append(found["kl"])
        kept.append((found["ratio"] - 1) * case.targets.advantages[0, single.members[0]].item() <= 0)
    limit = (sorted(kls)[7] + sorted(kls)[8]) / 2  # between two groups: members share theirs
    kept = [inward or kl <= limit for inward, kl in zip(kept, kls, strict=True)]
    assert 5 < sum(kept) < 20
    meter = LossMeter(CPU)
    config = LossConfig(ratio="exact", clip="kl", kl_limit=limit)
    found = case.gradients(case.decisions, config, meter)
    expected = case.gradients([single for single, keep in zip(singles, kept, strict=True) if keep], NO_CLIP)
    assert (found - expected).norm() < 1e-9 * expected.norm()
    cut = meter.means()
    assert cut["clipped_low"] + cut["clipped_high"] == pytest.approx(1 - sum(kept) / 20)


@pytest.mark.parametrize("form", ["velocity", "exact"])
def test_kl_by_formula_and_finite_differences(parts, tiny, form: str) -> None:
    case = make(parts, tiny, groups=GROUPS[:2], train_rows=1)
    counted = torch.ones(2, 4, dtype=torch.bool)
    counted[0, 2:] = False
    targets = parts.targets(case.sampler, GROUPS[:2], torch.zeros(1, 2, 4), counted)
    config = LossConfig(kl=KlConfig(weight=0.7, form=form))
    for decision, share in zip(case.decisions, (2 / 6, 4 / 6), strict=True):
        leaf = (decision.velocity + 0.3 * torch.randn_like(decision.velocity)).requires_grad_()
        reference = decision.velocity + 0.2 * torch.randn_like(decision.velocity)
        own = dataclasses.replace(decision, path=Leaf(leaf).path(1))
        meter = LossMeter(CPU)
        (loss,) = losses(Leaf(leaf, reference), [own], targets, config, meter)
        factor = 1.0 if form == "velocity" else targets.lambda_[decision.step].item() ** 2 / 2
        n, distance = leaf.numel(), factor * (leaf - reference).square().mean()
        expected = 0.7 * share * distance * math.sqrt(n)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(
            gradient, 0.7 * share * factor * 2 * (leaf - reference) / n * math.sqrt(n), rtol=1e-12, atol=1e-18
        )
        assert meter.means()["kl_reference"] == pytest.approx(distance.item(), rel=1e-12)

        def as_loss(velocity: Tensor, own: Decision = own, reference: Tensor = reference) -> Tensor:
            return next(losses(Leaf(velocity, reference), [own], targets, config, LossMeter(CPU)))

        assert torch.autograd.gradcheck(as_loss, (leaf,), eps=1e-5)


def test_exact_kl_is_that_of_the_steps_gaussians(parts, tiny) -> None:
    """Between N(mu_theta, std) and N(mu_ref, std): the mean over elements of (mu_theta - mu_ref)^2 / (2 std^2)."""
    case = make(parts, tiny)
    decision = case.decisions[0]
    reference = decision.velocity + 0.2 * torch.randn_like(decision.velocity)
    at = sde.coefficients(case.sampler.grid, [decision.step], case.sampler.rate)
    means = [sde.mean(decision.x, v, at) for v in (decision.velocity, reference)]
    expected = ((means[0] - means[1]).square() / (2 * at.std**2)).mean()
    own = dataclasses.replace(decision, path=Leaf(decision.velocity).path(len(decision.x)))
    meter, config = LossMeter(CPU), LossConfig(kl=KlConfig(weight=1.0, form="exact"))
    list(losses(Leaf(decision.velocity, reference), [own], case.targets, config, meter))
    assert meter.means()["kl_reference"] == pytest.approx(expected.item(), rel=1e-9)


def test_kl_pulls_only_whom_it_is_told_to(parts, tiny) -> None:
    """States of one forward by different shares, each the sum of its members'."""
    case = make(parts, tiny)
    case.policy.frozen = tiny(2, torch.float64)
    config = LossConfig(kl=KlConfig(weight=0.5))
    case.targets = dataclasses.replace(case.targets, advantages=0 * case.targets.advantages)
    singles = {int(single.members[0]): single for decision in case.decisions for single in split(decision)}
    alone = {member: case.gradients([single], config) for member, single in singles.items()}
    whole = case.gradients(case.decisions, config)
    torch.testing.assert_close(whole, sum(alone.values()), **WIDE)
    share = case.targets.kl_share.view(5, 4).clone()
    share[[0, 2]] = 0
    share[1, 1:] = 0
    case.targets = dataclasses.replace(case.targets, kl_share=share.flatten())
    assert any(len(set(decision.prompts) & {2, 5, 0}) == 1 < len(decision.x) for decision in case.decisions)
    some = case.gradients(case.decisions, config)
    torch.testing.assert_close(some, sum(alone[member] for member in (4, *range(12, 20))), **WIDE)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"clip_low": 0.0}, "clip_low is 0"), ({"clip_high": -1.0}, "clip_high"), ({"kl_limit": 0.0}, "kl_limit")],
)
def test_bad_settings_are_refused(settings: dict[str, float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        LossConfig(**settings)
    with pytest.raises(ConfigError, match="kl.weight is -1"):
        KlConfig(weight=-1.0)
