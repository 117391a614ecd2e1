"""The fused step's contract: formula, precision, independence of the batch split, gradients."""

import pytest
import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.kernels.sde_replay import mean_product, velocity_terms
from reelforge.kernels.sde_step import guide, sde_step

SHAPE = (5, 4, 3, 7, 9)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rng.normal([rng.key("sde_step", seed)], shape)[0].to(dtype)


A, B, STD = (randn(seed, 5, dtype=torch.float64) for seed in (10, 11, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_is_the_formula_in_the_states_precision(dtype: torch.dtype) -> None:
    x, velocity, noise = randn(0, *SHAPE), randn(1, *SHAPE, dtype=dtype), randn(2, *SHAPE)
    after = sde_step(x, velocity, A, B, STD, noise)
    assert after.dtype == torch.float32
    for i in range(5):
        exact = A[i] * x[i].double() + B[i] * velocity[i].double() + STD[i] * noise[i].double()
        torch.testing.assert_close(after[i].double(), exact, rtol=0, atol=2e-6)


def test_step_in_float64_without_noise_and_with_one_coefficient() -> None:
    x, velocity, noise = (randn(seed, *SHAPE, dtype=torch.float64) for seed in (0, 1, 2))
    mean = sde_step(x, velocity, A[:1], B[:1], STD[:1], None)
    torch.testing.assert_close(mean, A[0] * x + B[0] * velocity, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        sde_step(x, velocity, A[:1], B[:1], STD[:1], noise), mean + STD[0] * noise, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_combines_in_float32(scale: float) -> None:
    v_uncond, v_cond = (randn(seed, *SHAPE, dtype=torch.bfloat16) for seed in (0, 1))
    exact = (1 - scale) * v_uncond.double() + scale * v_cond.double()
    combined = guide(v_uncond, v_cond, scale)
    assert combined.dtype == torch.float32
    torch.testing.assert_close(combined.double(), exact, rtol=0, atol=5e-6)
    assert torch.equal(guide(v_uncond, v_uncond, scale), v_uncond.float())


@pytest.mark.parametrize("split", [(1, 4), (2, 3), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("shape", [(5, 11), SHAPE, (5, 70_001)])
def test_samples_do_not_depend_on_the_batch_split(split: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, velocity, old, noise = (randn(seed, *shape) for seed in range(4))
    parts = [t.split(split) for t in (x, velocity, old, noise, A, B, STD)]
    whole = sde_step(x, velocity, A, B, STD, noise), *velocity_terms(velocity, old, noise)
    pieces = [
        (sde_step(px, pv, pa, pb, ps, pz), *velocity_terms(pv, po, pz))
        for px, pv, po, pz, pa, pb, ps in zip(*parts, strict=True)
    ]
    for i, together in enumerate(whole):
        assert torch.equal(together, torch.cat([piece[i] for piece in pieces]))


def test_velocity_terms_are_the_means() -> None:
    velocity, old, noise = (randn(seed, *SHAPE) for seed in range(3))
    slope, power = velocity_terms(velocity, old, noise)
    e = (velocity - old).double()
    torch.testing.assert_close(slope, (e * noise.double()).flatten(1).mean(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(power, (e * e).flatten(1).mean(1), rtol=0, atol=1e-6)
    assert slope.dtype == power.dtype == torch.float64
    assert torch.equal(velocity_terms(old, old, noise)[0], torch.zeros(5, dtype=torch.float64))


def test_a_group_may_share_one_state() -> None:
    velocity, old, noise = randn(0, 1, 4, 9), randn(1, 1, 4, 9), randn(2, 6, 4, 9)
    slope, power = velocity_terms(velocity, old, noise)
    each, powers = velocity_terms(velocity.expand(6, 4, 9), old.expand(6, 4, 9), noise)
    assert torch.equal(slope, each)
    assert torch.equal(power.expand(6), powers)


def test_gradients_by_finite_differences() -> None:
    velocity, old, noise = (randn(seed, 2, 3, 2, dtype=torch.float64) for seed in range(3))
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: velocity_terms(v, old, noise), (velocity,))
    assert torch.autograd.gradcheck(
        lambda v: velocity_terms(v, old[:1], noise), (velocity[:1].detach().requires_grad_(),)
    )
    assert torch.autograd.gradcheck(lambda v: sde_step(noise, v, A[:2], B[:2], STD[:2], old), (velocity,))
    assert torch.autograd.gradcheck(lambda v: guide(v, old, 4.5), (velocity,))


def test_long_sums_keep_their_digits() -> None:
    """A float32 accumulator would lose the small terms behind a large one."""
    values = torch.full((1, 1 << 20), 1e-4)
    values[0, 0] = 1e4
    exact = (values.double() ** 2).mean(1)
    torch.testing.assert_close(mean_product(values, values), exact, rtol=1e-7, atol=0)
