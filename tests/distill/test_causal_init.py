"""Causal initialisation against cached rollouts, attention with a mask, closed forms and separate computations."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_causal import FEW_STEPS, SCHEDULE, SIZE, TOKENS, gradients, latents, shake, texts, tiny_causal
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.distill.causal_init import (
    CausalInitConfig,
    consistency_losses,
    draw_levels,
    packed,
    per_chunk,
    regression_losses,
    teacher_forcing_losses,
)
from reelforge.engine.distill.init_trainer import Batch, InitTask
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.model.generation import half_precision
from reelforge.engine.model.layout import chunk_causal
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.train.ema import Ema
from reelforge.engine.train.loop import LoopConfig

CPU = torch.device("cpu")
PATTERN = (1, 3, 2)
FRAMES = sum(PATTERN)
MEAN, DEVIATION = 0.6, 0.5  # of the Gaussian whose flow is known


def decoded(net: WanTransformer, clean: Tensor, noisy: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Velocities, chunk by chunk against a cache of the true past; ``sigma`` is ``[B, chunks]``."""
    cache, parts, start = net.new_cache(len(clean), max(PATTERN), FRAMES, *SIZE), [], 0
    for number, size in enumerate(PATTERN):
        span, start = slice(start, start + size), start + size
        told = (1000 * sigma[:, number]).float()
        parts.append(net(noisy[:, :, span], told, text, chunk=cache.denoising(size, size * TOKENS)))
        with torch.no_grad():
            written = cache.clean(size, size * TOKENS)
            net(clean[:, :, span], torch.zeros(len(clean)), text, chunk=written)
        cache.commit(written)
    return torch.cat(parts, dim=2)


@torch.no_grad()
def test_packed_forward_is_the_cached_rollout_with_the_true_past() -> None:
    """Every sample and chunk at a noise level of its own."""
    net, text, clean, noisy = tiny_causal(), texts(), latents(FRAMES), latents(FRAMES, 1)
    sigma = torch.tensor([[0.9, 0.2, 0.5], [0.1, 1.0, 0.7]], dtype=torch.float64)
    velocity = packed(net, clean, text, PATTERN)(noisy, 1000 * per_chunk(sigma, PATTERN).float())
    torch.testing.assert_close(velocity, decoded(net, clean, noisy, sigma, text), rtol=0, atol=1e-12)


def test_teacher_forcing_loss_is_the_flow_loss_of_every_chunk() -> None:
    net, text, clean, noise = tiny_causal(), texts(), latents(FRAMES), latents(FRAMES, 1)
    sigma = torch.tensor([[0.9, 0.2, 0.5], [0.1, 1.0, 0.7]], dtype=torch.float64)
    losses = teacher_forcing_losses(net, clean, noise, sigma, text, PATTERN)
    s = sigma.repeat_interleave(torch.tensor(PATTERN), dim=1)[:, None, :, None, None]
    with torch.no_grad():
        off = decoded(net, clean, (1 - s) * clean + s * noise, sigma, text) - (noise - clean)
    torch.testing.assert_close(losses.double(), off.square().flatten(1).mean(1), rtol=1e-5, atol=0)
    losses.sum().backward()
    assert gradients(net).norm() > 0


def test_per_chunk_spreads_a_value_over_its_frames() -> None:
    assert per_chunk(torch.tensor([[1, 2, 3], [4, 5, 6]]), PATTERN).tolist() == [[1, 2, 2, 2, 3, 3], [4, 5, 5, 5, 6, 6]]


@contextmanager
def masked_attention(net: WanTransformer):
    """Attention over all tokens with a boolean mask: chunk b sees chunks 0 to b."""
    chunk = torch.arange(len(PATTERN)).repeat_interleave(torch.tensor(PATTERN) * TOKENS)
    mask = chunk[:, None] >= chunk[None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor, _: object) -> Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
        )
        return found.transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch:
        for block in net.blocks:
            patch.setattr(block.attn1, "_attend", attend)
        yield


