"""The flow loss: identities, sigma distributions, dropout, weights."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.train import flow_loss
from reelforge.engine.train.flow_loss import FlowLossConfig

SCHEDULE = FlowSchedule("unipc_flow", 5.0)
PLAIN = FlowSchedule("euler", 1.0)


class Recorder(nn.Module):
    """Returns a given velocity and keeps what it was called with."""

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, latents, timestep, text):
        self.seen = latents, timestep, text
        return self.velocity


def batch(dtype=torch.float32):
    x0, noise = rng.normal([1, 2, 3], (4, 3, 2, 2)).to(dtype), rng.normal([4, 5, 6], (4, 3, 2, 2))
    return x0, noise, torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def test_interpolation_and_target_are_consistent():
    x0, noise, sigma = batch()
    x = flow_loss.interpolate(x0, noise, sigma)
    torch.testing.assert_close(x[0], x0[0], rtol=0, atol=0)
    torch.testing.assert_close(x[2], noise[2], rtol=0, atol=0)
    s = sigma.view(-1, 1, 1, 1, 1)
    velocity = noise.double() - x0.double()
    torch.testing.assert_close(x.double() - s * velocity, x0.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.double() + (1 - s) * velocity, noise.double(), rtol=0, atol=1e-6)


def test_the_true_velocity_costs_nothing_and_any_other_its_mean_square():
    x0, noise, sigma = batch()
    text = torch.zeros(3, 2, 8)
    model = Recorder(noise - x0)
    assert flow_loss.flow_losses(model, x0, noise, sigma, text).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(model.seen[1], torch.tensor([0.0, 400.0, 1000.0]))
    off = noise - x0 + torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1, 1, 1)
    losses = flow_loss.flow_losses(Recorder(off), x0, noise, sigma, text)
    torch.testing.assert_close(losses, torch.tensor([1.0, 4.0, 9.0]))


def test_arithmetic_is_fp32_even_for_bf16_latents_and_velocities():
    x0, noise, sigma = batch(torch.bfloat16)
    model = Recorder((noise - x0.float()).bfloat16())
    losses = flow_loss.flow_losses(model, x0, noise, sigma, torch.zeros(3, 2, 8))
    assert model.seen[0].dtype == losses.dtype == model.seen[1].dtype == torch.float32
    rounding = (model.velocity.double() - (noise.double() - x0.double())).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), rounding, rtol=1e-5, atol=0)


def draws(config: FlowLossConfig, schedule: FlowSchedule, steps: int = 400, size: int = 16) -> np.ndarray:
    return torch.stack([flow_loss.draw_sigmas(config, schedule, 7, step, size) for step in range(steps)]).numpy()


def unshift(sigma: np.ndarray, shift: float) -> np.ndarray:
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    ("sampler", "mean", "std"), [("uniform", 0, 1), ("logit_normal", 0, 1), ("logit_normal", -0.7, 1.6)]
)
def test_sigma_distribution(sampler, mean, std, shift, stratified):
    config = FlowLossConfig(sampler=sampler, mean=mean, std=std, stratified=stratified)
    sigma = draws(config, FlowSchedule("euler", shift))
    assert sigma.dtype == np.float64 and sigma.min() >= 0 and sigma.max() <= 1
    u = unshift(sigma, shift)
    if sampler == "uniform":
        expected = scipy.stats.uniform().cdf
    else:

        def expected(u):
            return scipy.stats.norm(mean, std).cdf(scipy.special.logit(u))

    # One slot over many steps is an independent sample, stratified or not.
    for slot in (0, 15):
        assert scipy.stats.kstest(u[:, slot], expected).pvalue > 1e-3
    # The whole set: its distance is within the KS bound at 1e-3 for independent draws.
    assert scipy.stats.kstest(u.ravel(), expected).statistic < 1.95 / math.sqrt(u.size)


def test_stratified_batches_hit_every_stratum_once_and_vary_less():
    u = draws(FlowLossConfig(stratified=True), PLAIN)
    assert (np.sort(np.floor(u * 16), axis=1) == np.arange(16)).all()
    independent = draws(FlowLossConfig(stratified=False), PLAIN)
    # Var of the batch mean: 1/(12 B) drawn freely, 1/(12 B^3) one per stratum; 400 batches know it to 7 %.
    np.testing.assert_allclose(independent.mean(1).var(), 1 / (12 * 16), rtol=0.28)
    np.testing.assert_allclose(u.mean(1).var(), 1 / (12 * 16**3), rtol=0.28)


def test_dropout_rate_and_independence_of_sigma():
    config = FlowLossConfig(text_dropout=0.1)
    dropped = torch.stack([flow_loss.draw_text_dropout(config, 3, step, 16) for step in range(1000)]).numpy()
    assert scipy.stats.binomtest(int(dropped.sum()), dropped.size, 0.1).pvalue > 1e-3
    assert (dropped.mean(0) > 0.06).all() and (dropped.mean(0) < 0.14).all()
    sigma = draws(FlowLossConfig(stratified=False), PLAIN, steps=1000)
    assert abs(np.corrcoef(sigma.ravel(), dropped.ravel())[0, 1]) < 4 / math.sqrt(dropped.size)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_extremes(rate):
    dropped = flow_loss.draw_text_dropout(FlowLossConfig(text_dropout=rate), 0, 0, 1000)
    assert dropped.float().mean() == rate


def test_noise_belongs_to_the_slot():
    device = torch.device("cpu")
    whole = flow_loss.draw_noise(1, 5, range(6), (4, 2), device)
    parts = [flow_loss.draw_noise(1, 5, part, (4, 2), device) for part in ([0], [1, 2], [3, 4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, flow_loss.draw_noise(1, 6, range(6), (4, 2), device))


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_bell_weight_is_diffsynths(shift):
    config = FlowLossConfig(weight="bell")
    schedule = FlowSchedule("euler", shift)
    # DiffSynth-Studio FlowMatchScheduler.set_timesteps(1000, training=True)
    u = np.linspace(1.0, 0.0, 1001)[:-1]
    sigma = shift * u / (1 + (shift - 1) * u)
    y = np.exp(-2 * ((sigma * 1000 - 500) / 1000) ** 2)
    expected = (y - y.min()) * (1000 / (y - y.min()).sum())
    weight = flow_loss.loss_weight(config, schedule, torch.from_numpy(sigma))
    np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-6)
    assert torch.equal(flow_loss.loss_weight(FlowLossConfig(), schedule, weight), torch.ones(1000))


@pytest.mark.parametrize(("name", "value"), [("text_dropout", 1.5), ("std", 0.0)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        FlowLossConfig(**{name: value})
