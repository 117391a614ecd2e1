"""Cases of the norm family: LayerNorm + modulate, gated residual + norm, q/k RMSNorm + RoPE."""

from dataclasses import replace

import torch
from torch import Tensor

from reelforge.bench.cases.case import SHAPES, TOKENS, Case, Draw, Operands, Shape, Work
from reelforge.kernels import norm_modulate

EPS = 1e-6
FRAME_TOKENS = TOKENS[-1]


def _norm_modulate(shape: Shape) -> Case:
    frames = shape.tokens // FRAME_TOKENS

    def inputs(draw: Draw) -> Operands:
        x = draw(1, shape.tokens, shape.width, grad=True)
        gain = draw(1, frames, shape.width, dtype=torch.float32, scale=0.2, mean=1.0, grad=True)
        return x, gain, draw(1, frames, shape.width, dtype=torch.float32, scale=0.2, grad=True)

    def run(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return norm_modulate.norm_modulate(x, gain, shift, EPS)

    def reference(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return norm_modulate.reference(x, gain, shift, EPS)

    tokens, rows = 2 * shape.tokens * shape.width, 4 * 2 * frames * shape.width
    return Case("norm_modulate", f"{shape.name} {shape.tokens}", inputs, run, reference, Work(2 * tokens + rows))


def _backward(case: Case, shape: Shape, passes: int) -> Case:
    """Forward and backward; ``passes`` counts the token tensors that the backward reads and writes."""
    extra = 2 * passes * shape.tokens * shape.width
    return replace(case, work=replace(case.work, bytes=case.work.bytes + extra), backward=True)


CASES = [_norm_modulate(shape) for shape in SHAPES]
CASES += [_backward(_norm_modulate(shape), shape, 3) for shape in SHAPES if shape.tokens == TOKENS[0]]
