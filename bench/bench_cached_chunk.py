"""One cached chunk step as the cache grows, beside the arithmetic it should follow.

A chunk of M tokens against V visible ones (its own included) costs, per block of width E and FFN width F,

    8 M E^2            q, k, v and out projections
  + 4 M V E            scores and weighted sum
  + 4 M E^2 + 4 M S E  cross-attention on cached keys and values of S text tokens
  + 4 M E F            FFN

FLOPs, so everything but the scores is constant and time should grow linearly in V.
``extra_info.gflop`` is that sum; ``gflop_per_s`` should stay level from the empty cache to the full one.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from reelforge.engine.model.wan import WanTransformer

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 1536,
    "num_layers": 4,
}
CHUNK_FRAMES, HEIGHT, WIDTH, TEXT_TOKENS = 3, 16, 26, 64
CHUNK_TOKENS = CHUNK_FRAMES * (HEIGHT // 2) * (WIDTH // 2)


def flops(visible_tokens: int) -> float:
    """FLOPs of all blocks in one chunk step."""
    width = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
    tokens = CHUNK_TOKENS
    projections = (8 + 4) * tokens * width**2
    scores = 4 * tokens * (visible_tokens + TEXT_TOKENS) * width
    return CONFIG["num_layers"] * (projections + scores + 4.0 * tokens * width * CONFIG["ffn_dim"])


@torch.no_grad()
@pytest.mark.parametrize("cached_chunks", [0, 1, 2, 4, 6])
def bench_chunk_step(benchmark: BenchmarkFixture, cached_chunks: int) -> None:
    model = WanTransformer.from_config(CONFIG)
    context = model.text_context(torch.randn(1, TEXT_TOKENS, CONFIG["text_dim"]))
    cache = model.new_cache(1, CHUNK_FRAMES, 7 * CHUNK_FRAMES, HEIGHT, WIDTH)
    x = torch.randn(1, 16, CHUNK_FRAMES, HEIGHT, WIDTH)
    for _ in range(cached_chunks):
        clean = cache.clean(CHUNK_FRAMES, CHUNK_TOKENS)
        model(x, torch.zeros(1), context, chunk=clean)
        cache.commit(clean)
    step = cache.denoising(CHUNK_FRAMES, CHUNK_TOKENS)
    timestep = torch.full((1,), 500.0)
    benchmark.pedantic(lambda: model(x, timestep, context, chunk=step), rounds=15, warmup_rounds=2)
    gflop = flops((cached_chunks + 1) * CHUNK_TOKENS) / 1e9
    benchmark.extra_info["gflop"] = round(gflop, 3)
    benchmark.extra_info["gflop_per_s"] = round(gflop / benchmark.stats.stats.median, 1)
