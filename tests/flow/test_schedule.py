"""Grids against published tables, diffusers and the plain formula."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("hypothesis")

from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.core import config
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.schedule import FlowSchedule, Grid

shifts = st.floats(0.1, 20.0)
units = st.floats(0.0, 1.0)

TIMESTEPS = {
    (3, 20): "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136",
    (5, 20): "999 989 978 965 952 937 920 902 882 859 833 803 768 728 681 624 555 468 356 208",
    (8, 20): "999 993 986 978 969 959 948 936 922 907 888 867 841 811 773 727 666 585 470 296",
    (5, 16): "999 986 972 955 937 916 892 865 833 795 749 694 624 535 416 249",
    (5, 10): "999 978 952 920 882 833 768 681 555 356",
}
SIGMAS = {
    3: """.999666 .982419 .963941 .944094 .922722 .899640 .874635 .847457 .817810 .785340
          .749625 .710152 .666296 .617284 .562148 .499667 .428265 .345888 .249792 .136240 0""",
    5: """.999800 .989377 .978048 .965689 .952154 .937265 .920810 .902527 .882093 .859106
          .833055 .803284 .768935 .728863 .681508 .624687 .555247 .468457 .356888 .208160 0""",
    8: """.999875 .993334 .986166 .978276 .969550 .959846 .948992 .936768 .922899 .907029
          .888691 .867261 .841883 .811359 .773944 .727008 .666389 .585080 .470311 .296077 0""",
}
EULER_SHIFT_5 = """1 .989583 .978261 .965909 .952381 .9375 .921053 .902778 .882353 .859375 .833333 .803571 .769231
    .729167 .681818 .625 .555556 .46875 .357143 .208333 0"""


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


@pytest.mark.parametrize(("shift", "num_steps"), TIMESTEPS)
def test_unipc_flow_timesteps_are_the_published_ones(shift: int, num_steps: int) -> None:
    grid = FlowSchedule("unipc_flow", shift).grid(num_steps)
    assert grid.timesteps.tolist() == numbers(TIMESTEPS[shift, num_steps])
    assert grid.num_steps == num_steps


@pytest.mark.parametrize("shift", SIGMAS)
def test_unipc_flow_sigmas_are_the_published_ones(shift: int) -> None:
    sigmas = FlowSchedule("unipc_flow", shift).grid(20).sigmas
    assert sigmas.dtype == torch.float64
    np.testing.assert_allclose(sigmas, numbers(SIGMAS[shift]), rtol=0, atol=1e-6)


def test_euler_grid_is_the_published_one() -> None:
    grid = FlowSchedule("euler", 5.0).grid(20)
    np.testing.assert_allclose(grid.sigmas, numbers(EULER_SHIFT_5), rtol=0, atol=1e-6)
    assert torch.equal(grid.timesteps, (1000 * grid.sigmas[:-1]).float())


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_unipc_flow_equals_diffusers(shift: float) -> None:
    """At shift 1 many 1000 sigma are whole numbers up to rounding, which the truncation sees."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    for num_steps in [*range(1, 60), 100, 333, 999, 1000]:
        even = 1.0 - np.linspace(1, 1 / 1000, num_steps + 1)  # diffusers' own grid until it was given the argument
        scheduler.set_timesteps(sigmas=np.flip(even)[:-1].copy())
        grid = FlowSchedule("unipc_flow", shift).grid(num_steps)
        assert grid.timesteps.tolist() == scheduler.timesteps.tolist()
        torch.testing.assert_close(grid.sigmas.float(), scheduler.sigmas, rtol=0, atol=6e-8)


@settings(deadline=None)
@given(u=units, shift=shifts)
def test_unshift_inverts_shift(u: float, shift: float) -> None:
    schedule = FlowSchedule("euler", shift)
    assert schedule.unshift(schedule.shift(u)) == pytest.approx(u, abs=1e-12)
    assert schedule.shift(torch.tensor(u, dtype=torch.float64)).item() == schedule.shift(u)
    assert schedule.unshift(torch.tensor([u])).dtype == torch.float64


@settings(deadline=None)
@given(low=units, high=units, first=shifts, second=shifts)
def test_shift_is_monotonic_and_composes(low: float, high: float, first: float, second: float) -> None:
    one, two, both = (FlowSchedule("euler", s) for s in (first, second, first * second))
    assert two.shift(one.shift(low)) == pytest.approx(both.shift(low), abs=1e-12)
    assert (one.shift(low) <= one.shift(high)) == (low <= high) or one.shift(low) == one.shift(high)


@settings(deadline=None)
@given(num_steps=st.integers(1, 200), shift=shifts, kind=st.sampled_from(["unipc_flow", "euler"]))
def test_grid_falls_to_zero(num_steps: int, shift: float, kind: str) -> None:
    grid = config.build(FlowSchedule, {"kind": kind, "flow_shift": shift}).grid(num_steps)
    assert isinstance(grid, Grid)
    assert grid.sigmas.shape == (num_steps + 1,)
    assert (grid.sigmas.diff() < 0).all()
    assert grid.sigmas[-1] == 0
    assert (grid.timesteps >= 0).all()


def test_few_step_timesteps_are_warped_and_never_truncated() -> None:
    for kind in ("unipc_flow", "euler"):
        grid = config.build(FlowSchedule, {"kind": kind, "flow_shift": 5.0}).few_step((1000, 750, 500, 250))
        expected = [1.0, 15 / 16, 5 / 6, 5 / 8, 0.0]
        np.testing.assert_allclose(grid.sigmas, expected, rtol=1e-15)
        np.testing.assert_allclose(grid.timesteps, [1000 * sigma for sigma in expected[:-1]], rtol=1e-7)


def test_training_timestep_is_continuous() -> None:
    sigma = torch.tensor([[0.1234567, 0.9999]], dtype=torch.float64)
    told = FlowSchedule("unipc_flow", 3.0).training_timestep(sigma)
    np.testing.assert_allclose(told, 1000 * sigma.numpy(), rtol=1e-7)
    assert FlowSchedule("unipc_flow", 3.0).timestep(sigma).tolist() == [[123.0, 999.0]]


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_bad_shift_is_refused(shift: float) -> None:
    with pytest.raises(ConfigError, match="flow_shift"):
        FlowSchedule("euler", shift)


@pytest.mark.parametrize("steps", [(), (500, 750), (750, 750), (1001, 500), (500, 0), (float("nan"),)])
def test_bad_denoising_steps_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="denoising_steps"):
        FlowSchedule("euler", 5.0).few_step(steps)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_steps is 0"):
        FlowSchedule("euler", 5.0).grid(0)


@pytest.mark.parametrize("kind", ["unipc_flow", "euler"])
def test_steps_are_the_tables_as_numbers(kind: str) -> None:
    """One a step: the last sigma, 0, begins none."""
    schedule = FlowSchedule(kind, 5.0)
    for grid in (schedule.grid(7), schedule.few_step((1000, 750, 500, 250))):
        assert grid.steps == [(grid.sigmas[k].item(), grid.timesteps[k].item()) for k in range(grid.num_steps)]
    np.testing.assert_allclose(grid.steps, [(1, 1000), (15 / 16, 937.5), (5 / 6, 2500 / 3), (5 / 8, 625)], rtol=1e-6)
