"""Exponential moving average of weights, in place: shadow <- shadow + weight (live - shadow).

A weight of 0 leaves every bit of the shadow as it is, whatever the live values are: a training step that went wrong is
averaged in with weight 0, without asking the device whether it did.
"""

import sys
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError

LIVE_DTYPES = (torch.float32, torch.bfloat16)
_CHUNK = 32  # tensors per foreach call: bounds the temporary difference
_BLOCK, _WARPS = 2048, 4  # 16 elements a thread


@torch.no_grad()
def ema_lerp(shadows: Sequence[Tensor], lives: Sequence[Tensor], weight: Tensor) -> None:
    """Average the live values in.

    Args:
        shadows: fp32, any shapes; changed in place.
        lives: their values now, of the same shapes, fp32 or bf16.
        weight: scalar tensor on their device, fp32.

    Raises:
        KernelError: lists or shapes that do not go together, a pinned implementation that does not fit, or a layout
            it does not take.
    """
    if len(shadows) != len(lives):
        raise KernelError(f"ema_lerp got {len(shadows)} shadows and {len(lives)} lives.", "Pair them.")
    for shadow, live in zip(shadows, lives, strict=True):
        if live.shape != shadow.shape or live.device != shadow.device:
            raise KernelError(
                f"ema_lerp: live is {tuple(live.shape)} on {live.device}.",
                f"It must be {tuple(shadow.shape)} on {shadow.device}.",
            )
    if not shadows:
        return
    if dispatch.choose("ema_lerp", dispatch.Query.of(shadows[0])) == dispatch.REFERENCE:
        reference(shadows, lives, weight)
    else:
        _op(shadows, lives, weight)


def reference(shadows: Sequence[Tensor], lives: Sequence[Tensor], weight: Tensor) -> None:
    """The formula in torch, any floating dtype."""
    on_cpu, none = weight.device.type == "cpu", weight == 0
    if on_cpu and none:  # elsewhere the host would wait for the device
        return
    for start in range(0, len(shadows), _CHUNK):
        part = slice(start, start + _CHUNK)
        averaged = list(shadows[part])
        difference = torch._foreach_sub(list(lives[part]), averaged)
        torch._foreach_mul_(difference, weight)
        if not on_cpu:
            for step in difference:
                step.masked_fill_(none, -0.0)  # adding it changes no bit, that of -0 included
        torch._foreach_add_(averaged, difference)


@triton.jit
def _kernel(shadow_ptr, live_ptr, weight_ptr, count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < count - start
    weight = tl.broadcast_to(tl.load(weight_ptr), (BLOCK,))  # the interpreter cannot splat a comparison of scalars
    shadow = tl.load(shadow_ptr + start + at, inside, 0.0)
    live = tl.load(live_ptr + start + at, inside, 0.0).to(tl.float32)
    tl.store(shadow_ptr + start + at, shadow + weight * (live - shadow), inside & (weight != 0))


@kernel_op("ema_lerp", mutates=("shadows",), fake=lambda *_: None)
def _op(shadows: Sequence[Tensor], lives: Sequence[Tensor], weight: Tensor) -> None:
    """A launch for each tensor: of the 1.3B model's 825, the 304 largest hold 99.9 % of the bytes.

    One launch for all would need a table of pointers on the device, copied there again whenever storage is swapped.
    """
    if weight.numel() != 1 or weight.dtype != torch.float32 or weight.device != shadows[0].device:
        raise KernelError(
            f"ema_lerp: weight is {tuple(weight.shape)} {weight.dtype} on {weight.device}.",
            f"It must be a torch.float32 scalar on {shadows[0].device}.",
        )
    for pair in zip(shadows, lives, strict=True):
        _check(*pair)
    for shadow, live in zip(shadows, lives, strict=True):
        count = shadow.numel()
        _kernel[(triton.cdiv(count, _BLOCK),)](shadow, live, weight, count, BLOCK=_BLOCK, num_warps=_WARPS)


def _check(shadow: Tensor, live: Tensor) -> None:
    if shadow.dtype != torch.float32 or live.dtype not in LIVE_DTYPES:
        raise KernelError(
            f"ema_lerp: shadow is {shadow.dtype} and live is {live.dtype}.",
            f"They must be torch.float32 and one of {', '.join(map(str, LIVE_DTYPES))}.",
        )
    if not (shadow.is_contiguous() and live.is_contiguous()):
        strides = f"strides {shadow.stride()} and live {live.stride()}"
        raise KernelError(f"ema_lerp: shadow has {strides}.", "Its kernel takes contiguous tensors.")


dispatch.register("ema_lerp", "triton", dispatch.needs_triton(torch.float32), sys.modules[__name__])
