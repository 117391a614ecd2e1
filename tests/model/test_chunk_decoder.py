"""Videos that grow chunk by chunk: where a chunk goes, what trying one leaves behind, and the cache as it was."""

import pytest
import torch
from tiny_causal import SIZE, TOKENS, latents, shake, texts, tiny_causal

from reelforge.engine.model.generation import ChunkDecoder, Guidance
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.layout import packed_teacher_forcing

TOLD = torch.tensor([800.0, 130.0])


def decoder(net, scale: float = 1.0, frames: int = 5) -> ChunkDecoder:
    return ChunkDecoder(net, Guidance(texts(2), texts(4)[2:], scale), 2, frames, SIZE)


@torch.no_grad()
def test_a_chunk_begins_where_the_last_one_ended() -> None:
    growing = decoder(tiny_causal())
    assert growing.span(2) == slice(0, 2)
    growing.commit(latents(2))
    assert growing.span(1) == slice(2, 3)
    growing.commit(latents(1))
    assert growing.span(2) == slice(3, 5) and [slot.tokens for slot in growing.cache.slots] == [2 * TOKENS, TOKENS]


@torch.no_grad()
def test_a_velocity_sees_the_committed_past_and_leaves_no_trace() -> None:
    """Against the packed forward, and again after other tries."""
    net, past, now = tiny_causal(), latents(2), latents(2, 1)
    growing = decoder(net)
    growing.commit(past)
    committed = growing.cache.keys[:, :, growing.cache.scratch_tokens :].clone()
    told = torch.cat((torch.zeros(2, 4), TOLD[:, None].expand(-1, 4)), dim=1)
    both = torch.cat((past, torch.zeros_like(now), torch.zeros_like(past), now), dim=2)
    expected = net(both, told, texts(2), layout=packed_teacher_forcing((2, 2)))[:, :, 6:]
    first = growing.velocity(2)(now, TOLD)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    growing.velocity(1)(latents(1, 2), TOLD)
    growing.velocity(2)(latents(2, 3), TOLD)
    assert torch.equal(growing.velocity(2)(now, TOLD), first)
    assert torch.equal(growing.cache.keys[:, :, growing.cache.scratch_tokens :], committed)


@torch.no_grad()
def test_guidance_caches_both_prompts_pasts() -> None:
    """v_u + w (v_c - v_u), each with a past of its own under its own prompt."""
    net, past, now = tiny_causal(), latents(2), latents(2, 1)
    guided, alone = decoder(net, 3.0), []
    guided.commit(past)
    for text in (texts(2), texts(4)[2:]):
        one = ChunkDecoder(net, Guidance(text, text[:0], 1.0), 2, 5, SIZE)
        one.commit(past)
        alone.append(one.velocity(2)(now, TOLD))
    cond, uncond = alone
    torch.testing.assert_close(guided.velocity(2)(now, TOLD), uncond + 3.0 * (cond - uncond), rtol=0, atol=1e-12)
    assert guided.cache.keys.shape[1] == 4


@torch.no_grad()
def test_a_noisy_past_is_told_to_be_noisy() -> None:
    """What is committed at sigma is what a forward over the noised chunk at 1000 sigma writes."""
    net, past, noise, now = tiny_causal(), latents(2), latents(2, 2), latents(2, 1)
    growing, plain = decoder(net), decoder(net)
    growing.commit(past, ContextConfig(noise=0.15), noise)
    chunk = plain.cache.clean(2, 2 * TOKENS)
    net(torch.lerp(past, noise, 0.15), torch.full((2,), 150.0), texts(2), chunk=chunk)
    plain.cache.commit(chunk)
    assert torch.equal(growing.velocity(2)(now, TOLD), plain.velocity(2)(now, TOLD))
    clean = decoder(net)
    clean.commit(past)
    assert not torch.equal(clean.velocity(2)(now, TOLD), plain.velocity(2)(now, TOLD))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_kept_last_step_is_what_that_step_computed(scale: float) -> None:
    """No pass over the finished chunk: the next one sees the keys and values of the last state that was denoised."""
    net, state, now = tiny_causal(), latents(1), latents(2, 1)
    growing, plain = decoder(net, scale), decoder(net, scale)
    for number in (7, 8):
        growing.velocity(1)(latents(1, number), TOLD)
    growing.velocity(1)(state, TOLD)
    growing.commit(latents(1, 9), ContextConfig("last_step"))
    chunk = plain.cache.clean(1, TOKENS)
    rows = len(plain.guidance.rows) // 2
    net(state.repeat(rows, 1, 1, 1, 1), TOLD.repeat(rows), plain.text, chunk=chunk)
    plain.cache.commit(chunk)
    assert growing.cache.slots == plain.cache.slots
    assert torch.equal(growing.velocity(2)(now, TOLD), plain.velocity(2)(now, TOLD))


@torch.no_grad()
def test_the_prompts_are_read_once() -> None:
    """Weights that change later change the chunks, not the prompts' keys and values."""
    net = tiny_causal()
    growing = decoder(net)
    before = [tensor.clone() for block in growing.text.blocks for tensor in block]
    shake(net, 0.1)
    growing.velocity(2)(latents(2), TOLD)
    after = [tensor for block in growing.text.blocks for tensor in block]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@torch.no_grad()
def test_an_earlier_cache_is_the_same_buffers_with_fewer_chunks() -> None:
    net, growing = tiny_causal(), decoder(tiny_causal())
    velocities = []
    for number, frames in enumerate((2, 1, 2)):
        velocities.append(growing.velocity(frames)(latents(frames, 10 + number), TOLD))
        growing.commit(latents(frames, number))
    for number, frames in enumerate((2, 1, 2)):
        earlier = growing.cache.upto(number)
        assert len(earlier.slots) == number and earlier.next_frame == (0, 2, 3)[number]
        assert earlier.keys.data_ptr() == growing.cache.keys.data_ptr()
        chunk = earlier.denoising(frames, frames * TOKENS)
        again = net(latents(frames, 10 + number), TOLD, growing.text, chunk=chunk)
        assert torch.equal(again, velocities[number])
    earlier.slots.clear()
    assert len(growing.cache.slots) == 3