def test_regression_is_the_masked_prediction_of_the_trajectorys_end() -> None:
    """The past of a state is as noisy as the state: the chunk-causal forward at one level, here with a dense mask."""
    net, text = tiny_causal(), texts()
    states = torch.stack([latents(FRAMES, name) for name in range(4)], dim=1)
    x0, levels = latents(FRAMES, 9), torch.tensor([2, 0])
    losses = regression_losses(net, states, x0, levels, FEW_STEPS, text, PATTERN)
    losses.sum().backward()
    found = gradients(net)

    sigma = torch.tensor([5 / 6, 1.0], dtype=torch.float64).view(-1, 1, 1, 1, 1)  # of steps 2 and 0
    x = torch.stack((states[0, 2], states[1, 0]))
    with masked_attention(net):
        velocity = net(x, 1000 * sigma.flatten().float(), text)
        expected = (x - sigma * velocity - x0).square().flatten(1).mean(1)
        expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    wanted = gradients(net)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
def test_regression_sees_no_later_chunk() -> None:
    net, text, x0 = tiny_causal(), texts(), latents(FRAMES, 9)
    states, levels = latents(FRAMES)[:, None], torch.tensor([0, 0])
    touched = states.clone()
    touched[:, :, :, 4:] += 1  # the last chunk
    before, after = (
        net(x[:, 0], torch.full((2,), 1000.0), text, layout=chunk_causal(PATTERN)) for x in (states, touched)
    )
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    one, other = (regression_losses(net, x, x0, levels, FEW_STEPS, text, PATTERN) for x in (states, touched))

    def part(x, v):  # sigma is 1
        return (x[:, 0] - v - x0).square().flatten(1).mean(1)

    torch.testing.assert_close(one - other, (part(states, before) - part(touched, after)).float(), rtol=1e-4, atol=0)


# --- consistency, where the flow is known: x0 ~ N(m, s^2), element by element ---


def deviation(sigma: Tensor) -> Tensor:
    """Of x_sigma."""
    return (((1 - sigma) * DEVIATION) ** 2 + sigma**2).sqrt()


def flow(x: Tensor, timestep: Tensor) -> Tensor:
    """The exact velocity, E[noise - x0 | x]."""
    sigma = (timestep.double() / 1000)[:, None, :, None, None]
    x0 = MEAN + (1 - sigma) * DEVIATION**2 / deviation(sigma) ** 2 * (x.double() - (1 - sigma) * MEAN)
    return (x.double() - x0) / sigma


def jump(x: Tensor, timestep: Tensor) -> Tensor:
    """The velocity whose prediction is the end of the flow's path: x0 = m + s (x - (1 - sigma) m) / deviation."""
    sigma = (timestep.double() / 1000)[:, None, :, None, None]
    x0 = MEAN + DEVIATION * (x.double() - (1 - sigma) * MEAN) / deviation(sigma)
    return torch.where(sigma > 0, (x.double() - x0) / sigma, 0.0)


def level_grid(count: int) -> Grid:
    return FlowSchedule("euler", 3.0).few_step([1000 * (1 - k / count) for k in range(count)])


def clip(batch: int = 4) -> tuple[Tensor, Tensor]:
    return MEAN + DEVIATION * latents(2, 5, batch), latents(2, 6, batch)


def test_at_the_last_level_the_goal_is_the_end_of_the_teachers_euler_step() -> None:
    """The step ends at sigma 0, where whatever the target says has no weight."""
    (x0, noise), grid = clip(), level_grid(8)
    levels = torch.full((4, 2), 7)
    sigma = grid.sigmas[7].item()
    x = (1 - sigma) * x0 + sigma * noise
    told = torch.full((4, 2), 1000 * sigma, dtype=torch.float64)
    student, noisy_target = (lambda x, _: 0.3 * x), (lambda x, _: torch.full_like(x, 1e9))
    losses = consistency_losses(student, noisy_target, flow, x0, noise, levels, grid)
    expected = (sigma * (flow(x, told) - 0.3 * x)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)


