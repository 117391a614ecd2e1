"""Chunk-causal, packed and cached forwards of one set of weights agree, and none of them sees the future."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_causal import TINY_CAUSAL as CONFIG

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.kv_cache import KVCache
from reelforge.engine.model.layout import bidirectional, chunk_causal, chunk_pattern, packed_teacher_forcing
from reelforge.engine.model.wan import WanTransformer

PATTERNS = [(3, 3, 3), (1, 1, 1, 1), (1, 4), (1, 3, 3), (2,), (4, 1, 2)]


def model() -> WanTransformer:
    built = WanTransformer.from_config(CONFIG, seed=1).double().eval()
    for index, parameter in enumerate(built.parameters()):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2
    return built


def video(frames: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, frames, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEXT = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SIGMA_T = torch.tensor([800.0, 130.0], dtype=torch.float64)


def rollout(net: WanTransformer, clean: torch.Tensor, noisy: torch.Tensor, pattern: tuple[int, ...]) -> torch.Tensor:
    """Velocities of the noisy chunks, decoded chunk by chunk with the clean chunks as cached context."""
    cache = net.new_cache(len(clean), max(pattern), sum(pattern), *clean.shape[-2:])
    context, outputs, start = net.text_context(TEXT), [], 0
    for frames in pattern:
        part = slice(start, start + frames)
        tokens = frames * 2 * 3
        outputs.append(net(noisy[:, :, part], SIGMA_T, context, chunk=cache.denoising(frames, tokens)))
        chunk = cache.clean(frames, tokens)
        net(clean[:, :, part], torch.zeros(2), context, chunk=chunk)
        cache.commit(chunk)
        start += frames
    return torch.cat(outputs, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masked_forward_equals_cached_forward(pattern: tuple[int, ...]) -> None:
    """With the same latents as context and query, decoding chunk by chunk is the chunk-causal forward."""
    net, x = model(), video(sum(pattern))
    masked = net(x, torch.zeros(2), TEXT, layout=chunk_causal(pattern))
    cache = net.new_cache(2, max(pattern), sum(pattern), 4, 6)
    parts, start = [], 0
    for frames in pattern:
        chunk = cache.clean(frames, frames * 6)
        parts.append(net(x[:, :, start : start + frames], torch.zeros(2), TEXT, chunk=chunk))
        cache.commit(chunk)
        start += frames
    torch.testing.assert_close(torch.cat(parts, dim=2), masked, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_teacher_forcing_equals_cached_rollout(pattern: tuple[int, ...]) -> None:
    net, frames = model(), sum(pattern)
    clean, noisy = video(frames, seed=1), video(frames, seed=2)
    timestep = torch.cat((torch.zeros(2, frames), SIGMA_T[:, None].expand(-1, frames)), dim=1)
    packed = net(torch.cat((clean, noisy), dim=2), timestep, TEXT, layout=packed_teacher_forcing(pattern))
    torch.testing.assert_close(packed[:, :, frames:], rollout(net, clean, noisy, pattern), atol=1e-12, rtol=0)


@torch.no_grad()
def test_masked_forward_equals_dense_attention_with_a_mask() -> None:
    """The rectangles against the textbook form: full scores and a boolean mask."""
    pattern = (1, 2, 2)
    net, x = model(), video(5)
    chunk_of = torch.repeat_interleave(torch.arange(3), torch.tensor(pattern) * 6)
    mask = chunk_of[:, None] >= chunk_of[None, :]
    original = net.blocks[0].attn1._attend
    try:
        for block in net.blocks:
            block.attn1._attend = lambda q, k, v, _: torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
            ).transpose(1, 2)
        expected = net(x, SIGMA_T, TEXT)
    finally:
        for block in net.blocks:
            block.attn1._attend = original
    torch.testing.assert_close(net(x, SIGMA_T, TEXT, layout=chunk_causal(pattern)), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_one_chunk_is_bidirectional() -> None:
    net, x = model(), video(4)
    expected = net(x, SIGMA_T, TEXT)
    assert torch.equal(net(x, SIGMA_T, TEXT, layout=chunk_causal((4,))), expected)
    assert torch.equal(net(x, SIGMA_T, TEXT, layout=bidirectional(4)), expected)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (2, 2), (1, 3)], ids=str)
def test_causality(pattern: tuple[int, ...]) -> None:
    """Perturbing a chunk leaves every earlier chunk bitwise alone and moves its own and the later ones."""
    net, frames = model(), sum(pattern)
    x = video(frames)
    base = net(x, SIGMA_T, TEXT, layout=chunk_causal(pattern))
    start = 0
    for size in pattern:
        touched = x.clone()
        touched[:, :, start : start + size] += 1
        moved = (net(touched, SIGMA_T, TEXT, layout=chunk_causal(pattern)) - base).abs().amax((0, 1, 3, 4))
        assert torch.all(moved[:start] == 0)
        assert torch.all(moved[start:] > 0)
        start += size


@torch.no_grad()
def test_an_aborted_chunk_changes_nothing() -> None:
    net, pattern = model(), (2, 2)
    clean, noisy = video(4, seed=1), video(4, seed=2)
    expected = rollout(net, clean, noisy, pattern)
    cache = net.new_cache(2, 2, 4, 4, 6)
    first = cache.clean(2, 12)
    net(clean[:, :, :2], torch.zeros(2), TEXT, chunk=first)
    cache.commit(first)
    net(video(2, seed=9), SIGMA_T, TEXT, chunk=cache.denoising(2, 12))
    net(video(2, seed=9), SIGMA_T, TEXT, chunk=cache.clean(2, 12))  # never committed
    again = net(noisy[:, :, 2:], SIGMA_T, TEXT, chunk=cache.denoising(2, 12))
    torch.testing.assert_close(again, expected[:, :, 2:], atol=1e-12, rtol=0)


def test_gradient_through_a_frozen_cache_stays_in_its_chunk() -> None:
    """With gradients, the past is a constant: committed slots stay as they are and carry no gradient."""
    net, clean = model(), video(4, seed=1)
    cache = net.new_cache(2, 2, 4, 4, 6)
    with torch.no_grad():
        first = cache.clean(2, 12)
        net(clean[:, :, :2], torch.zeros(2), TEXT, chunk=first)
        cache.commit(first)
        expected = net(clean[:, :, 2:], SIGMA_T, TEXT, chunk=cache.denoising(2, 12))
    before = cache.keys[:, :, cache.scratch_tokens :].clone()
    x = clean[:, :, 2:].clone().requires_grad_()
    output = net(x, SIGMA_T, TEXT, chunk=cache.denoising(2, 12))
    output.square().sum().backward()
    torch.testing.assert_close(output.detach(), expected, atol=1e-12, rtol=0)
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert torch.equal(cache.keys[:, :, cache.scratch_tokens :], before) and not cache.keys.requires_grad


def test_partly_trained_projections_survive_later_writes() -> None:
    """Only queries learn, as with an adapter on them: keys need no gradient, yet backward finds its own values."""
    net, clean = model().requires_grad_(False), video(4, seed=1)
    for block in net.blocks:
        block.attn1.to_q.requires_grad_(True)
    cache = net.new_cache(2, 2, 4, 4, 6)
    first = cache.clean(2, 12)
    loss = net(clean[:, :, :2], torch.zeros(2), TEXT, chunk=first).square().sum()
    cache.commit(first)
    loss = loss + net(clean[:, :, 2:], SIGMA_T, TEXT, chunk=cache.denoising(2, 12)).square().sum()
    with torch.no_grad():
        net(video(2, seed=9), SIGMA_T, TEXT, chunk=cache.denoising(2, 12))
    loss.backward()
    assert all(block.attn1.to_q.weight.grad.abs().sum() > 0 for block in net.blocks)


@settings(max_examples=25, deadline=None)
@given(pattern=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_pattern(pattern: list[int], seed: int) -> None:
    net, frames = model(), sum(pattern)
    clean, noisy = video(frames, seed=seed), video(frames, seed=seed + 100)
    timestep = torch.cat((torch.zeros(2, frames), SIGMA_T[:, None].expand(-1, frames)), dim=1)
    with torch.no_grad():
        layout = packed_teacher_forcing(tuple(pattern))
        packed = net(torch.cat((clean, noisy), dim=2), timestep, TEXT, layout=layout)
        decoded = rollout(net, clean, noisy, tuple(pattern))
    torch.testing.assert_close(packed[:, :, frames:], decoded, atol=1e-12, rtol=0)


def test_chunk_pattern() -> None:
    assert chunk_pattern(21, 3) == (3,) * 7
    assert chunk_pattern(13, 3, first_chunk_frames=1) == (1, 3, 3, 3, 3)
    with pytest.raises(ConfigError, match="20 latent frames.*18 or 21"):
        chunk_pattern(20, 3)
    with pytest.raises(ConfigError, match="21 latent frames.*19 or 22"):
        chunk_pattern(21, 3, first_chunk_frames=1)


def test_layout_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="covers 4 latent frames, the latents have 5"):
        model()(video(5), SIGMA_T, TEXT, layout=chunk_causal((2, 2)))


def test_cache_that_is_too_small_is_refused() -> None:
    cache = KVCache(1, 1, chunk_tokens=6, capacity_tokens=6, num_heads=1, head_dim=2)
    with pytest.raises(ConfigError, match="scratch"):
        cache.denoising(2, 12)
    cache.commit(cache.clean(1, 6))
    with pytest.raises(ConfigError, match="6 are committed"):
        cache.clean(1, 6)
    cache.reset()
    assert cache.next_frame == 0 and cache.clean(1, 6).slot.first_frame == 0
