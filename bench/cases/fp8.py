"""Cases of e4m3 attention over pages, and of what writes the pages."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from reelforge.bench.cases.attention import HEAD_DIM, LARGE_SIZES, SAMPLED_ROWS, SIZES, TEXT
from reelforge.bench.cases.case import MODELS, SHAPES, Case, Draw, Operands, Shape, Work
from reelforge.kernels import attention, fp8_qkv_post
from reelforge.kernels.fp8 import E4M3, GROUP, dequantise, quantise, round_e4m3, scale_of
from reelforge.kernels.fp8_attention import fp8_attention, fp8_attention_quantised, reference

CHUNK = 4680  # tokens of a page, but for a whole video's
EPS = 1e-6


def _pages(queries: int, keys: int) -> tuple[int, int, int]:
    """(pages, tokens of each, their size): one for a whole video, else one a chunk."""
    count, tokens = (1, keys) if queries == keys else (keys // CHUNK, CHUNK)
    return count, tokens, -(-tokens // GROUP) * GROUP


def _inputs(heads: int, queries: int, keys: int, draw: Draw) -> Operands:
    """Values have a mean, as a video's have: an average of noise alone would be rounding error alone."""
    count, tokens, size = _pages(queries, keys)
    q, q_scale = quantise(draw(1, queries, heads, HEAD_DIM))
    k, k_scale = quantise(draw(count, heads, size // GROUP, GROUP * HEAD_DIM))
    v = draw(count, heads, HEAD_DIM, size, mean=1.0)
    value_scale = scale_of(v.abs().amax((0, 3)))
    table = torch.arange(count, dtype=torch.int32, device=draw.device)[None]
    return (
        q, q_scale[..., 0].transpose(1, 2).contiguous(), k.view(count, heads, size, HEAD_DIM), k_scale[..., 0],
        round_e4m3(v / value_scale[:, :, None]), value_scale[None], table, torch.full_like(table, tokens),
    )  # fmt: skip


def _exact(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Some rows of queries in fp64 against every key, as both are rounded."""
    q, q_scale, keys, key_scale, values, value_scale, _, lengths = (x for x in operands if x is not None)
    rows = torch.linspace(0, q.shape[1] - 1, SAMPLED_ROWS, device=q.device).long()
    some = dequantise(q[:, rows], q_scale.transpose(1, 2)[:, rows, :, None].double())
    tokens = int(lengths[0, 0])
    scale = key_scale.double().repeat_interleave(GROUP, -1)[..., None]
    k = (keys.double() * scale)[:, :, :tokens].transpose(0, 1).flatten(1, 2)
    v = (values.double() * value_scale[0, :, :, None])[..., :tokens].permute(1, 0, 3, 2).flatten(1, 2)
    out = outputs[0] if outputs[0].dtype != E4M3 else dequantise(outputs[0], outputs[1][..., None].double())
    return out[:, rows], attention.reference(some, k.transpose(0, 1)[None], v.transpose(0, 1)[None])


def _attention(model: str, queries: int, keys: int, quantised: bool = False) -> Case:
    heads = MODELS[model][1]
    scores = queries * keys * heads
    moved = (queries + 2 * keys) * heads * HEAD_DIM + (1 if quantised else 2) * queries * heads * HEAD_DIM
    return Case(
        "fp8_attention",
        f"{model} {queries} x {keys}" + (" to e4m3" if quantised else ""),
        partial(_inputs, heads, queries, keys),
        fp8_attention_quantised if quantised else fp8_attention,
        partial(reference, quantised=quantised),
        Work(moved, flops=4 * scores * HEAD_DIM, exponentials=scores, dtype=E4M3),
        tolerance=0.03 if quantised else 4e-3,
        exact=_exact,
    )


def _post(shape: Shape, hadamard: bool = False) -> Case:
    size = -(-shape.tokens // GROUP) * GROUP

    def inputs(draw: Draw) -> Operands:
        angle = draw(shape.tokens, HEAD_DIM // 2, dtype=torch.float32)
        weights = [draw(shape.width, scale=0.1, mean=1.0) for _ in range(2)]
        statistics = draw(1, shape.heads, HEAD_DIM, dtype=torch.float32, scale=0.1)
        device = draw.device
        keys, values = (
            torch.zeros(1, shape.heads, *page, dtype=E4M3, device=device)
            for page in ((size, HEAD_DIM), (HEAD_DIM, size))
        )
        key_scale = torch.zeros(1, shape.heads, size // GROUP, device=device)
        return (
            *(draw(1, shape.tokens, shape.width) for _ in range(3)), *weights, angle.cos(), angle.sin(),
            statistics, statistics.abs() / 10 + 0.01, keys, key_scale, values,
            torch.zeros(1, dtype=torch.int32, device=device),
        )  # fmt: skip

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        q, k, v, q_weight, k_weight, cos, sin, mean, value_scale, keys, key_scale, values, page = operands
        found = fp8_qkv_post.fp8_qkv_post(
            q, k, v, q_weight, k_weight, (cos, sin), shape.heads, EPS, mean, value_scale,
            keys, key_scale, values, page, hadamard=hadamard,
        )  # fmt: skip
        return *found, keys, key_scale, values

    def plain(*operands: Tensor) -> tuple[Tensor, ...]:
        q, k, v, q_weight, k_weight, cos, sin, mean, value_scale, keys, key_scale, values, page = operands
        found = fp8_qkv_post.reference(
            q, k, v, q_weight, k_weight, cos, sin, shape.heads, EPS, mean, value_scale,
            keys, key_scale, values, page, hadamard,
        )  # fmt: skip
        return *found, keys, key_scale, values

    elements = shape.tokens * shape.width
    angles = 2 * 4 * shape.tokens * HEAD_DIM // 2
    label = f"{shape.name} {shape.tokens}" + (" hadamard" if hadamard else "")
    return Case("fp8_qkv_post", label, inputs, run, plain, Work(bytes=(3 * 2 + 3) * elements + angles))


def _self_attention(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [size for size in sizes if size[1] != TEXT]


CASES = [
    *(_attention("1.3B", *size) for size in _self_attention(SIZES)),
    *(_attention("14B", *size) for size in _self_attention(LARGE_SIZES)),
    _attention("1.3B", CHUNK, 7 * CHUNK, quantised=True),
    *map(_post, SHAPES),
    _post(SHAPES[1], hadamard=True),
]