def test_the_goal_of_each_frame_follows_its_own_level() -> None:
    """Against the formula, with levels that differ among samples and frames."""
    (x0, noise), grid = clip(), level_grid(8)
    levels = torch.tensor([[0, 3], [6, 2], [5, 5], [1, 0]])
    seen = []

    def watched(name: str, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            seen.append((name, timestep))
            return scale * torch.cos(x)

        return velocity

    losses = consistency_losses(
        watched("student", 0.5), watched("target", 0.4), watched("teacher", -0.8), x0, noise, levels, grid
    )
    now, following = (grid.sigmas[levels + ahead][:, None, :, None, None] for ahead in (0, 1))
    x = (1 - now) * x0 + now * noise
    after = x + (following - now) * -0.8 * torch.cos(x)
    goal = after - following * 0.4 * torch.cos(after)
    expected = (x - now * 0.5 * torch.cos(x) - goal).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-9)
    for name, told in seen:
        torch.testing.assert_close(told.double(), 1000 * grid.sigmas[levels + (name == "target")], rtol=1e-6, atol=0)


def euler_error(sigma: Tensor, following: Tensor) -> Tensor:
    """What one Euler step of the Gaussian's flow costs a consistent student. About the mean the flow is linear,
    dx/dsigma = a x with a = (sigma - (1 - sigma) s^2) / deviation^2, and x0 = s x / deviation."""
    a = (sigma - (1 - sigma) * DEVIATION**2) / deviation(sigma) ** 2
    return (DEVIATION * (1 - deviation(sigma) / deviation(following) * (1 + (following - sigma) * a))) ** 2


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_a_student_that_is_consistent_is_left_with_the_euler_steps_error(place: float) -> None:
    """In closed form, within 10 %; it falls with the fourth power of the step, 256-fold here in the limit. One that
    says the flow's velocity instead of the jump to its end keeps a loss of the second power, 16-fold."""
    (x0, noise), costs = clip(64), []
    for count in (8, 16, 32):
        grid, level = level_grid(count), int(place * count)
        losses = [
            consistency_losses(student, student, flow, x0, noise, torch.full((64, 2), level), grid).mean().item()
            for student in (jump, flow)
        ]
        costs.append(losses)
        assert losses[0] == pytest.approx(euler_error(*grid.sigmas[level : level + 2]).item(), rel=0.1)
    (jump_coarse, flow_coarse), _, (jump_fine, flow_fine) = costs
    assert jump_coarse / jump_fine > 100 > flow_coarse / flow_fine and flow_fine > 30 * jump_fine


