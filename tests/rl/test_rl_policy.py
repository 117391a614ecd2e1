"""The policy's two paths: guidance, precision, adapters, reference; and what names a training path."""

import pytest
import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters, merge
from reelforge.engine.rl.policy import PathConfig
from reelforge.kernels import dispatch

PROMPTS = (3, 0, 6)
T = torch.tensor([900.0, 500.0, 20.0])


def states(shape: tuple[int, ...], count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return rng.normal(range(count), shape).to(dtype)


def guided(scale: float, **others: object) -> PathConfig:
    return PathConfig(scale, sample_precision="fp32", **others)


def adapted(model):
    inject(model, LoraConfig(rank=2, alpha=4.0), seed=1)
    for name, parameter in lora_parameters(model):
        parameter.data = 0.2 * rng.normal([rng.key(name)], parameter.shape)[0]
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 4.5, 0.0])
def test_both_paths_are_the_guided_velocity_of_two_forwards(parts, tiny, scale: float) -> None:
    model, x, text = tiny(0, torch.float64), states(parts.shape, dtype=torch.float64), parts.text
    policy = parts.policy(model, guided(scale))
    policy.prepare(PROMPTS)
    with torch.no_grad():
        v_cond = model(x, T, text[list(PROMPTS)])
        v_uncond = model(x, T, text[-1:].expand(3, -1, -1))
    expected = v_uncond + scale * (v_cond - v_uncond)
    for found in (policy.sample(x, T, PROMPTS), policy.detached_train(x, T, PROMPTS), policy.train(x, T, PROMPTS)):
        close(found.detach(), expected)
    assert policy.branches == (1 if scale == 1.0 else 2)
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    policy.sample(x, T, PROMPTS)
    policy.train(x, T, PROMPTS)
    assert calls == [3 * policy.branches] * 2, "one forward"


def test_the_prompts_of_an_iteration_may_repeat_and_come_in_any_order(parts, tiny) -> None:
    policy, x = parts.policy(tiny(0, torch.float64), guided(3.0)), states(parts.shape, 4, torch.float64)
    policy.prepare([6, 3, 3, 0])
    t = torch.full((4,), 500.0)
    once = [policy.sample(x[i : i + 1], t[:1], [p]) for i, p in enumerate((0, 6, 6, 3))]
    close(policy.sample(x, t, (0, 6, 6, 3)), torch.cat(once))
    policy.prepare([1])
    with pytest.raises(KeyError):
        policy.sample(x[:1], t[:1], [6])


def test_gradients_leave_out_the_unconditional_branch_when_told(parts, tiny) -> None:
    """Then they are those of w v_cond alone; the velocity is the same."""
    x, text = states(parts.shape), parts.text
    found = {}
    for through in (True, False):
        model = tiny()
        policy = parts.policy(model, guided(3.0, gradient_through_uncond=through))
        policy.prepare(PROMPTS)
        velocity = policy.train(x, T, PROMPTS)
        velocity.square().sum().backward()
        found[through] = velocity.detach(), model.blocks[0].ffn.net[2].weight.grad
    assert torch.equal(found[True][0], found[False][0])
    model = tiny()
    (2 * velocity.detach() * 3.0 * model(x, T, text[list(PROMPTS)])).sum().backward()
    expected = model.blocks[0].ffn.net[2].weight.grad
    assert (found[False][1] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[True][1] - expected).abs().max() > 0.1 * expected.abs().max()


def test_the_rollout_records_no_gradient_and_training_does(parts) -> None:
    policy, x = parts.policy(), states(parts.shape)
    policy.prepare(PROMPTS)
    assert policy.train(x, T, PROMPTS).requires_grad
    with torch.no_grad():
        detached = policy.detached_train(x, T, PROMPTS)
    assert not detached.requires_grad and not policy.sample(x, T, PROMPTS).requires_grad
    assert torch.equal(detached, policy.train(x, T, PROMPTS).detach())


def test_precision_of_each_path(parts, tiny) -> None:
    """bf16 is autocast around fp32 weights; fp64 and bf16 weights compute in their own type."""
    x = states(parts.shape)
    for precision, sample in (("bf16", "fp32"), ("fp32", "bf16")):
        policy = parts.policy(path=PathConfig(sample_precision=sample), precision=precision)
        policy.prepare(PROMPTS)
        types = policy.detached_train(x, T, PROMPTS).dtype, policy.sample(x, T, PROMPTS).dtype
        assert types == tuple(torch.bfloat16 if p == "bf16" else torch.float32 for p in (precision, sample))
        assert policy.path(3).autocast == (torch.bfloat16 if precision == "bf16" else None)
    for dtype in (torch.float64, torch.bfloat16):
        policy = parts.policy(tiny(0, dtype), precision="bf16")
        policy.prepare(PROMPTS)
        assert policy.train(x, T, PROMPTS).dtype == policy.sample(x, T, PROMPTS).dtype == dtype
        assert policy.path(3).autocast is None


def test_an_outer_autocast_does_not_leak_in(parts) -> None:
    policy, x = parts.policy(), states(parts.shape)
    policy.prepare(PROMPTS)
    expected = policy.sample(x, T, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy.sample(x, T, PROMPTS), expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_reference_is_what_training_started_from(parts, tiny, scale: float) -> None:
    """A frozen copy, or the model without its adapters; adapters are on again afterwards."""
    x = states(parts.shape)
    plain = parts.policy(tiny(), guided(scale))
    plain.prepare(PROMPTS)
    expected = plain.detached_train(x, T, PROMPTS)
    moved = tiny()
    moved.proj_out.weight.data += 0.1
    with_copy = parts.policy(moved, guided(scale), reference=tiny().requires_grad_(False))
    with_adapters = parts.policy(adapted(tiny()), guided(scale))
    for policy in (with_copy, with_adapters):
        policy.prepare(PROMPTS)
        now = policy.detached_train(x, T, PROMPTS)
        found = policy.reference(x, T, PROMPTS)
        assert torch.equal(found, expected) and not found.requires_grad
        assert not torch.equal(now, expected)
        assert torch.equal(policy.detached_train(x, T, PROMPTS), now)
    with pytest.raises(ConfigError, match="KL term needs the model"):
        plain.reference(x, T, PROMPTS)


def test_a_path_is_named_by_all_that_decides_its_bits(parts, tiny) -> None:
    policy = parts.policy(tiny(), guided(2.0))
    path = policy.path(3)
    assert path == policy.path(3) and path != policy.path(2)
    assert (path.rows, path.dtype, path.autocast, path.adapters) == (6, torch.float32, None, 0)
    with dispatch.pinned("attention", "torch"):
        assert policy.path(3).kernels == (*path.kernels, ("attention", "torch")) != path.kernels
    policy.model.eval()
    assert policy.path(3) != path
    policy.model.train()
    model = adapted(tiny())
    with_adapters = parts.policy(model, guided(2.0))
    assert with_adapters.path(3).adapters == 2 * 10
    merge(model)
    assert with_adapters.path(3) == path
