"""Cases of the norm family: LayerNorm + modulate, gated residual + norm, q/k RMSNorm + RoPE, RMSNorm alone."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reelforge.bench.cases.case import SHAPES, TOKENS, Case, Draw, Op, Operands, Shape, Work
from reelforge.kernels import gated_residual_norm, norm_modulate, qk_norm_rope, qk_norm_rope_into, rms_norm

EPS = 1e-6
FRAME_TOKENS = TOKENS[-1]
FP32 = torch.float32


def _work(shape: Shape, passes: int, rows: int, angles: bool = False) -> Work:
    """``passes`` token tensors in bf16, ``rows`` of E and both tables of angles in fp32."""
    table = 2 * shape.tokens * (shape.width // shape.heads // 2)
    return Work(2 * passes * shape.tokens * shape.width + 4 * (rows * shape.width + angles * table))


def _backward(case: Case, shape: Shape, passes: int) -> Case:
    """Forward and backward; ``passes`` counts the token tensors that the backward reads and writes."""
    extra = 2 * passes * shape.tokens * shape.width
    return replace(case, work=replace(case.work, bytes=case.work.bytes + extra), backward=True)


def _gain(draw: Draw, shape: Shape, frames: int) -> Tensor:
    return draw(1, frames, shape.width, dtype=FP32, scale=0.2, mean=1.0, grad=True)


def _offset(draw: Draw, shape: Shape, frames: int) -> Tensor:
    return draw(1, frames, shape.width, dtype=FP32, scale=0.2, grad=True)


def _norm_modulate(shape: Shape) -> Case:
    frames = shape.tokens // FRAME_TOKENS

    def inputs(draw: Draw) -> Operands:
        x = draw(1, shape.tokens, shape.width, grad=True)
        return x, _gain(draw, shape, frames), _offset(draw, shape, frames)

    def run(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return norm_modulate.norm_modulate(x, gain, shift, EPS)

    def reference(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return norm_modulate.reference(x, gain, shift, EPS)

    return Case(
        "norm_modulate", f"{shape.name} {shape.tokens}", inputs, run, reference, _work(shape, 2, rows=2 * frames)
    )


def _gated_residual_norm(shape: Shape, gated: bool) -> Case:
    """Self-attention's gate a frame before an affine norm; or cross-attention, ungated before a norm a frame."""
    frames = shape.tokens // FRAME_TOKENS
    norm_frames = 1 if gated else frames

    def inputs(draw: Draw) -> Operands:
        x, y = (draw(1, shape.tokens, shape.width, grad=True) for _ in range(2))
        gate = _offset(draw, shape, frames) if gated else None
        return x, y, gate, _gain(draw, shape, norm_frames), _offset(draw, shape, norm_frames)

    def run(x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_norm.gated_residual_norm(x, y, gate, gain, shift, EPS)

    def reference(x: Tensor, y: Tensor, gate: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_norm.reference(x, y, gate, gain, shift, EPS)

    label = f"{shape.name} {shape.tokens} {'gated' if gated else 'ungated'}"
    work = _work(shape, 4, rows=gated * frames + 2 * norm_frames)
    return Case("gated_residual_norm", label, inputs, run, reference, work)


def _rms_norm(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Operands:
        return draw(1, shape.tokens, shape.width, grad=True), _weight(draw, shape)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, weight, EPS)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm.reference(x, weight, EPS)

    return Case("rms_norm", f"{shape.name} {shape.tokens}", inputs, run, reference, _work(shape, 2, rows=1))


def _weight(draw: Draw, shape: Shape, grad: bool = True) -> Tensor:
    return draw(shape.width, dtype=FP32, scale=0.2, mean=1.0, grad=grad)


def _rotation(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    angle = draw(shape.tokens, shape.width // shape.heads // 2, dtype=FP32, scale=3.0)
    return angle.cos(), angle.sin()


def _qk_norm_rope(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Operands:
        q, k = (draw(1, shape.tokens, shape.width, grad=True) for _ in range(2))
        return q, k, _weight(draw, shape), _weight(draw, shape), *_rotation(draw, shape)

    def call(function: Op, q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight, cos, sin = rest
        return tuple(function(q, k, q_weight, k_weight, (cos, sin), shape.heads, EPS))

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        return call(qk_norm_rope.qk_norm_rope, *operands)

    def reference(*operands: Tensor) -> tuple[Tensor, ...]:
        return call(qk_norm_rope.reference, *operands)

    work = _work(shape, 4, rows=2, angles=True)
    return Case("qk_norm_rope", f"{shape.name} {shape.tokens}", inputs, run, reference, work)


def _qk_norm_rope_into(shape: Shape) -> Case:
    """Slices of one QKV product, into the middle of a cache."""

    def inputs(draw: Draw) -> Operands:
        qkv = draw(1, shape.tokens, 3 * shape.width)
        weights = _weight(draw, shape, grad=False), _weight(draw, shape, grad=False)
        slots = (draw(1, 3 * shape.tokens, shape.heads, shape.width // shape.heads, scale=0.0) for _ in range(2))
        return qkv, *weights, *_rotation(draw, shape), *slots

    def call(function: Callable[..., Tensor], qkv: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight, cos, sin, keys, values = rest
        slots = [cache[:, shape.tokens : 2 * shape.tokens] for cache in (keys, values)]
        out = function(*qkv.chunk(3, dim=-1), q_weight, k_weight, (cos, sin), shape.heads, EPS, *slots)
        return out, keys, values  # whole caches: what lies beside the slot has to stay as it was

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        return call(qk_norm_rope_into.qk_norm_rope_into, *operands)

    def reference(*operands: Tensor) -> tuple[Tensor, ...]:
        return call(qk_norm_rope_into.reference, *operands)

    work = _work(shape, 6, rows=2, angles=True)
    return Case("qk_norm_rope_into", f"{shape.name} {shape.tokens}", inputs, run, reference, work)


LONG = [shape for shape in SHAPES if shape.tokens == TOKENS[0]]
CASES = [_norm_modulate(shape) for shape in SHAPES]
CASES += [_backward(_norm_modulate(shape), shape, 3) for shape in LONG]
CASES += [_gated_residual_norm(shape, gated) for shape in SHAPES for gated in (True, False)]
CASES += [_backward(_gated_residual_norm(shape, True), shape, 6) for shape in LONG]
CASES += [_backward(_gated_residual_norm(shape, False), shape, 5) for shape in LONG]
CASES += [_rms_norm(shape) for shape in SHAPES]
CASES += [_backward(_rms_norm(shape), shape, 3) for shape in LONG]
CASES += [_qk_norm_rope(shape) for shape in SHAPES]
CASES += [_backward(_qk_norm_rope(shape), shape, 6) for shape in LONG]
CASES += [_qk_norm_rope_into(shape) for shape in SHAPES if shape not in LONG]
