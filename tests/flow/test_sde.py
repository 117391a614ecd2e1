"""The stochastic step against published numbers, the score form, and the marginals it must keep."""

import math
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow import sde
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.flow.sde import NoiseRate

RATES = {
    "flow": NoiseRate("flow", 0.7),
    "dance": NoiseRate("dance", 0.3),
    "wan": NoiseRate("wan"),
    "trunc": NoiseRate("trunc"),
    "cps": NoiseRate("cps", 0.7),
}
GRID = FlowSchedule("unipc_flow", 3.0).grid(20)
X = torch.tensor([[0.5, -1.0, 0.25, 2.0]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.5, -0.75, -0.25]], dtype=torch.float64)
Z = torch.tensor([[0.3, -0.6, 1.2, 0.0]], dtype=torch.float64)
E = torch.tensor([[0.05, -0.02, 0.03, 0.01]], dtype=torch.float64)

# step, rate: s, a, b, std; mean; log-density, lambda, 1 / lambda
_WORKED = """
1 flow  | 5.232764 0.742487 -0.023006 0.711317 | 0.348238 -0.753989 0.202876 1.490725 | -0.814552 0.032342 30.9193
1 dance | 0.3 0.999154 -0.018493 0.040781 | 0.481084 -1.008400 0.263658 2.002931 | 2.044360 0.453483 2.2052
1 wan   | 0.965148 0.991240 -0.018632 0.131198 | 0.476987 -1.000556 0.261784 1.987137 | 0.875861 0.142018 7.0414
1 trunc | 3.310398 0.896938 -0.020290 0.450000 | 0.428179 -0.907083 0.239452 1.798949 | -0.356681 0.045090 22.1781
1 cps   | nan 0.473679 -0.027731 0.858878 | 0.209108 -0.487545 0.139218 0.954291 | -1.003060 0.032288 30.971
4 flow  | 2.418826 0.926822 -0.028737 0.367486 | 0.434674 -0.941191 0.253258 1.860828 | -0.154117 0.078199 12.7879
4 dance | 0.3 0.998874 -0.023169 0.045578 | 0.476268 -1.010459 0.267095 2.003541 | 1.933138 0.508333 1.9672
4 wan   | 0.906500 0.989722 -0.023876 0.137722 | 0.470985 -1.001660 0.265338 1.985413 | 0.827329 0.173365 5.7682
4 trunc | 2.961944 0.890270 -0.031562 0.450000 | 0.413574 -0.906051 0.246239 1.788431 | -0.356681 0.070137 14.2578
4 cps   | nan 0.508788 -0.061042 0.801585 | 0.193352 -0.539309 0.172978 1.032837 | -0.934024 0.076152 13.132
9 flow  | 1.338910 0.959237 -0.044465 0.253033 | 0.435153 -0.981470 0.273158 1.929590 | 0.219046 0.175729 5.6906
9 dance | 0.3 0.997954 -0.036154 0.056695 | 0.462822 -1.016031 0.276604 2.004946 | 1.714875 0.637697 1.5681
9 wan   | 0.771533 0.986465 -0.038621 0.145808 | 0.454612 -1.005775 0.275582 1.982584 | 0.770277 0.264874 3.7754
9 trunc | 1.912728 0.916810 -0.053573 0.361476 | 0.404832 -0.943596 0.269382 1.847013 | -0.137629 0.148205 6.7474
9 cps   | nan 0.590698 -0.123576 0.667921 | 0.171773 -0.652486 0.240356 1.212289 | -0.751603 0.185016 5.405
"""


def worked() -> dict[tuple[int, str], list[list[float]]]:
    rows = [line.split("|") for line in _WORKED.strip().splitlines()]
    keys = [(int(name.split()[0]), name.split()[1]) for name, *_ in rows]
    cells = [[[float(word) for word in cell.split()] for cell in row[1:]] for row in rows]
    return dict(zip(keys, cells, strict=True))


WORKED = worked()
# 1 / lambda of the wan rate at shift 3 (its first ten: Flash-GRPO's published table), 5 and 8
RECTIFIERS = {
    3: """7.4770 7.0414 6.6112 6.1867 5.7682 5.3559 4.9502 4.5513 4.1596 3.7754
          3.3989 3.0304 2.6702 2.3184 1.9748 1.6393 1.3110 .9883 .6678 .3431""",
    5: "9.6881 9.1496 8.6138 8.0812 7.5521 7.0267 6.5054 5.9888 5.4774 4.9717",
    8: "12.2800 11.6166 10.9547 10.2946 9.6365 8.9806 8.3274 7.6771 7.0304 6.3876",
}
LOG_RATIOS = {
    (1, "wan"): -0.002246614, (1, "dance"): -0.007242604, (1, "flow"): -0.000509901,
    (4, "wan"): -0.002745148, (4, "dance"): -0.008132212, (4, "flow"): -0.001234613,
    (9, "wan"): -0.004205963, (9, "dance"): -0.010241967, (9, "flow"): -0.002782791,
}  # fmt: skip


