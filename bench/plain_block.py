"""The Wan block as diffusers structures it, in plain torch: what users run today, eager or compiled.

    h = (LN(x.float()) (1 + scale) + shift).type_as(x);  x = (x.float() + attn(h) gate).type_as(x)
    h = LN_affine(x.float()).type_as(x);                 x = x + cross(h)
    h = (LN(x.float()) (1 + scale) + shift).type_as(x);  x = (x.float() + ffn(h).float() gate).type_as(x)

RMSNorm of q and of k, RoPE on even and odd elements apart, keys and values into the cache by copies; text keys and
values are given, which diffusers projects anew at every step. It shares the weights of our block and none of its ops.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.engine.model.kv_cache import ChunkPass
from reelforge.engine.model.wan_block import Attention, Block, GeluLinear, Modulation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # on [B, N, L, D]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice."""
    return F.scaled_dot_product_attention(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN, the fastest that ships with torch on Hopper, by the operator that SDPA would call."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def plain_block(
    block: Block,
    modulation: Modulation,
    rotation: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    chunk: ChunkPass | None,
    attend: Attend,
) -> Callable[[Tensor], Tensor]:
    """The block as a function of the residual stream ``[B, L, E]``.

    Args:
        block: whose weights to use.
        modulation: of our block, one row a sample: gain and shift, gate, gain and shift, gate.
        rotation: (cos, sin), each ``[L, D / 2]``.
        text: keys and values ``[B, S, N, D]``.
        chunk: a pass against the cache of layer 0.
        attend: the attention.
    """
    norm_1, gate_1, norm_2, gate_2 = modulation
    gain_1, shift_1, gain_2, shift_2 = (row.float() for row in (*norm_1, *norm_2))
    gate_1, gate_2 = gate_1.float(), gate_2.float()
    cos, sin = (table[None, :, None].contiguous() for table in rotation)
    text_k, text_v = (tensor.transpose(1, 2) for tensor in text)
    affine = block.norm2.weight.float(), block.norm2.bias.float()
    own = block.attn1
    up, down = cast(GeluLinear, block.ffn.net[0]).proj, block.ffn.net[2]
    cached = None if chunk is None else _cached(chunk)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=block.eps)

    def run(x: Tensor) -> Tensor:
        h = (norm(x) * gain_1 + shift_1).type_as(x)
        q, k = (_rotate(_heads(own, _rms(own, linear(h), norm)), cos, sin) for linear, norm in
                ((own.to_q, own.norm_q.weight), (own.to_k, own.norm_k.weight)))  # fmt: skip
        v = _heads(own, own.to_v(h))
        k, v = (k, v) if cached is None else cached(k, v)
        x = (x.float() + _output(own, attend(*(tensor.transpose(1, 2) for tensor in (q, k, v)))) * gate_1).type_as(x)
        h = F.layer_norm(x.float(), x.shape[-1:], *affine, eps=block.eps).type_as(x)
        q = _heads(block.attn2, _rms(block.attn2, block.attn2.to_q(h), block.attn2.norm_q.weight)).transpose(1, 2)
        x = x + _output(block.attn2, attend(q, text_k, text_v))
        h = (norm(x) * gain_2 + shift_2).type_as(x)
        return (x.float() + down(F.gelu(up(h), approximate="tanh")).float() * gate_2).type_as(x)

    return run


def _rms(attention: Attention, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), attention.eps)


def _heads(attention: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, -1))


def _output(attention: Attention, attended: Tensor) -> Tensor:
    return attention.to_out[0](attended.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def _cached(chunk: ChunkPass) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    keys, values = chunk.cache.keys[0], chunk.cache.values[0]
    own = slice(chunk.write_start, chunk.write_start + chunk.slot.tokens)
    seen = slice(*chunk.read)

    def update(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys[:, own] = k
        values[:, own] = v
        return keys[:, seen], values[:, seen]

    return update
