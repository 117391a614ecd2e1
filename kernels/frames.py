"""Decoded pixels ``[B, 3, T, H, W]`` to bytes in one pass: RGB as images take it, or NV12 as video encoders do.

    RGB   round(127.5 (x + 1))
    NV12  with r, g, b = (x + 1) / 2:  luma = 0.2126 r + 0.7152 g + 0.0722 b
          Y = round(16 + 219 luma);  U = round(128 + 224 (b - luma) / 1.8556);  V = round(128 + 224 (r - luma) / 1.5748)

NV12 is ITU-R BT.709-6 (3.2 to 3.4) in its 8-bit narrow range; U and V are of the mean of 2 x 2 pixels. Pixels are
limited to [-1, 1] first, NaN becomes -1 (black), and ties round to even. Arithmetic is fp32, each operation rounded by
itself, so that the kernels give the reference's bits.
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RED, _GREEN, _BLUE = tl.constexpr(0.2126), tl.constexpr(0.7152), tl.constexpr(0.0722)
# The sums are over the four pixels of a chroma sample.
_U, _V = tl.constexpr(224.0 / 1.8556 / 4), tl.constexpr(224.0 / 1.5748 / 4)
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # adding it leaves the rounded integer in the low bits
_PIXELS = 2048  # of a tile, 16 a thread
_PAIRS, _COLUMNS = 16, 64  # row pairs and columns of an NV12 tile: 128-byte rows of bf16, 8 pixels a thread in each row
_WARPS = 4


def to_uint8(pixels: Tensor) -> Tensor:
    """RGB images.

    Args:
        pixels: ``[B, 3, T, H, W]`` in [-1, 1]; each plane ``[H, W]`` is contiguous.

    Returns:
        uint8 ``[B, T, H, W, 3]``, contiguous.

    Raises:
        KernelError: a pinned implementation does not fit, or a shape or layout it does not take.
    """
    _check(pixels)
    if dispatch.choose("frames", dispatch.Query.of(pixels)) == dispatch.REFERENCE:
        return reference_uint8(pixels)
    return _uint8_op(pixels)


def to_nv12(pixels: Tensor) -> Tensor:
    """Frames of H rows of Y and H / 2 rows in which U and V take turns.

    Args:
        pixels: ``[B, 3, T, H, W]`` in [-1, 1], H and W even; each plane ``[H, W]`` is contiguous.

    Returns:
        uint8 ``[B, T, 3 H / 2, W]``, contiguous.

    Raises:
        KernelError: an odd size, a pinned implementation that does not fit, or a shape or layout it does not take.
    """
    _check(pixels)
    if pixels.shape[3] % 2 or pixels.shape[4] % 2:
        size = "{} x {}".format(*pixels.shape[3:])
        raise KernelError(f"frames: NV12 of {size} pixels (height x width).", "Both must be even; to_uint8 takes any.")
    if dispatch.choose("frames", dispatch.Query.of(pixels)) == dispatch.REFERENCE:
        return reference_nv12(pixels)
    return _nv12_op(pixels)


def _check(pixels: Tensor) -> None:
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise KernelError(f"frames: pixels are {tuple(pixels.shape)}.", "They must be [B, 3, T, H, W].")


def reference_uint8(pixels: Tensor) -> Tensor:
    """RGB in torch, any floating dtype."""
    return _scaled(pixels, 255.0).round().byte().permute(0, 2, 3, 4, 1).contiguous()


def reference_nv12(pixels: Tensor) -> Tensor:
    """NV12 in torch, any floating dtype."""
    red, green, blue = _scaled(pixels, 1.0).unbind(1)
    luma = _RED.value * red + _GREEN.value * green + _BLUE.value * blue
    red, luma_sum, blue = _sum_of_four(red), _sum_of_four(luma), _sum_of_four(blue)
    chroma = torch.stack((128 + (blue - luma_sum) * _U.value, 128 + (red - luma_sum) * _V.value), dim=-1)
    return torch.cat((16 + 219 * luma, chroma.flatten(-2)), dim=-2).round().byte()


def _scaled(pixels: Tensor, top: float) -> Tensor:
    """[-1, 1] to [0, top]."""
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return ((wide + 1) * (top / 2)).nan_to_num(nan=0.0).clamp(0, top)


def _sum_of_four(plane: Tensor) -> Tensor:
    rows = plane[..., 0::2, :] + plane[..., 1::2, :]
    return rows[..., 0::2] + rows[..., 1::2]


@triton.jit
def _load_scaled(pointer, mask, top: tl.constexpr):
    x = (tl.load(pointer, mask, 0.0).to(tl.float32) + 1.0) * (top / 2)
    return tl.minimum(tl.where(x > 0.0, x, 0.0), top)  # NaN is not above 0


@triton.jit
def _rounded(x):
    return (x + _TO_INTEGER).to(tl.int32, bitcast=True) & 255


@triton.jit
def _frame(x_ptr, frame, frames, batch_stride, frame_stride):
    return x_ptr + (frame // frames).to(tl.int64) * batch_stride + (frame % frames).to(tl.int64) * frame_stride


@triton.jit
def _uint8_kernel(
    x_ptr, out_ptr, frames, pixels, batch_stride, colour_stride, frame_stride, PIXELS: tl.constexpr
):  # fmt: skip
    parts = tl.cdiv(pixels, PIXELS)
    frame, start = tl.program_id(0) // parts, tl.program_id(0) % parts * PIXELS
    at = tl.arange(0, PIXELS)
    mask = at < pixels - start
    red_ptr = _frame(x_ptr, frame, frames, batch_stride, frame_stride) + start + at
    green_ptr = red_ptr + colour_stride
    red, green = _rounded(_load_scaled(red_ptr, mask, 255.0)), _rounded(_load_scaled(green_ptr, mask, 255.0))
    blue = _rounded(_load_scaled(green_ptr + colour_stride, mask, 255.0))
    # Four pixels make three words. Put side by side in shared memory they leave as contiguous 16-byte stores, where
    # three byte stores a pixel would touch every sector three times.
    even, odd = tl.split(tl.reshape(red | (green << 8) | (blue << 16), (PIXELS // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    outer = tl.join(first | (second << 24), (third >> 16) | (fourth << 8))
    inner = (second >> 8) | (third << 16)
    words = tl.reshape(tl.join(outer, tl.join(inner, inner)), (PIXELS,))
    words = tl.gather(words, (at // 3 * 4 + at % 3) % PIXELS, 0)
    rgb = tl.reshape((words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.uint8), (4 * PIXELS,))
    to = tl.arange(0, 4 * PIXELS)
    out_ptr += (frame.to(tl.int64) * pixels + start) * 3
    tl.store(out_ptr + to, rgb, (to < 3 * PIXELS) & (to < 3 * (pixels - start)))


@triton.jit
def _sum_over_columns(rows, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = tl.split(tl.reshape(rows, (PAIRS, COLUMNS // 2, 2)))
    return left + right


@triton.jit
def _nv12_kernel(
    x_ptr, out_ptr, frames, height, width, batch_stride, colour_stride, frame_stride,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height // 2, PAIRS)
    tile = tl.program_id(0) // across
    frame = tile // down
    pair = (tile % down * PAIRS + tl.arange(0, PAIRS))[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (pair < height // 2) & (column < width)
    at = 2 * pair * width + column
    red_ptr = _frame(x_ptr, frame, frames, batch_stride, frame_stride) + at
    green_ptr = red_ptr + colour_stride
    blue_ptr = green_ptr + colour_stride
    red, red_below = _load_scaled(red_ptr, mask, 1.0), _load_scaled(red_ptr + width, mask, 1.0)
    green, green_below = _load_scaled(green_ptr, mask, 1.0), _load_scaled(green_ptr + width, mask, 1.0)
    blue, blue_below = _load_scaled(blue_ptr, mask, 1.0), _load_scaled(blue_ptr + width, mask, 1.0)
    luma = _RED * red + _GREEN * green + _BLUE * blue
    luma_below = _RED * red_below + _GREEN * green_below + _BLUE * blue_below
    out_ptr += frame.to(tl.int64) * (height // 2 * 3) * width
    tl.store(out_ptr + at, _rounded(16.0 + 219.0 * luma).to(tl.uint8), mask)
    tl.store(out_ptr + at + width, _rounded(16.0 + 219.0 * luma_below).to(tl.uint8), mask)
    luma_sum = _sum_over_columns(luma + luma_below, PAIRS, COLUMNS)
    u = 128.0 + (_sum_over_columns(blue + blue_below, PAIRS, COLUMNS) - luma_sum) * _U
    v = 128.0 + (_sum_over_columns(red + red_below, PAIRS, COLUMNS) - luma_sum) * _V
    chroma = _rounded(tl.reshape(tl.join(u, v), (PAIRS, COLUMNS)))
    tl.store(out_ptr + (height + pair) * width + column, chroma.to(tl.uint8), mask)


def _strides(pixels: Tensor) -> tuple[int, int, int]:
    """Batch, colour and frame stride.

    Raises:
        KernelError: a plane is not contiguous.
    """
    if pixels.stride(4) != 1 or pixels.stride(3) != pixels.shape[4]:
        raise KernelError(f"frames: pixels have strides {pixels.stride()}.", "Each plane [H, W] must be contiguous.")
    return pixels.stride(0), pixels.stride(1), pixels.stride(2)


def _rgb(pixels: Tensor) -> Tensor:
    batch, colours, frames, height, width = pixels.shape
    return pixels.new_empty(batch, frames, height, width, colours, dtype=torch.uint8)


def _nv12(pixels: Tensor) -> Tensor:
    batch, _, frames, height, width = pixels.shape
    return pixels.new_empty(batch, frames, height // 2 * 3, width, dtype=torch.uint8)


@kernel_op("frames_uint8", fake=_rgb)
def _uint8_op(pixels: Tensor) -> Tensor:
    batch, _, frames, height, width = pixels.shape
    out = _rgb(pixels)
    grid = (batch * frames * triton.cdiv(height * width, _PIXELS),)
    _uint8_kernel[grid](
        pixels, out, frames, height * width, *_strides(pixels),
        PIXELS=_PIXELS, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@kernel_op("frames_nv12", fake=_nv12)
def _nv12_op(pixels: Tensor) -> Tensor:
    batch, _, frames, height, width = pixels.shape
    out = _nv12(pixels)
    grid = (batch * frames * triton.cdiv(height // 2, _PAIRS) * triton.cdiv(width, _COLUMNS),)
    _nv12_kernel[grid](
        pixels, out, frames, height, width, *_strides(pixels),
        PAIRS=_PAIRS, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


dispatch.register("frames", "triton", dispatch.needs_triton(*DTYPES), sys.modules[__name__])
