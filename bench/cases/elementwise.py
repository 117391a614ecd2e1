"""Cases of the elementwise ops: GELU with and without its bias, the average of weights, pixels to bytes."""

from dataclasses import replace

import torch
from torch import Tensor

from reelforge.bench.cases.case import SHAPES, TOKENS, Case, Draw, Operands, Shape, Work
from reelforge.kernels import ema_lerp, frames, gelu

EMA_TENSORS, EMA_SHAPE, EMA_WEIGHT = 8, (8960, 1536), 0.01  # FFN weights of the 1.3B model
FRAME_SIZE = (480, 832)
FRAME_COUNTS = (81, 12)  # a video; what three latent frames decode to


def _gelu(shape: Shape, biased: bool) -> Case:
    def inputs(draw: Draw) -> Operands:
        x = draw(1, shape.tokens, shape.ffn_dim, grad=True)
        return x, draw(shape.ffn_dim, dtype=torch.float32, scale=0.2, grad=True) if biased else None

    elements = shape.tokens * shape.ffn_dim
    work = Work(2 * 2 * elements + 4 * shape.ffn_dim * biased, exponentials=elements)
    label = f"{shape.name} {shape.tokens}" + (" bias" if biased else "")
    return Case("gelu", label, inputs, gelu.gelu, gelu.reference, work)


def _gelu_backward(shape: Shape, biased: bool) -> Case:
    """Forward, then a backward that reads x and dy and writes dx."""
    forward = _gelu(shape, biased)
    elements = shape.tokens * shape.ffn_dim
    work = Work(forward.work.bytes + 3 * 2 * elements, exponentials=2 * elements)
    return replace(forward, work=work, backward=True)


def _ema_lerp(live: torch.dtype) -> Case:
    def inputs(draw: Draw) -> Operands:
        shadows = [draw(*EMA_SHAPE, dtype=torch.float32) for _ in range(EMA_TENSORS)]
        lives = [draw(*EMA_SHAPE, dtype=live) for _ in range(EMA_TENSORS)]
        return *shadows, *lives, draw(dtype=torch.float32, scale=0.0, mean=EMA_WEIGHT)

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        ema_lerp.ema_lerp(operands[:EMA_TENSORS], operands[EMA_TENSORS:-1], operands[-1])
        return operands[:EMA_TENSORS]

    def reference(*operands: Tensor) -> tuple[Tensor, ...]:
        ema_lerp.reference(operands[:EMA_TENSORS], operands[EMA_TENSORS:-1], operands[-1])
        return operands[:EMA_TENSORS]

    size = "{}x{}".format(*EMA_SHAPE)
    work = Work((4 + 4 + live.itemsize) * EMA_TENSORS * EMA_SHAPE[0] * EMA_SHAPE[1])
    label = f"{EMA_TENSORS} of {size} from {str(live).removeprefix('torch.')}"
    return Case("ema_lerp", label, inputs, run, reference, work, tolerance=1e-6)


def _frames(count: int, nv12: bool) -> Case:
    def inputs(draw: Draw) -> Operands:
        return (draw(1, 3, count, *FRAME_SIZE, scale=0.5),)

    run, reference = (frames.to_nv12, frames.reference_nv12) if nv12 else (frames.to_uint8, frames.reference_uint8)
    pixels = count * FRAME_SIZE[0] * FRAME_SIZE[1]
    label = "{} {}x{}x{}".format("nv12" if nv12 else "uint8", count, *FRAME_SIZE)
    # Near ties fp32 and fp64 round apart, in 7 of a million values of NV12: an error of 2e-5.
    return Case("frames", label, inputs, run, reference, Work((6 + (1.5 if nv12 else 3)) * pixels), tolerance=1e-4)


CASES = [_gelu(shape, biased) for shape in SHAPES for biased in (False, True)]
CASES += [_gelu_backward(shape, biased) for shape in SHAPES if shape.tokens == TOKENS[0] for biased in (False, True)]
CASES += [_ema_lerp(live) for live in ema_lerp.LIVE_DTYPES]
CASES += [_frames(count, nv12) for count in FRAME_COUNTS for nv12 in (False, True)]
