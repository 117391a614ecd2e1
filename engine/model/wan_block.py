"""One block of the Wan2.1 transformer: self-attention, cross-attention and FFN around a modulated residual stream.

    h = LN(x)(1 + scale_1) + shift_1;  x += gate_1 SelfAttention(h)
    h = LN_affine(x);                  x += CrossAttention(h, text)
    h = LN(x)(1 + scale_2) + shift_2;  x += gate_2 FFN(h)

The residual add of one branch and the norm in front of the next are one op, so a block takes and returns (x, h) and
is told the norm that follows it. Shape letters: B batch, L tokens, S text tokens, E width, N heads, D = E / N,
M = 1 timestep a sample or T, one a latent frame. Parameter names are diffusers'.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from reelforge.engine.model.fp8_linear import Fp8Linear, Rounded
from reelforge.engine.model.kv_cache import ChunkPass
from reelforge.engine.model.layout import Layout
from reelforge.engine.model.wan_config import WanConfig
from reelforge.kernels.attention import attention
from reelforge.kernels.fp8_groups import fp8_groups
from reelforge.kernels.fp8_residual_norm import fp8_residual_norm
from reelforge.kernels.gated_residual_norm import gated_residual_norm
from reelforge.kernels.gelu import gelu
from reelforge.kernels.qk_norm_rope import qk_norm_rope
from reelforge.kernels.qk_norm_rope_into import qk_norm_rope_into
from reelforge.kernels.rms_norm import rms_norm

Precision = Literal["reference", "fast"]
Norm = tuple[Tensor, Tensor]  # gain and shift of a LayerNorm, each [B or 1, M, E]
Modulation = tuple[Norm, Tensor, Norm, Tensor]  # norm and gate of self-attention, norm and gate of the FFN


class Attention(nn.Module):
    """Projections and norms of one attention layer; ``to_out`` is a list because diffusers names it so."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = RmsWeight(width)
        self.norm_k = RmsWeight(width)

    def output(self, attended: Tensor) -> Tensor:
        return self.to_out[0](attended.flatten(2))

    @property
    def readers(self) -> tuple[nn.Module, ...]:
        """The linears that read what the norm in front leaves."""
        return (self.to_q,)


