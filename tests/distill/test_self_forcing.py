"""Rollouts and replays: what inference would sample, the joint graph's gradient, and no gradient into the past."""

import pytest
import torch
from tiny_causal import FEW_STEPS, SIZE, TOKENS, gradients, latents, texts, tiny_causal
from torch import Tensor

from reelforge.engine.distill.self_forcing import Rollout, exit_steps, replay, roll_out
from reelforge.engine.flow.sampler import predict_x0, timesteps
from reelforge.engine.model.generation import (
    CLEAN,
    ChunkDecoder,
    Guidance,
    Renoise,
    frames_of,
    half_precision,
    sample_chunks,
)
from reelforge.engine.model.kv_cache import ChunkPass, ContextConfig, KVCache
from reelforge.engine.model.wan import WanTransformer

CPU = torch.device("cpu")
LAST = FEW_STEPS.num_steps - 1


def decoder(net: WanTransformer, text: Tensor, frames: int) -> ChunkDecoder:
    return ChunkDecoder(net, Guidance(text, text[:0], 1.0), 3, frames, SIZE)


def renoise(frames: int, dtype: torch.dtype = torch.float64) -> Renoise:
    """Fresh noise after each step."""
    return lambda k: latents(frames, 20 + k, dtype=dtype)


def rolled(net: WanTransformer, text: Tensor, pattern: tuple[int, ...], exits: tuple[int, ...], **options) -> Rollout:
    frames, dtype = sum(pattern), text.dtype
    fresh = renoise(frames, dtype)
    return roll_out(
        decoder(net, text, 2 * frames), latents(frames, dtype=dtype), FEW_STEPS, fresh, pattern, exits, **options
    )


