"""Cases of linears in e4m3 and of what rounds their inputs."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from reelforge.bench.cases.case import SHAPES, Case, Draw, Operands, Shape, Work
from reelforge.kernels import fp8_groups, fp8_linear, fp8_residual_norm
from reelforge.kernels.fp8 import E4M3, GROUP, quantise

EPS = 1e-6


def _linear(shape: Shape, name: str, columns: int, channels: int, grouped: bool) -> Case:
    """y = x W^T + b with both rounded before the timer; bf16 beside it is the product that e4m3 stands for."""

    def inputs(draw: Draw) -> Operands:
        x, weight = draw(shape.tokens, channels), draw(columns, channels, scale=channels**-0.5)
        rounded = quantise(x, GROUP if grouped else None)
        return *rounded, *fp8_linear.quantise_weight(weight, grouped), draw(columns), x, weight

    moved = (shape.tokens + columns) * channels + 2 * shape.tokens * columns
    return Case(
        "fp8_linear",
        f"{shape.name} {shape.tokens} {name}",
        inputs,
        lambda *operands: fp8_linear.fp8_linear(*operands[:5]),
        lambda *operands: fp8_linear.reference(*operands[:5]),
        Work(moved, flops=2 * shape.tokens * columns * channels, dtype=E4M3),
        tolerance=0.05,  # of the peer, which has the operands unrounded
        peers={"bf16": lambda *operands: F.linear(operands[5], operands[6], operands[4])},
    )


def _linears(shape: Shape) -> list[Case]:
    width, ffn = shape.width, shape.ffn_dim
    return [
        _linear(shape, "q", width, width, grouped=False),
        _linear(shape, "out", width, width, grouped=True),
        _linear(shape, "FFN up", ffn, width, grouped=False),
        _linear(shape, "FFN down", width, ffn, grouped=True),
    ]


def _residual_norm(shape: Shape, gated: bool) -> Case:
    def inputs(draw: Draw) -> Operands:
        x, y = (draw(1, shape.tokens, shape.width) for _ in range(2))
        rows = [draw(1, 1, shape.width, scale=0.1, mean=mean) for mean in (0.0, 1.0, 0.0)]
        return x, y, rows[0] if gated else None, *rows[1:]

    def run(x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return fp8_residual_norm.fp8_residual_norm(x, y, gate, gain, shift, EPS)

    def reference(x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return fp8_residual_norm.reference(x, y, gate, gain, shift, EPS)

    label = f"{shape.name} {shape.tokens} {'gated' if gated else 'ungated'}"
    work = Work(bytes=(3 * 2 + 1) * shape.tokens * shape.width)
    return Case("fp8_residual_norm", label, inputs, run, reference, work)


def _groups(shape: Shape, gelu: bool) -> Case:
    channels = shape.ffn_dim if gelu else shape.width

    def inputs(draw: Draw) -> Operands:
        return (draw(shape.tokens, channels),)

    label = f"{shape.name} {shape.tokens}" + (" gelu" if gelu else "")
    work = Work(bytes=3 * shape.tokens * channels)
    return Case("fp8_groups", label, inputs, partial(fp8_groups.fp8_groups, gelu=gelu), partial(_reference, gelu), work)


def _reference(gelu: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = fp8_groups.reference(x, gelu)
    return values, scale.T


CASES = [case for shape in SHAPES for case in _linears(shape)]
CASES += [_residual_norm(shape, gated) for shape in SHAPES for gated in (True, False)]
CASES += [_groups(shape, gelu) for shape in SHAPES for gelu in (True, False)]
