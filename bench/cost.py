"""How long an op must take at least: bytes over bandwidth, products over tensor cores, exponentials over their unit.

A measured time over this floor is the gap that is left. Two peaks bound it: the datasheet's, and what plain copies
and matrix products reached in the same run. A grid that does not fill its last wave of CTAs loses the share that
:func:`waves` gives; no kernel can win it back without splitting that wave.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from reelforge.bench.cases.case import Work

Bound = Literal["bytes", "tensor cores", "exponentials"]
H200_SMS = 132
EXPONENTIALS_PER_CLOCK = 16  # special-function results of one SM in one clock


@dataclass(frozen=True)
class Peak:
    """What a machine can do at best.

    Attributes:
        name: ``"datasheet"``, ``"measured"`` or ``"plan"``.
        bytes_per_s: device memory, bytes read plus bytes written.
        flops: of the tensor cores by operand type, multiply and add counted apart.
        sms: streaming multiprocessors.
        sm_clock_hz: decides the exponentials.
    """

    name: str
    bytes_per_s: float
    flops: Mapping[torch.dtype, float]
    sms: int
    sm_clock_hz: float

    @property
    def exponentials_per_s(self) -> float:
        return self.sms * EXPONENTIALS_PER_CLOCK * self.sm_clock_hz


def tensor_core_rates(bf16: float, fp8: float) -> dict[torch.dtype, float]:
    """Rates by operand type from those of bf16 and fp8; fp32 operands go through at half bf16's, as tf32."""
    halves = {torch.float32: bf16 / 2, torch.bfloat16: bf16, torch.float16: bf16}
    return {**halves, torch.float8_e4m3fn: fp8, torch.float8_e5m2: fp8}


# NVIDIA's H200 SXM datasheet, dense; its boost clock is 1.98 GHz.
H200 = Peak("datasheet", 4.8e12, tensor_core_rates(989e12, 1979e12), H200_SMS, 1.98e9)
# What plans assume: the bandwidth a copy reaches and the clock under load.
PLAN = Peak("plan", 4.3e12, H200.flops, H200_SMS, 1.755e9)


class Floor(NamedTuple):
    """The least time of a work, and what bounds it."""

    seconds: float
    bound: Bound


def floor(work: Work, peak: Peak) -> Floor:
    """The least time of ``work``: the largest of its three parts, as if they overlapped perfectly."""
    parts: list[tuple[float, Bound]] = [
        (work.bytes / peak.bytes_per_s, "bytes"),
        (work.flops / peak.flops[work.dtype], "tensor cores"),
        (work.exponentials / peak.exponentials_per_s, "exponentials"),
    ]
    return Floor(*max(parts, key=lambda part: part[0]))


class Rates(NamedTuple):
    """What a time means for a work."""

    tflops: float
    gbps: float


def rates(work: Work, seconds: float) -> Rates:
    """Rates at which ``work`` was done; bytes are those it must move, not those that moved."""
    return Rates(work.flops / seconds / 1e12, work.bytes / seconds / 1e9)


class Waves(NamedTuple):
    """A grid on the multiprocessors, one CTA each at a time.

    Attributes:
        ctas: of the grid.
        waves: rounds that it takes.
        efficiency: useful share of the tiles that those rounds have room for.
    """

    ctas: int
    waves: int
    efficiency: float


def waves(rows: int, columns: int, tile: tuple[int, int], sms: int = H200_SMS, batch: int = 1) -> Waves:
    """Tiles of ``tile`` over ``rows x columns``, ``batch`` times."""
    ctas = batch * math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
    count = math.ceil(ctas / sms)
    return Waves(ctas, count, batch * rows * columns / (count * sms * tile[0] * tile[1]))


def attention_waves(tokens: int, heads: int, rows: int = 128, sms: int = H200_SMS) -> Waves:
    """A grid of one CTA for ``rows`` queries of a head."""
    return waves(tokens, 1, (rows, 1), sms, heads)


# Relative rates: a smaller tile loads more operand bytes for each product.
GEMM_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 192): 0.98, (128, 128): 0.92, (64, 256): 0.92}


def gemm_efficiency(rows: int, columns: int, sms: int = H200_SMS) -> float:
    """Share of the tensor cores' rate that the best tile keeps at ``rows x columns``."""
    return max(rate * waves(rows, columns, tile, sms).efficiency for tile, rate in GEMM_TILES.items())


def gemm(rows: int, columns: int, inner: int, dtype: torch.dtype) -> Work:
    """``[rows, inner] @ [inner, columns]`` with both operands in ``dtype`` and the result in bf16."""
    operands = dtype.itemsize * inner * (rows + columns)
    return Work(operands + 2.0 * rows * columns, 2.0 * rows * columns * inner, dtype=dtype)


def attention(queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype) -> Work:
    """Unmasked softmax attention with q, k and v in ``dtype`` and the result in bf16."""
    width = heads * head_dim
    moved = dtype.itemsize * width * (queries + 2 * keys) + 2 * width * queries
    return Work(moved, 4.0 * queries * keys * width, float(heads * queries * keys), dtype)