def test_the_gradient_goes_through_the_students_prediction_alone() -> None:
    """Target and teacher, though they could learn, get none; the student's is that of a distance to a number."""
    (x0, noise), grid, levels = clip(), level_grid(8), torch.full((4, 2), 3)
    scales = {name: torch.tensor(0.4, dtype=torch.float64, requires_grad=True) for name in ("s", "target", "teacher")}

    def velocity(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, _: scales[name] * torch.cos(x)

    losses = consistency_losses(*map(velocity, scales), x0, noise, levels, grid)
    losses.sum().backward()
    assert scales["target"].grad is None and scales["teacher"].grad is None
    sigma = grid.sigmas[3].item()
    x = (1 - sigma) * x0 + sigma * noise
    after = x + (grid.sigmas[4].item() - sigma) * 0.4 * torch.cos(x)
    goal = after - grid.sigmas[4].item() * 0.4 * torch.cos(after)
    slope = 2 * (x - sigma * 0.4 * torch.cos(x) - goal) * -sigma * torch.cos(x)
    assert scales["s"].grad.item() == pytest.approx(slope.flatten(1).mean(1).sum().item(), rel=1e-4)


# --- the task ---


class Clips:
    """Eight clips in memory."""

    negative = texts(9, torch.float32)[-1]

    def __len__(self) -> int:
        return 8

    def batch(self, indexes: Sequence[int], step: int, slots: range, device: torch.device) -> Batch:
        x0 = latents(FRAMES, 40, 8, torch.float32)[list(indexes)]
        states = torch.stack([latents(FRAMES, 50 + k, 8, torch.float32)[list(indexes)] for k in range(4)], dim=1)
        return Batch(x0, texts(8, torch.float32)[list(indexes)], states)


def init_task(net: WanTransformer, ema: Ema | None, method: str, precision: str = "fp32", rows: int = 2) -> InitTask:
    average, teacher = ema.applied if ema else nullcontext, tiny_causal(4, torch.float32).requires_grad_(False)
    config = CausalInitConfig(method, levels=6)
    train = LoopConfig(batch_size=4, micro_batch_size=rows, precision=precision, seed=9)
    return InitTask(net, average, teacher, Clips(), config, SCHEDULE, FEW_STEPS, PATTERN, train)


def backward(task: InitTask, step: int = 0) -> tuple[float, Tensor]:
    total = 0.0
    for loss in task.losses(step):
        loss.backward()
        total += loss.item()
    return total, gradients(task.student)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_goal_comes_from_the_average_and_leaves_the_student_alone(precision: str, checkpointing: bool) -> None:
    """Bit for bit what two separate models give, one with the average's weights: autocast, which remembers casts of
    weights, confuses neither the goal nor the student's forward and gradient."""
    net, mean = tiny_causal(1, torch.float32), tiny_causal(1, torch.float32)
    net.gradient_checkpointing = checkpointing
    ema = Ema(dict(net.named_parameters()), 0.9)
    shake(mean, 0.1, seed=8)
    for name, parameter in mean.named_parameters():
        ema.shadow[name].copy_(parameter.detach())
    live = [parameter.detach().clone() for parameter in net.parameters()]
    task = init_task(net, ema, "consistency", precision)
    loss, gradient = backward(task)

    apart = init_task(net, None, "consistency", precision)

    def half(model):
        return lambda *a, **k: run_half(precision, model, *a, **k)

    total = 0.0
    for start in (0, 2):
        slots = range(start, start + 2)
        batch = apart.source.batch(apart._indexes(0, slots), 0, slots, CPU)
        levels = per_chunk(draw_levels("cd_level", 9, 0, slots, 3, 6), PATTERN)
        student, target, cond, uncond = (
            packed(half(model), batch.x0, text, PATTERN)
            for model, text in (
                (net, batch.text),
                (mean, batch.text),
                (apart.teacher, batch.text),
                (apart.teacher, Clips.negative.expand_as(batch.text)),
            )
        )

        def guided(x: Tensor, told: Tensor, cond=cond, uncond=uncond) -> Tensor:
            away = uncond(x, told).float()
            return away + 3.0 * (cond(x, told).float() - away)

        noise, grid = apart._noise(0, slots, batch), SCHEDULE.few_step([1000 * (1 - k / 6) for k in range(6)])
        part = consistency_losses(student, target, guided, batch.x0, noise, levels, grid).sum() / 4
        part.backward()
        total += part.item()
    assert loss == total and torch.equal(gradient, gradients(net))
    assert all(torch.equal(old, new) for old, new in zip(live, net.parameters(), strict=True))
    own_goal, _ = backward(apart)
    assert abs(own_goal - loss) > 1e-3 * loss


def run_half(precision: str, model: WanTransformer, *arguments: Tensor, **options: object) -> Tensor:
    with half_precision(CPU, precision == "bf16"):
        return model(*arguments, **options)


@pytest.mark.parametrize("method", ["ode", "consistency", "teacher_forcing"])
def test_a_loss_does_not_depend_on_the_micro_batch(method: str) -> None:
    net = tiny_causal(1, torch.float32)
    (whole, gradient), (split, same) = (backward(init_task(net, None, method, rows=rows), 3) for rows in (4, 1))
    assert split == pytest.approx(whole, rel=1e-5) and gradient.norm() > 0
    assert (same - gradient).norm() < 1e-4 * gradient.norm()


def test_clips_come_once_each_before_any_comes_again() -> None:
    task = init_task(tiny_causal(1, torch.float32), None, "ode")
    order = [index for step in range(4) for index in task._indexes(step, range(4))]
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and order[:8] != order[8:]


def test_levels_cover_all_and_belong_to_the_slot() -> None:
    levels = draw_levels("cd_level", 1, 0, range(2000), 3, 5)
    assert levels.shape == (2000, 3) and levels.dtype == torch.int64
    counts = torch.stack([(levels == k).sum(0) for k in range(5)]).double()
    assert (counts - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5
    assert torch.equal(draw_levels("cd_level", 1, 0, range(7, 9), 3, 5), levels[7:9])
    assert not torch.equal(draw_levels("cd_level", 1, 1, range(9), 3, 5), levels[:9])


def test_too_few_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"causal_init.levels is 1"):
        CausalInitConfig("consistency", levels=1)