@pytest.mark.parametrize(("k", "kind"), WORKED)
def test_worked_steps(k: int, kind: str) -> None:
    (s, a, b, std), mean, (log_prob, lambda_, rectifier) = WORKED[k, kind]
    at = sde.coefficients(GRID, [k], RATES[kind])
    ours = torch.cat((at.a, at.b, at.std, at.lambda_))
    np.testing.assert_allclose(ours, [a, b, std, lambda_], rtol=0, atol=1e-6)
    x_mean, x_next = sde.mean(X, V, at), sde.step(X, V, at, Z)
    np.testing.assert_allclose(x_mean[0], mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(x_next[0], np.array(mean) + std * Z[0].numpy(), rtol=0, atol=2e-6)
    assert sde.log_prob(x_next, x_mean, at.std).item() == pytest.approx(log_prob, abs=1e-6)
    assert 1 / sde.sde_lambda(GRID, [k], RATES[kind]).item() == pytest.approx(
        rectifier, abs=5e-4 if kind == "cps" else 5e-5
    )
    if kind != "cps":
        assert at.s.item() == pytest.approx(s, abs=1e-6)


@pytest.mark.parametrize(("k", "expected"), [(1, -0.348550), (4, -0.303599), (9, -0.210791)])
def test_unscaled_log_prob_is_not_the_log_density(k: int, expected: float) -> None:
    at = sde.coefficients(GRID, [k], RATES["cps"])
    x_mean, x_next = sde.mean(X, V, at), sde.step(X, V, at, Z)
    assert sde.unscaled_log_prob(x_next, x_mean).item() == pytest.approx(expected, abs=1e-6)
    constants = -at.std.log() - math.log(2 * math.pi) / 2
    rescaled = sde.unscaled_log_prob(x_next, x_mean) / (2 * at.std**2) + constants
    torch.testing.assert_close(rescaled, sde.log_prob(x_next, x_mean, at.std), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", RECTIFIERS)
def test_rectifier_table(shift: int) -> None:
    table = [float(word) for word in RECTIFIERS[shift].split()]
    inverse = 1 / sde.sde_lambda(FlowSchedule("unipc_flow", shift).grid(20), range(len(table)), RATES["wan"])
    np.testing.assert_allclose(inverse, table, rtol=0, atol=5.1e-5)


def test_flow_noise_rate_table() -> None:
    table = [30.92, 20.635, 15.804, 12.788, 10.646, 9.008, 7.697, 6.611, 5.691]
    inverse = 1 / sde.sde_lambda(GRID, range(1, 10), RATES["flow"])
    np.testing.assert_allclose(inverse, table, rtol=0, atol=5.1e-3)


@settings(deadline=None)
@given(
    num_steps=st.integers(3, 60),
    shift=st.floats(1.0, 12.0),
    eta=st.floats(0.05, 1.0),
    data=st.data(),
)
def test_lambda_closed_forms(num_steps: int, shift: float, eta: float, data: st.DataObject) -> None:
    """Away from k = 0, where the flow rate is guarded."""
    grid = FlowSchedule("unipc_flow", shift).grid(num_steps)
    k = data.draw(st.integers(1, num_steps - 1))
    sigma, delta, c = (float(t) for t in (grid.sigmas[k], grid.sigmas[k] - grid.sigmas[k + 1], grid.sigmas[1]))
    closed = {
        "flow": (1 / eta + eta / 2) * math.sqrt(delta * (1 - sigma) / sigma),
        "dance": math.sqrt(delta) * (1 / eta + eta * (1 - sigma) / (2 * sigma)),
        "wan": math.sqrt(delta) * (1 / (eta * c * sigma) + eta * c * (1 - sigma) / 2),
    }
    for kind, expected in closed.items():
        rate = NoiseRate(kind, eta)
        assert sde.sde_lambda(grid, [k], rate).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("kind", "k"), [*product(("flow", "dance", "wan", "trunc"), (0, 1, 7, 19))])
def test_equals_the_two_stage_score_form(kind: str, k: int) -> None:
    """An Euler step, then half the squared rate along the score of the Gaussian around the predicted x0."""
    sigma, following = GRID.sigmas[k], GRID.sigmas[k + 1]
    at = sde.coefficients(GRID, [k], RATES[kind])
    x0_hat = X - sigma * V
    score = -(X - (1 - sigma) * x0_hat) / sigma**2
    dt = following - sigma
    expected = X + dt * V - 0.5 * at.s**2 * score * dt + at.s * torch.sqrt(-dt) * Z
    torch.testing.assert_close(sde.step(X, V, at, Z), expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(k=st.integers(0, 19), eta=st.floats(0.0, 1.0))
def test_cps_keeps_the_noise_level(k: int, eta: float) -> None:
    sigma, following = GRID.sigmas[k], GRID.sigmas[k + 1]
    at = sde.coefficients(GRID, [k], NoiseRate("cps", eta))
    x0_hat, noise_hat = X - sigma * V, X + (1 - sigma) * V
    kept = torch.sqrt((following**2 - at.std**2).clamp_min(0))
    # The square root cancels where sin is almost 1: half of float64's digits are left.
    torch.testing.assert_close(sde.mean(X, V, at), (1 - following) * x0_hat + kept * noise_hat, rtol=0, atol=3e-8)


@pytest.mark.parametrize("kind", RATES)
def test_no_noise_is_the_euler_step(kind: str) -> None:
    for k in range(20):
        at = sde.coefficients(GRID, [k], NoiseRate(kind, 0.0))
        euler = X + (GRID.sigmas[k + 1] - GRID.sigmas[k]) * V
        assert at.std.item() == 0
        torch.testing.assert_close(sde.step(X, V, at, Z), euler, rtol=0, atol=0 if kind != "cps" else 1e-15)
        torch.testing.assert_close(sde.mean(X, V, at), euler, rtol=0, atol=0 if kind != "cps" else 1e-15)


@pytest.mark.parametrize(("kind", "shift", "rate"), [*product(("unipc_flow", "euler"), (1.0, 3.0, 8.0), RATES)])
def test_first_step_is_sane_on_both_schedules(kind: str, shift: float, rate: str) -> None:
    """Unguarded, Flow-GRPO's rate at sigma .999666 gives std 5 and a = -11.7, and at sigma 1 infinity."""
    grid = FlowSchedule(kind, shift).grid(20)
    at = sde.coefficients(grid, [0], RATES[rate])
    assert 0 < at.std.item() < 1
    assert 0 < at.a.item() <= 1
    assert -1 < at.b.item() < 0


def test_samples_of_a_batch_may_be_at_different_steps() -> None:
    steps = [0, 9, 4, 19]
    x, v, z = (t.expand(4, -1) for t in (X, V, Z))
    together = sde.step(x, v, sde.coefficients(GRID, steps, RATES["wan"]), z)
    alone = [sde.step(X, V, sde.coefficients(GRID, [k], RATES["wan"]), Z) for k in steps]
    assert torch.equal(together, torch.cat(alone))


# -- ratios ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "kind"), LOG_RATIOS)
def test_worked_log_ratios(k: int, kind: str) -> None:
    at = sde.coefficients(GRID, [k], RATES[kind])
    ratio = sde.velocity_log_ratio(V + E, V, Z, at.lambda_)
    assert ratio.value.item() == pytest.approx(LOG_RATIOS[k, kind], abs=1e-9)
    if (k, kind) == (4, "wan"):
        assert ratio.kl.item() == pytest.approx(1.4652e-5, abs=5e-10)


@pytest.mark.parametrize(("k", "kind"), WORKED)
def test_log_ratio_is_the_difference_of_log_densities(k: int, kind: str) -> None:
    at = sde.coefficients(GRID, [k], RATES[kind])
    x_next = sde.step(X, V, at, Z)
    direct = sde.log_prob(x_next, sde.mean(X, V + E, at), at.std) - sde.log_prob(x_next, sde.mean(X, V, at), at.std)
    exact = sde.velocity_log_ratio(V + E, V, Z, at.lambda_)
    torch.testing.assert_close(exact.value, direct, rtol=0, atol=1e-12)
    shifted = (sde.mean(X, V + E, at) - sde.mean(X, V, at)) / at.std
    torch.testing.assert_close(exact.kl, (shifted**2).mean(1) / 2, rtol=0, atol=1e-12)
    debiased = sde.velocity_log_ratio(V + E, V, Z, at.lambda_, "debiased")
    torch.testing.assert_close(debiased.value - debiased.kl, exact.value, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_exactly_one_on_policy(dtype: torch.dtype) -> None:
    velocity = rng.normal([1, 2], (4, 3, 8, 8)).to(dtype)
    noise = rng.normal([3, 4], (4, 3, 8, 8))
    at = sde.coefficients(GRID, [2, 5], RATES["dance"])
    for form in ("exact", "debiased"):
        ratio = sde.velocity_log_ratio(velocity, velocity.clone(), noise, at.lambda_, form)
        assert torch.equal(ratio.value.exp(), torch.ones(2, dtype=torch.float64))
        assert torch.equal(ratio.kl, torch.zeros(2, dtype=torch.float64))


def test_first_update_pushes_the_velocity_along_the_noise() -> None:
    """d log r / dv at e = 0 is -lambda z / n."""
    velocity = V.clone().requires_grad_()
    at = sde.coefficients(GRID, [4], RATES["trunc"])
    sde.velocity_log_ratio(velocity, V, Z, at.lambda_).value.sum().backward()
    torch.testing.assert_close(velocity.grad, -at.lambda_ * Z / 4, rtol=1e-12, atol=0)


# -- marginals: 1-D Gaussian data, for which the exact velocity is affine and moments propagate in closed form -------

DATA_MEAN, DATA_STD = 0.7, 0.5


def exact_velocity(sigma: float) -> tuple[float, float]:
    """E[noise - x0 | x_sigma = x] = slope x + offset."""
    variance = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * DATA_STD**2) / variance
    return slope, -DATA_MEAN - slope * (1 - sigma) * DATA_MEAN


def final_moments(grid: Grid, rates: list[NoiseRate]) -> tuple[float, float]:
    mean, variance = 0.0, 1.0
    for k, rate in enumerate(rates):
        at = sde.coefficients(grid, [k], rate)
        slope, offset = exact_velocity(float(grid.sigmas[k]))
        gain = float(at.a + at.b * slope)
        mean, variance = gain * mean + float(at.b) * offset, gain**2 * variance + float(at.std) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("rate", [sde.ODE, *(RATES[kind] for kind in ("flow", "dance", "wan", "trunc"))])
def test_every_rate_keeps_the_marginal(rate: NoiseRate) -> None:
    mean, std = final_moments(FlowSchedule("unipc_flow", 3.0).grid(200), [rate] * 200)
    assert mean == pytest.approx(DATA_MEAN, rel=0.02)
    assert std == pytest.approx(DATA_STD, rel=0.02)
    _, finer = final_moments(FlowSchedule("unipc_flow", 3.0).grid(400), [rate] * 400)
    assert DATA_STD - finer == pytest.approx((DATA_STD - std) / 2, rel=0.1)


@pytest.mark.parametrize(("eta", "narrowed"), [(0.7, 0.4154), (0.8, 0.3936)])
def test_cps_narrows_the_marginal_whatever_the_step_count(eta: float, narrowed: float) -> None:
    grid = FlowSchedule("unipc_flow", 3.0)
    assert final_moments(grid.grid(200), [NoiseRate("cps", eta)] * 200)[1] == pytest.approx(narrowed, abs=5e-5)
    assert final_moments(grid.grid(800), [NoiseRate("cps", eta)] * 800)[1] < 0.9 * DATA_STD


@pytest.mark.parametrize("kind", RATES)
def test_sampled_marginal_is_the_propagated_one(kind: str) -> None:
    """The step function itself, in float32, on 200,000 samples."""
    count, grid = 200_000, FlowSchedule("euler", 3.0).grid(12)
    x = rng.normal([rng.key("x_T", 0)], (count,))
    for k in range(12):
        slope, offset = exact_velocity(float(grid.sigmas[k]))
        noise = rng.normal([rng.key("sde", k)], (count,))
        x = sde.step(x, slope * x + offset, sde.coefficients(grid, [k], RATES[kind]), noise)
    mean, std = final_moments(grid, [RATES[kind]] * 12)
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert x.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * count))


@pytest.mark.parametrize("arguments", [("flow", -0.1), ("cps", 1.1), ("dance", float("nan")), ("trunc", 1.0, 0.0)])
def test_bad_rates_are_refused(arguments: tuple) -> None:
    with pytest.raises(ConfigError):
        NoiseRate(*arguments)