def joint(net: WanTransformer, text: Tensor, pattern: tuple[int, ...], exits: tuple[int, ...], noisy: float) -> Tensor:
    """The samples as one graph: every exit step with gradient, keys and values detached as they are written."""
    frames, noise = sum(pattern), latents(sum(pattern))
    fresh, cache, context = renoise(frames), net.new_cache(2, max(pattern), frames, *SIZE), net.text_context(text)
    sigmas = [1.0, 15 / 16, 5 / 6, 5 / 8]
    parts, start = [], 0
    for size, last in zip(pattern, exits, strict=True):
        span = slice(start, start + size)
        x, start = noise[:, :, span], start + size
        for k in range(last + 1):
            with torch.set_grad_enabled(k == last):
                told = torch.full((2,), 1000 * sigmas[k])
                x0 = x - sigmas[k] * net(x, told, context, chunk=cache.denoising(size, size * TOKENS))
            if k < last:
                x = (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * fresh(k)[:, :, span]
        parts.append(x0)
        with torch.no_grad():
            kept, clean = (1 - noisy) * x0 + noisy * fresh(LAST)[:, :, span], cache.clean(size, size * TOKENS)
            net(kept, torch.full((2,), 1000 * noisy), context, chunk=clean)
            cache.commit(clean)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("noisy", [0.0, 0.15])
@pytest.mark.parametrize(
    ("pattern", "exits"),
    [((1, 1, 1), (0, 2, 3)), ((2, 3), (3, 1)), ((2, 3), (0, 0)), ((3, 1, 2), (2, 3, 0)), ((3,), (2,))],
    ids=str,
)
def test_replayed_gradient_is_that_of_the_joint_graph(
    pattern: tuple[int, ...], exits: tuple[int, ...], noisy: float, checkpointing: bool
) -> None:
    net, text, weights = tiny_causal(), texts(), latents(sum(pattern), 1)
    samples = joint(net, text, pattern, exits, noisy)
    (samples * weights).sum().backward()
    expected = gradients(net)

    net.gradient_checkpointing = checkpointing
    rollout = rolled(net, text, pattern, exits, context=ContextConfig(noise=noisy))
    torch.testing.assert_close(rollout.x0, samples.detach(), rtol=0, atol=1e-12)
    for state in rollout.exits:
        again = replay(net, rollout, state, text, FEW_STEPS)
        torch.testing.assert_close(again.detach(), rollout.x0[:, :, state.frames], rtol=0, atol=1e-12)
        (again * weights[:, :, state.frames]).sum().backward()
    assert (gradients(net) - expected).norm() < 1e-12 * expected.norm()


def test_a_replay_neither_needs_nor_disturbs_the_order() -> None:
    """Chunks can be replayed backwards, and one of them again after others."""
    net, text, pattern = tiny_causal(), texts(), (1, 2, 2)
    rollout = rolled(net, text, pattern, (1, 0, 3))
    keys = rollout.cache.keys[:, :, rollout.cache.scratch_tokens :].clone()
    for number in (2, 0, 1, 2):
        state = rollout.exits[number]
        again = replay(net, rollout, state, text, FEW_STEPS)
        again.sum().backward()
        assert torch.equal(again, rollout.x0[:, :, state.frames])
    assert torch.equal(rollout.cache.keys[:, :, rollout.cache.scratch_tokens :], keys)
    assert len(rollout.cache.slots) == 2 and not rollout.cache.keys.requires_grad


class PublicCache(KVCache):
    """As several public trainers keep it: a chunk's noisy keys go to its final place, undetached."""

    def denoising(self, frames: int, tokens: int) -> ChunkPass:
        final = super().clean(frames, tokens)
        return PublicPass(self, final.slot, final.write_start, final.read)


class PublicPass(ChunkPass):
    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for slot, new in zip(self.own(layer), (key, value), strict=True):
            slot.copy_(new)
        return self.visible(layer)


def inputs_gradients(net: WanTransformer, text: Tensor, cache: KVCache) -> list[float]:
    """How far a loss on the last of three chunks reaches: the size of its gradient for each chunk's input."""
    states = [latents(1, 30 + number).requires_grad_() for number in range(3)]
    for number, x in enumerate(states):
        x0 = predict_x0(x, net(x, timesteps(FEW_STEPS, 1, x), text, chunk=cache.denoising(1, TOKENS)), FEW_STEPS, 1)
        if number < 2:
            clean = cache.clean(1, TOKENS)
            with torch.no_grad():
                net(x0, torch.zeros(2), text, chunk=clean)
            cache.commit(clean)
    found = torch.autograd.grad(x0.square().sum(), states, allow_unused=True)
    return [0.0 if gradient is None else gradient.norm().item() for gradient in found]


def cache_like(net: WanTransformer, kind: type[KVCache]) -> KVCache:
    config = net.config
    sizes = (config.num_layers, 2, TOKENS, 3 * TOKENS, config.num_attention_heads, config.attention_head_dim)
    return kind(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_loss_on_the_last_chunk_does_not_reach_the_earlier_ones_inputs(checkpointing: bool) -> None:
    """Exactly 0 here. Keys written in place without detaching do leak, up to a quarter of the last chunk's own in this
    model, and nothing warns: the clean pass overwrites their numbers, not their graph."""
    net, text = tiny_causal(), texts()
    net.gradient_checkpointing = checkpointing
    first, second, last = inputs_gradients(net, text, cache_like(net, KVCache))
    assert first == second == 0.0 and last > 1.0
    first, second, same = inputs_gradients(net, text, cache_like(net, PublicCache))
    assert first > 0.1 * last and second > 0.1 * last and same == pytest.approx(last)


def test_not_even_a_clean_pass_with_gradient_leaks() -> None:
    """Detaching happens where keys are written, whoever writes them."""
    net, text, cache = tiny_causal(), texts(), cache_like(tiny_causal(), KVCache)
    x, clean = latents(1).requires_grad_(), cache.clean(1, TOKENS)
    net(x, torch.zeros(2), text, chunk=clean)
    cache.commit(clean)
    later = net(latents(1, 1), torch.full((2,), 500.0), text, chunk=cache.denoising(1, TOKENS))
    assert later.requires_grad and torch.autograd.grad(later.sum(), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pattern", [(1, 1, 1), (2, 3), (3,)], ids=str)
def test_a_rollout_of_all_steps_is_what_generate_samples(pattern: tuple[int, ...], half: bool) -> None:
    net, text, frames = tiny_causal(dtype=torch.float32), texts(dtype=torch.float32), sum(pattern)
    exits = tuple(exit_steps("last", 0, 5, len(pattern), FEW_STEPS.num_steps))
    noise, fresh = latents(frames, dtype=torch.float32), renoise(frames, torch.float32)
    with half_precision(CPU, half):
        sampled = sample_chunks(net, Guidance(text, text[:0], 1.0), noise, FEW_STEPS, pattern, fresh)
        rollout = rolled(net, text, pattern, exits)
    assert rollout.x0.dtype == torch.float32 and torch.equal(rollout.x0, sampled)
    assert [state.step for state in rollout.exits] == [LAST] * len(pattern)


def test_an_early_exit_is_the_prediction_of_that_step() -> None:
    """The sample of a chunk that leaves at step k is the sampler's prediction of x0 there."""
    net, text = tiny_causal(), texts()
    seen = []

    def watch(module, arguments, output):
        x, told = arguments[:2]
        seen.append(x - told[0].item() / 1000 * output)

    watching = net.register_forward_hook(watch)
    sample_chunks(net, Guidance(text, text[:0], 1.0), latents(2), FEW_STEPS, (2,), renoise(2))
    watching.remove()
    for step, expected in enumerate(seen):
        torch.testing.assert_close(rolled(net, text, (2,), (step,)).x0, expected, rtol=0, atol=1e-6)
    assert len(seen) == 4


@pytest.mark.parametrize("context", [CLEAN, ContextConfig(noise=0.15), ContextConfig("last_step")], ids=str)
def test_a_rollout_that_goes_on_is_one_of_twice_the_length(context: ContextConfig) -> None:
    net, text, pattern, exits = tiny_causal(), texts(), (1, 2), (2, 1)
    whole = decoder(net, text, 6)
    long = roll_out(whole, latents(6), FEW_STEPS, renoise(6), pattern * 2, exits * 2, context)
    growing = decoder(net, text, 6)
    halves = [
        roll_out(
            growing, latents(6)[:, :, half], FEW_STEPS, frames_of(renoise(6), half), pattern, exits, context, goes_on
        )
        for half, goes_on in ((slice(0, 3), True), (slice(3, 6), False))
    ]
    assert torch.equal(torch.cat([half.x0 for half in halves], dim=2), long.x0)
    assert [state.chunks_before for state in halves[1].exits] == [2, 3]
    for state, same in zip(halves[1].exits, long.exits[2:], strict=True):
        assert state.frames == slice(same.frames.start - 3, same.frames.stop - 3) and torch.equal(state.x, same.x)
        assert torch.equal(replay(net, halves[1], state, text, FEW_STEPS), replay(net, long, same, text, FEW_STEPS))


def test_context_noise_changes_what_later_chunks_see_and_nothing_else() -> None:
    net, text = tiny_causal(), texts()
    clean, noisy = (rolled(net, text, (1, 1), (1, 1), context=ContextConfig(noise=sigma)) for sigma in (0.0, 0.15))
    assert torch.equal(clean.x0[:, :, :1], noisy.x0[:, :, :1])
    assert (clean.x0 - noisy.x0)[:, :, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("policy", ["random", "cycle", "per_chunk", "last"])
def test_exit_steps_depend_on_seed_and_number_alone(policy) -> None:
    table = [exit_steps(policy, 7, number, 5, 4) for number in range(300)]
    assert table == [exit_steps(policy, 7, number, 5, 4) for number in range(300)]
    assert all(len(row) == 5 and set(row) <= {0, 1, 2, 3} for row in table)
    if policy in ("random", "per_chunk"):
        assert table != [exit_steps(policy, 8, number, 5, 4) for number in range(300)]
    synchronised = all(len(set(row)) == 1 for row in table)
    assert synchronised == (policy != "per_chunk")


@pytest.mark.parametrize("policy", ["random", "cycle", "per_chunk"])
def test_every_chunk_leaves_at_every_step_equally_often(policy) -> None:
    """Within 5 standard deviations of 3,000 draws; ``cycle`` exactly, in order."""
    table = torch.tensor([exit_steps(policy, 7, number, 3, 4) for number in range(3000)])
    counts = torch.stack([(table == step).sum(0) for step in range(4)]).double()
    assert (counts - 750).abs().max() <= (0 if policy == "cycle" else 5 * (3000 * 3 / 16) ** 0.5)
    if policy == "cycle":
        assert table[:, 0].tolist() == [0, 1, 2, 3] * 750
    if policy == "per_chunk":
        assert torch.corrcoef(table.T.double()).triu(1).abs().max() < 5 / 3000**0.5
