"""Kernels with one known fault each, as cases for the gate's compiling process; imported there, never by a test.

``python -m gate_specimens`` compares recorded launches with what Triton's own binder says of real tensors.
"""

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.bench.cases.case import Case, Draw, Operands, Work
from reelforge.bench.launches import Launch, launches
from reelforge.kernels import dispatch
from reelforge.kernels.errors import KernelError

BLOCK = 1024


@triton.jit
def wide_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, at < count) * 2.0, at < count)


@triton.jit
def narrow_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at * stride, tl.load(x_ptr + at * stride) * 2.0)


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    x -= tl.max(x, axis=0)
    x = tl.exp(x)
    tl.store(out_ptr + at, x / tl.sum(x, axis=0))


@triton.jit
def dot_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, SIZE)
    a = tl.load(x_ptr + row[:, None] * SIZE + column[None, :])
    b = tl.load(x_ptr + column[:, None] * SIZE + column[None, :])
    tl.store(out_ptr + row[:, None] * SIZE + column[None, :], tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def refused_by_compiler_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).no_such_method())


@triton.jit
def bound_kernel(aligned, view, count, odd, one, absent, scale, flag, long, DECLARED: tl.constexpr):
    pass


@triton.autotune([triton.Config({"BLOCK": 256}, num_warps=2), triton.Config({"BLOCK": 512}, num_warps=8)], key=[])
@triton.jit
def tuned_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@torch.library.custom_op("reelforge::specimen_double", mutates_args=())
def double(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    wide_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out


@torch.library.custom_op("reelforge::specimen_double_backward", mutates_args=())
def double_backward(dout: Tensor) -> Tensor:
    dx = torch.empty_like(dout)
    wide_kernel[lambda given: (dout.numel() // given["BLOCK"],)](
        dout, dx, dout.numel(), BLOCK=2 * BLOCK, num_warps=4
    )  # fmt: skip
    return dx


@double.register_fake
@double_backward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


double.register_autograd(lambda ctx, dout: double_backward(dout.contiguous()))


def narrow(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    narrow_kernel[(x.numel() // BLOCK // 8,)](x, out, 8, BLOCK=BLOCK, num_warps=4)
    return out


def spill(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    spilling_kernel[(1,)](x, out, BLOCK=2048, num_warps=1, maxnreg=32)
    return out


def refused_by_compiler(x: Tensor) -> Tensor:
    refused_by_compiler_kernel[(1,)](x, x, BLOCK=64)
    return x


def tuned(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    tuned_kernel[lambda given: (x.numel() // given["BLOCK"],)](x, out)
    return out


def refused_by_launcher(x: Tensor) -> Tensor:
    raise KernelError("specimen got a size it does not take.", "Give it another.")


def product(rows: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        out = torch.empty(rows, 64, dtype=x.dtype, device=x.device)
        dot_kernel[(1,)](x, out, ROWS=rows, SIZE=64, num_warps=4)
        return out

    return run


def bound(x: Tensor, view: Tensor) -> Tensor:
    bound_kernel[(1,)](x, view, 4096, 4095, 1, None, 1e-6, True, 2**40, DECLARED=16, num_warps=2, num_stages=5)
    return x


def _two(draw: Draw) -> Operands:
    return draw(BLOCK), draw(BLOCK + 1, dtype=torch.float32)[1:]


def _case(label: str, run: Callable[..., Tensor], flops: float = 0.0, backward: bool = False) -> Case:
    def inputs(draw: Draw) -> Operands:
        return (draw(64, BLOCK, grad=backward),)

    return Case("specimen", label, inputs, run, run, Work(1.0, flops), backward=backward)


def cases() -> list[Case]:
    return [
        _case("wide", double),
        _case("wide", double, backward=True),
        _case("narrow", narrow),
        _case("spilling", spill),
        _case("large product", product(64), flops=1.0),
        _case("small product", product(16), flops=1.0),
        _case("uncompilable", refused_by_compiler),
        _case("refused", refused_by_launcher),
        _case("launchless", lambda x: x * 2),
        _case("tuned", tuned),
        Case("specimen", "bound", _two, bound, bound, Work(1.0)),
    ]


def crashing() -> list[Case]:
    return [_case("crashing", lambda x: x.sum().item())]


dispatch.register("specimen", "triton", dispatch.needs_triton(torch.bfloat16))


def said_by_triton() -> tuple:
    """The launch of :func:`bound` by Triton's binder, from real tensors on the CPU."""
    operands = _two(Draw(torch.device("cpu"), None))
    given = (*operands, 4096, 4095, 1, None, 1e-6, True, 2**40)
    options = {"DECLARED": 16, "num_warps": 2, "num_stages": 5, "debug": False}
    _, _, _, backend, binder = bound_kernel.create_binder()
    arguments, specialization, leftover = binder(*given, **options)
    parsed, signature, constants, attributes = bound_kernel._pack_args(
        backend, options, arguments, specialization, leftover
    )
    return Launch(bound_kernel, signature, constants, attributes, parsed, (1,)).key


if __name__ == "__main__":
    recorded = [launch.key for launch in launches(cases()[-1])]
    sys.stdout.write(json.dumps([*recorded, said_by_triton()]))
