"""How kernels that work row by row walk ``[B, L, E]``: one program, some tokens of one modulation row, one at a time.

A token is cut into equal chunks of columns, a power of two wide, that travel as a tuple. Wan's widths are three or
five times a power of two, so a single block of the next one would idle a quarter to a third of its lanes. Rows of gain
and shift stay in registers: they are fp32 and four times a token's bf16 bytes. The next tokens are copied to shared
memory meanwhile, which costs no registers: a Hopper SM needs some 32 KB on their way to draw its share of bandwidth.

Sums over tokens are written once a program and added up in a fixed order. What a sample's tokens are divided into
depends on that sample's length alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels.errors import KernelError

MAX_WIDTH = 6144  # of fp32 rows, the most that the gated backward can fetch ahead in 227 KiB of shared memory
# Programs a sample, and the least tokens of one. Many short ones end evenly; where each writes sums of its own, four
# for each of 132 SMs, which are whole waves whether one, two or four reside on an SM.
_FORWARD, _BACKWARD = (2048, 2), (512, 8)
STAGES = tl.constexpr(3)  # two tokens on their way while a third is worked on


@dataclass(frozen=True)
class Walk:
    """How programs share out a modulation row.

    Attributes:
        tokens: of the row.
        steps: tokens that a program takes.
        parts: programs to the row.
        chunk: columns of a chunk, 8 a thread: 16 bytes of bf16.
        warps: of a program.
    """

    tokens: int
    steps: int
    parts: int
    chunk: int
    warps: int


def plan(op: str, like: Tensor, rows: int = 1, *, backward: bool = False, columns: int = 40) -> Walk:
    """A walk over tokens ``[B, L, E]`` in ``rows`` modulation rows a sample.

    Args:
        op: named in the error.
        like: the tokens.
        rows: a divisor of L.
        backward: fewer programs, for each writes sums of its own.
        columns: the most that a thread holds of a token.

    Raises:
        KernelError: the width is above :data:`MAX_WIDTH`.
    """
    _, length, width = like.shape
    if width > MAX_WIDTH:
        raise KernelError(f"{op} got rows of {width} columns.", f"Its kernel takes at most {MAX_WIDTH}; pin torch.")
    warps = next(warps for warps in (1, 2, 4, 8) if 8 * triton.cdiv(width, 256 * warps) <= columns)
    programs, least = _BACKWARD if backward else _FORWARD
    tokens = length // rows
    steps = max(least, triton.cdiv(tokens, triton.cdiv(programs, rows)))
    return Walk(tokens, steps, triton.cdiv(tokens, steps), 256 * warps, warps)


def check_tokens(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """A contiguous ``[B, L, E]`` operand with the shape and device of ``like``.

    Raises:
        KernelError: it is anything else.
    """
    _check_shape(op, name, tensor, like)
    if not tensor.is_contiguous():
        raise KernelError(f"{op}: {name} has strides {tensor.stride()}.", "Its kernel takes contiguous tokens.")


def token_strides(op: str, name: str, tensor: Tensor, like: Tensor) -> tuple[int, int]:
    """Batch and token stride of a ``[B, L, E]`` operand with the shape and device of ``like``.

    Raises:
        KernelError: it is anything else, or a token's columns lie apart.
    """
    _check_shape(op, name, tensor, like)
    if tensor.stride(2) != 1:
        raise KernelError(f"{op}: {name} has strides {tensor.stride()}.", "A token's columns must lie side by side.")
    return tensor.stride(0), tensor.stride(1)


def _check_shape(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.ndim != 3 or tensor.shape != like.shape or tensor.device != like.device:
        wanted = f"{tuple(like.shape)} on {like.device}" if like.ndim == 3 else "[B, L, E]"
        raise KernelError(f"{op}: {name} is {tuple(tensor.shape)} on {tensor.device}.", f"It must be {wanted}.")


def row_strides(op: str, name: str, rows: Tensor, like: Tensor) -> tuple[int, int]:
    """Batch stride and row stride of per-frame rows ``[B or 1, M, E]`` for tokens ``[B, L, E]``.

    Raises:
        KernelError: the rows do not spread evenly over the tokens.
    """
    batch, tokens, width = like.shape
    fits = rows.ndim == 3 and rows.shape[0] in (1, batch) and rows.shape[2] == width and rows.device == like.device
    if not fits or tokens % rows.shape[1]:
        raise KernelError(
            f"{op}: {name} is {tuple(rows.shape)} on {rows.device}.",
            f"It must be [{batch} or 1, M, {width}] on {like.device} with M a divisor of {tokens}.",
        )
    if rows.stride(2) != 1:
        raise KernelError(f"{op}: {name} has strides {rows.stride()}.", "Its columns must lie side by side.")
    return (rows.stride(0) if rows.shape[0] > 1 else 0), rows.stride(1)


# -- in a kernel: a row is a tuple of chunks [W] --------------------------------------------------------------------


@triton.jit
def load_row(ptr, E: tl.constexpr, W: tl.constexpr):
    """The E columns at ``ptr`` in memory's dtype, 0 beyond them."""
    column = tl.arange(0, W)
    row = ()
    for i in tl.static_range((E + W - 1) // W):
        if (i + 1) * W <= E:
            chunk = tl.load(ptr + i * W + column)
        else:
            chunk = tl.load(ptr + i * W + column, column < E - i * W, 0.0)
        row = row + (chunk,)
    return row


@triton.jit
def store_row(ptr, row, E: tl.constexpr, W: tl.constexpr):
    """Write a row's E columns in the pointer's dtype."""
    column = tl.arange(0, W)
    values = cast_row(row, ptr.dtype.element_ty)
    for i in tl.static_range(len(row)):
        if (i + 1) * W <= E:
            tl.store(ptr + i * W + column, values[i])
        else:
            tl.store(ptr + i * W + column, values[i], column < E - i * W)


@triton.jit
def zero_row(E: tl.constexpr, W: tl.constexpr):
    row = ()
    for _ in tl.static_range((E + W - 1) // W):
        row = row + (tl.zeros((W,), tl.float32),)
    return row


@triton.jit
def cast_row(row, dtype: tl.constexpr):
    cast = ()
    for i in tl.static_range(len(row)):
        cast = cast + (row[i].to(dtype),)
    return cast


@triton.jit
def wide_row(row):
    """The row in fp32."""
    return cast_row(row, tl.float32)


@triton.jit
def sum_row(row):
    total = row[0]
    for i in tl.static_range(1, len(row)):
        total += row[i]
    return tl.sum(total)


# -- sums over tokens -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(terms_ptr, out_ptr, count, width, TERMS: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TERMS, COLUMNS), tl.float32)
    for first in range(0, count, TERMS):
        term = first + tl.arange(0, TERMS)
        mask = (term < count)[:, None] & (column < width)[None, :]
        total += tl.load(terms_ptr + (group * count + term[:, None]) * width + column[None, :], mask, 0.0)
    tl.store(out_ptr + group * width + column, tl.sum(total, axis=0), column < width)


def sum_terms(terms: Tensor) -> Tensor:
    """Contiguous fp32 ``[..., count, E]`` to ``[..., E]``, in an order that only the count decides."""
    *groups, count, width = terms.shape
    out = terms.new_empty(*groups, width)
    grid = (out.numel() // width, triton.cdiv(width, 32))
    _sum_kernel[grid](terms, out, count, width, TERMS=64, COLUMNS=32, num_warps=4)
    return out


def sum_to_batch(rows: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Sum ``[B, M, E]`` over the batch where the operand had one row for all samples."""
    return (rows if rows.shape[0] == batch else rows.sum(0, keepdim=True)).to(dtype)