class RmsWeight(nn.Module):
    """The weight of an RMSNorm over the full width; the norm itself is fused with what follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


@dataclass(frozen=True)
class TokenSequence:
    """What self-attention needs to know about the tokens: positions, visibility, cache."""

    rotation: tuple[Tensor, Tensor]
    layout: Layout
    tokens_per_frame: int
    chunk: ChunkPass | None

    def span(self, frames: tuple[int, int]) -> slice:
        return slice(frames[0] * self.tokens_per_frame, frames[1] * self.tokens_per_frame)


class SelfAttention(Attention):
    """Attention among the video's tokens, within the layout's rectangles or against the cache."""

    @property
    def readers(self) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_k, self.to_v

    def forward(self, h: Tensor | Rounded, sequence: TokenSequence, layer: int, precision: Precision) -> Tensor:
        """``[B, L, E]`` to ``[B, L, E]``."""
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        norms = (self.norm_q.weight, self.norm_k.weight, sequence.rotation, self.num_heads, self.eps)
        rounding, chunk = precision == "reference", sequence.chunk
        if chunk is not None and not torch.is_grad_enabled():
            q = qk_norm_rope_into(q, k, v, *norms, *chunk.own(layer), round_norm=rounding)
            return self.output(attention(q, *chunk.visible(layer)))
        q, k = qk_norm_rope(q, k, *norms, round_norm=rounding)
        v = v.unflatten(-1, (self.num_heads, -1))
        if chunk is not None:
            return self.output(attention(q, *chunk.update(layer, k, v)))
        return self.output(self._attend(q, k, v, sequence))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, sequence: TokenSequence) -> Tensor:
        def gather(tensor: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
            return _join([tensor[:, sequence.span(span)] for span in spans])

        return _join(
            [
                attention(q[:, sequence.span(rectangle.queries)], gather(k, rectangle.keys), gather(v, rectangle.keys))
                for rectangle in sequence.layout.rectangles
            ]
        )


def _join(parts: list[Tensor]) -> Tensor:
    # cat would copy a single part too: 100 MB a block at 32,760 tokens.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CrossAttention(Attention):
    """Attention from video tokens to text."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text ``[B, S, E]`` to keys and values ``[B, S, N, D]``: constant over steps and chunks."""
        k = rms_norm(self.to_k(text), self.norm_k.weight, self.eps)
        return k.unflatten(-1, (self.num_heads, -1)), self.to_v(text).unflatten(-1, (self.num_heads, -1))

    def forward(self, h: Tensor | Rounded, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, L, E]`` to ``[B, L, E]``."""
        q = rms_norm(self.to_q(h), self.norm_q.weight, self.eps)
        return self.output(attention(q.unflatten(-1, (self.num_heads, -1)), *keys_values))


class GeluLinear(nn.Module):
    """``gelu(proj(x))``, the first half of the FFN under diffusers' name."""

    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        # Index 1 is diffusers' dropout.
        self.net = nn.ModuleList([GeluLinear(width, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, width)])

    @property
    def readers(self) -> tuple[nn.Module, ...]:
        return (cast(GeluLinear, self.net[0]).proj,)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        down = self.net[2]
        if not isinstance(down, Fp8Linear):
            return down(self.net[0](x))
        hidden = self.readers[0](x)
        values, scale = fp8_groups(hidden.flatten(0, -2), gelu=True)
        return down((values.view(hidden.shape), scale))


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, eps: float, readers: tuple[nn.Module, ...], rounding: bool
) -> tuple[Tensor, Tensor | Rounded]:
    """The gated residual add and the norm behind it; h in e4m3 where all that read it take that."""
    if all(isinstance(reader, Fp8Linear) for reader in readers):
        x, values, scale = fp8_residual_norm(x, y, gate, *norm, eps)
        return x, (values, scale)
    return gated_residual_norm(x, y, gate, *norm, eps, round_residual=rounding)


class Block(nn.Module):
    """One transformer block. ``scale_shift_table`` rows: shift, scale, gate of attention, then of the FFN."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.ffn = FeedForward(config.width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.width))

    def modulation(self, projection: Tensor) -> Modulation:
        """``[B, M, 6, E]`` to the norm and gate of self-attention and of the FFN."""
        table = self.scale_shift_table[:, None] + projection.to(self.scale_shift_table.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.unbind(2)
        return (1 + scale_1, shift_1), gate_1, (1 + scale_2, shift_2), gate_2

    def forward(
        self,
        x: Tensor,
        h: Tensor | Rounded,
        modulation: Modulation,
        next_norm: Norm,
        text: Tensor | tuple[Tensor, Tensor],
        sequence: TokenSequence,
        layer: int,
        precision: Precision,
        readers: tuple[nn.Module, ...],
    ) -> tuple[Tensor, Tensor | Rounded]:
        """Residual stream x and normed h, both ``[B, L, E]``, to those in front of the next block's ``readers``."""
        _, gate_1, norm_ffn, gate_2 = modulation
        rounding, eps = precision == "reference", self.eps
        y = self.attn1(h, sequence, layer, precision)
        affine = (self.norm2.weight[None, None], self.norm2.bias[None, None])
        x, h = residual_norm(x, y, gate_1, affine, eps, self.attn2.readers, rounding)
        y = self.attn2(h, self.attn2.keys_values(text) if isinstance(text, Tensor) else text)
        x, h = residual_norm(x, y, None, norm_ffn, eps, self.ffn.readers, rounding)
        return residual_norm(x, self.ffn(h), gate_2, next_norm, eps, readers, rounding)
