"""``torch.library.custom_op`` for functions that launch kernels."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def kernel_op(
    name: str, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a launcher as ``reelforge::name``.

    Triton launches on the current device, which need not be the operands': the launcher runs under theirs.

    Args:
        name: of the operator.
        fake: makes empty results of the same operands, for tensors that have shapes alone.
        mutates: operands that it writes.
    """

    def register(launcher: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(launcher)
        def on_its_device(*operands: Any) -> Any:
            with torch.cuda.device_of(next(tensor for tensor in map(_tensor, operands) if tensor is not None)):
                return launcher(*operands)

        made = torch.library.custom_op(f"reelforge::{name}", on_its_device, mutates_args=tuple(mutates))
        made.register_fake(fake)
        return made

    return register


def _tensor(operand: Any) -> Tensor | None:
    first = operand[0] if isinstance(operand, Sequence) and operand else operand
    return first if isinstance(first, Tensor) else None
