"""e4m3 with scales: x is kept as round(x / s), at most 448, and s = max |x| / 448 over the elements that share s.

Elements share a scale along the last dimension: a whole row (a token of an activation, an output channel of a weight),
or groups of 128. The format is floating, so a scale twice too large costs nothing but the smallest values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels.errors import KernelError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
GROUP = 128
# A row of zeros gets the scale of this: 0 / s stays 0, and no quotient is NaN.
SMALLEST_MAX = 1e-12
_LARGEST, _SMALLEST_MAX = tl.constexpr(LARGEST), tl.constexpr(SMALLEST_MAX)


def scale_of(largest: Tensor) -> Tensor:
    """The scale in fp32 or wider for elements of at most ``largest``."""
    wide = torch.promote_types(largest.dtype, torch.float32)
    return largest.to(wide).clamp(min=SMALLEST_MAX) / LARGEST


def round_e4m3(x: Tensor) -> Tensor:
    """To the nearest e4m3, even at a tie; what is larger than 448 becomes 448, which no cast promises."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def quantise(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """The plain form: ``[..., K]`` to e4m3 of that shape and scales ``[..., K / group]``, one a row without a group."""
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group or x.shape[-1]))
    scale = scale_of(grouped.abs().amax(-1))
    return round_e4m3(grouped / scale[..., None]).flatten(-2), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`quantise` but for the rounding, in the scales' dtype."""
    grouped = values.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale[..., None]).flatten(-2)


def check_operands(op: str, device: torch.device, *wanted: tuple[str, Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Every (name, tensor, shape, dtype) is contiguous, of that shape and dtype, and on ``device``.

    Raises:
        KernelError: one is anything else.
    """
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            raise KernelError(
                f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides "
                f"{tensor.stride()}.",
                f"It must be contiguous {dtype} {shape} on {device}.",
            )


# -- in a kernel ----------------------------------------------------------------------------------------------------


@triton.jit
def e4m3_scale(largest):
    """:func:`scale_of`."""
    return tl.maximum(largest, _SMALLEST_MAX) / _LARGEST


@triton.jit
def to_e4m3(x):
    """:func:`round_e4m3`."""
    return tl.clamp(x, -_LARGEST, _LARGEST).to(tl.float8e4nv)
