"""The arithmetic of one Wan block: FLOPs, the least its ops must do, and what a block should take.

Per block of width E and FFN width F, for L tokens against V visible ones and S text tokens:

    linears          12 L E^2 + 4 L E F      q, k, v, out, cross-q, cross-out; FFN up and down
    self-attention   4 L V E
    cross-attention  4 L S E

:func:`block_ops` lists the ops of a block whose elementwise chains are all fused, each with its least work.
:func:`predicted_block` puts assumed rates in place of the peaks and pays for unfilled waves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from reelforge.bench import cost
from reelforge.bench.cases.case import Shape, Work
from reelforge.bench.cost import PLAN, attention_waves, gemm_efficiency

TEXT_TOKENS = 512
LAYERS = {"1.3B": 30, "14B": 40}


class Flops(NamedTuple):
    """FLOPs of one block."""

    linears: float
    self_attention: float
    cross_attention: float

    @property
    def block(self) -> float:
        return self.linears + self.self_attention + self.cross_attention


def block_flops(shape: Shape, kv_tokens: int, text_tokens: int = TEXT_TOKENS) -> Flops:
    """FLOPs of one block with ``shape.tokens`` queries against ``kv_tokens``."""
    tokens, width = float(shape.tokens), shape.width
    linears = tokens * width * (12 * width + 4 * shape.ffn_dim)
    return Flops(linears, 4 * tokens * kv_tokens * width, 4 * tokens * text_tokens * width)


class BlockOp(NamedTuple):
    """One op of a block and its least work."""

    name: str
    work: Work


def block_ops(shape: Shape, kv_tokens: int, dtype: torch.dtype, text_tokens: int = TEXT_TOKENS) -> list[BlockOp]:
    """A fully fused block whose matrix products take operands of ``dtype``; activations between ops are bf16.

    An op in front of a product writes its operand type; in fp8 the values are rewritten with q and k. The last gated
    residual is merged into the next block's first norm and counted as what it adds there.
    """
    tokens, width, ffn_dim = shape.tokens, shape.width, shape.ffn_dim
    size = dtype.itemsize

    def elementwise(columns: int, bytes_each: int) -> Work:
        return Work(float(tokens * columns * bytes_each), dtype=dtype)

    def product(columns: int, inner: int) -> Work:
        return cost.gemm(tokens, columns, inner, dtype)

    residual_norm = elementwise(width, 6 + size)
    head_dim = width // shape.heads
    return [
        BlockOp("norm + modulate", elementwise(width, 2 + size)),
        BlockOp("q, k, v projection", product(3 * width, width)),
        BlockOp("q, k norm + RoPE", elementwise(width, 9 if size == 1 else 8)),
        BlockOp("self-attention", cost.attention(tokens, kv_tokens, shape.heads, head_dim, dtype)),
        BlockOp("out projection", product(width, width)),
        BlockOp("gated residual + norm", residual_norm),
        BlockOp("cross-q projection", product(width, width)),
        BlockOp("cross-q norm", elementwise(width, 4)),
        BlockOp("cross-attention", cost.attention(tokens, text_tokens, shape.heads, head_dim, dtype)),
        BlockOp("cross-out projection", product(width, width)),
        BlockOp("residual + norm + modulate", residual_norm),
        BlockOp("FFN up", product(ffn_dim, width)),
        BlockOp("GELU", elementwise(ffn_dim, 2 + size)),
        BlockOp("FFN down", product(width, ffn_dim)),
        BlockOp("gated residual", elementwise(width, 4)),
    ]


def block_floor(shape: Shape, kv_tokens: int, peak: cost.Peak, dtype: torch.dtype = torch.bfloat16) -> float:
    """Seconds of a fully fused block at the roof."""
    return sum(cost.floor(op.work, peak).seconds for op in block_ops(shape, kv_tokens, dtype))


@dataclass(frozen=True)
class Plan:
    """Assumed rates of one way to run a bf16 block.

    Attributes:
        attention_flops: of its self-attention, waves filled.
        column_bytes: bytes that its elementwise ops move for each of a token's E columns.
        ffn_column_bytes: the same for each of the F columns.
        bandwidth: bytes a second of its elementwise ops.
        gemm_flops: of its matrix products, waves filled.
    """

    attention_flops: float
    column_bytes: float
    ffn_column_bytes: float = 4.0
    bandwidth: float = 0.7 * PLAN.bytes_per_s
    gemm_flops: float = 790e12


# 38 bytes are one fused kernel for each chain; 216 are diffusers' chains op by op, LayerNorm and residual in fp32.
PLANS = {
    "eager, flash": Plan(360e12, 216.0),
    "compiled, cuDNN": Plan(600e12, 38.0),
    "compiled, flash 3": Plan(670e12, 38.0),
}
SHORT_KEYS = 0.6  # of an attention kernel's rate remains at the text's 512 keys


def predicted_block(shape: Shape, kv_tokens: int, plan: Plan) -> float:
    """Seconds of one bf16 block by ``plan``, on an H200; model times ran 7 % under published ones."""
    tokens, width, ffn_dim = shape.tokens, shape.width, shape.ffn_dim
    flops = block_flops(shape, kv_tokens)
    products = [(3 * width, width), *[(width, width)] * 3, (ffn_dim, width), (width, ffn_dim)]
    linears = sum(2.0 * tokens * n * k / gemm_efficiency(tokens, n) for n, k in products) / plan.gemm_flops
    attended = flops.self_attention / attention_waves(tokens, shape.heads).efficiency
    attended += flops.cross_attention / SHORT_KEYS
    moved = tokens * (plan.column_bytes * width + plan.ffn_column_bytes * ffn_dim)
    return linears + attended / plan.attention_flops + moved / plan.bandwidth
