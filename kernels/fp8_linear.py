"""A linear on e4m3 operands: y = x weight^T + bias, each operand's scales multiplied back in fp32.

Two ways to share scales. By rows: one a token of x, one an output channel; cheapest, for inputs that a norm made even.
By groups: one a token's 128 channels, one a 128 x 128 of the weight, and an accumulator promoted at every 128: for
inputs with heavy tails, attention's output (a head is a group) and what follows GELU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import GROUP, quantise, round_e4m3, scale_of

_ALIGNED = 4  # cuBLASLt reads rows of group scales 16 bytes at a time


def quantise_weight(weight: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """``[N, K]`` to e4m3 and scales: ``[N, 1]``, or ``[N / 128, K / 128]`` filled with zeros to a multiple of 4.

    Raises:
        KernelError: a size that the tensor cores do not take.
    """
    size = GROUP if grouped else 16
    if any(n % size for n in weight.shape):
        raise KernelError(f"A weight of {tuple(weight.shape)} cannot be e4m3.", f"Both must be multiples of {size}.")
    if not grouped:
        return quantise(weight)
    blocks = weight.float().unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))  # [N / 128, 128, K / 128, 128]
    scale = scale_of(blocks.abs().amax((1, 3)))
    values = round_e4m3(blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return values, F.pad(scale, (0, -scale.shape[1] % _ALIGNED))


def fp8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply.

    Args:
        x: e4m3 ``[M, K]``.
        x_scale: fp32 ``[M, 1]`` or ``[M, K / 128]``.
        weight: e4m3 ``[N, K]``; ``weight_scale`` as :func:`quantise_weight` shares it, the same way as x.
        bias: ``[N]``, added in fp32.

    Returns:
        bf16 ``[M, N]``.

    Raises:
        KernelError: scales of another sharing, or a pinned implementation that does not fit.
    """
    grouped = weight_scale.shape[0] != weight.shape[0]
    if x_scale.shape != (x.shape[0], x.shape[1] // GROUP if grouped else 1):
        raise KernelError(
            f"fp8_linear: x is {tuple(x.shape)} with scales {tuple(x_scale.shape)}, those of the weight "
            f"{tuple(weight.shape)} are {tuple(weight_scale.shape)}.",
            "Share both by rows or both by groups.",
        )
    if dispatch.choose("fp8_linear", dispatch.Query.of(x)) == dispatch.REFERENCE:
        return reference(x, x_scale, weight, weight_scale, bias).to(torch.bfloat16)
    return (_by_groups if grouped else _by_rows)(x, x_scale, weight, weight_scale, bias)


def reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in the dtype of ``x_scale``, summed 128 channels at a time."""
    wide = x_scale.dtype
    if weight_scale.shape[0] == weight.shape[0]:
        factors = [x_scale * weight_scale.T] * -(-x.shape[1] // GROUP)
    else:
        channels = weight_scale.repeat_interleave(GROUP, 0).T[:, None]
        factors = [one[:, None] * other for one, other in zip(x_scale.T, channels, strict=False)]
    y = x.new_zeros(x.shape[0], weight.shape[0], dtype=wide)
    for part, rows, factor in zip(x.split(GROUP, 1), weight.split(GROUP, 1), factors, strict=True):
        y += part.to(wide) @ rows.to(wide).T * factor
    return y if bias is None else y + bias.to(wide)


def _by_rows(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    kind = F.ScalingType.RowWise
    half = None if bias is None else bias.to(torch.bfloat16)
    return F.scaled_mm(x, weight.T, x_scale, kind, weight_scale.T, kind, bias=half, use_fast_accum=True)


def _by_groups(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Scales of x with tokens contiguous, their number a multiple of 4."""
    rows = len(x)
    if rows % _ALIGNED:
        x, x_scale = (F.pad(tensor, (0, 0, 0, -rows % _ALIGNED)) for tensor in (x.view(torch.uint8), x_scale))
    kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    y = F.scaled_mm(x.view(weight.dtype), weight.T, x_scale.T.contiguous().T, kinds[0], weight_scale.T, kinds[1])[:rows]
    return y if bias is None else (y + bias.float()).to(y.dtype)


def _unfit(query: dispatch.Query) -> str | None:
    if query.device != "cuda":
        return f"it needs a CUDA device, not {query.device}"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    found = dispatch.hardware_class()
    return f"compute capability {found} is not 9.0" if found and found != "9.0" else None


dispatch.register("fp8_linear", "scaled_mm", _unfit)
