"""How kernels that work row by row tile ``[B, L, E]``: tokens of one modulation row, several at a time.

A program keeps the rows of gain and shift in registers and walks ``steps`` tiles of ``rows`` tokens: those rows are
fp32 and four times a token's bf16 bytes, so fetching them again for each token would make L2 the bottleneck.
"""

from dataclasses import dataclass

import triton
from torch import Tensor

from reelforge.kernels.errors import KernelError

MAX_WIDTH = 8192


@dataclass(frozen=True)
class RowTile:
    """Launch of a row kernel.

    Attributes:
        block: columns of the tile, a power of two of at least E.
        rows: tokens in a tile.
        warps: of the program; a thread holds 16 to 32 columns.
    """

    block: int
    rows: int
    warps: int


def row_tile(op: str, width: int) -> RowTile:
    """The tile for rows of ``width`` columns: 8,192 elements, 32 a thread.

    Raises:
        KernelError: the width is above :data:`MAX_WIDTH`.
    """
    if width > MAX_WIDTH:
        raise KernelError(f"{op} got rows of {width} columns.", f"Its kernel takes at most {MAX_WIDTH}; pin torch.")
    block = max(triton.next_power_of_2(width), 64)
    rows = min(MAX_WIDTH // block, 16)
    return RowTile(block, rows, max(1, min(8, block * rows // 1024)))


def check_tokens(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """A contiguous ``[B, L, E]`` operand with the shape and device of ``like``.

    Raises:
        KernelError: it is anything else.
    """
    if tensor.shape != like.shape or tensor.device != like.device:
        raise KernelError(
            f"{op}: {name} is {tuple(tensor.shape)} on {tensor.device}.",
            f"It must be {tuple(like.shape)} on {like.device}.",
        )
    if not tensor.is_contiguous():
        raise KernelError(f"{op}: {name} has strides {tensor.stride()}.", "Its kernel takes contiguous tokens.")


def row_strides(op: str, name: str, rows: Tensor, like: Tensor) -> tuple[int, int, int]:
    """Batch stride, row stride and tokens per row of per-frame rows ``[B or 1, M, E]`` for tokens ``[B, L, E]``.

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
    return (rows.stride(0) if rows.shape[0] > 1 else 0), rows.stride(1), tokens // rows.shape[1]
