"""The CUDA C++ library for Hopper, built by CMake from ``csrc/``: loaded when first asked for, absent without harm.

It has a plain C interface, so it neither depends on torch's headers nor on its version: a call passes pointers,
sizes and the current stream, and gets a cudaError_t back.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reelforge.kernels
from reelforge.kernels import dispatch
from reelforge.kernels.errors import KernelError

# Hash of csrc/ as CMakeLists.txt makes it: a library of other sources is not called. A proof of these kernels covers
# this file, and so their sources too.
SOURCES = "b01c55b760be0259"
_VELOCITY_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unfit(query: dispatch.Query) -> str | None:
    """Why the library cannot serve a query; None when it can."""
    if query.grad:
        return "it records no gradient"
    if query.dtype != torch.float32:
        return f"{query.dtype} is not torch.float32"
    if query.device != "cuda":
        return f"it needs a CUDA device, not {query.device}"
    if dispatch.hardware_class() != "9.0":
        return f"it is compiled for compute capability 9.0, not {dispatch.hardware_class() or 'unknown'}"
    found = library()
    return found if isinstance(found, str) else None


@cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none to call."""
    paths = [path for root in reelforge.kernels.__path__ for path in Path(root).glob("lib/libreelforge_sm90a.so")]
    if not paths:
        return "the CUDA library was not built: install with nvcc 12.3 or newer on PATH"
    try:
        return _declared(ctypes.CDLL(str(paths[0])))
    except (OSError, AttributeError) as error:
        return f"the CUDA library does not load: {error}"


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL | str:
    loaded.reelforge_sources.restype = ctypes.c_char_p
    if loaded.reelforge_sources() != SOURCES.encode():
        return "the CUDA library was built from other sources: install again"
    sizes: list[Any] = [ctypes.c_float, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    loaded.reelforge_sde_fork.argtypes = [ctypes.c_void_p] * 10 + sizes + [ctypes.c_void_p]
    return loaded


def sde_fork(
    x: Tensor, velocity: Tensor, v_uncond: Tensor | None, a: Tensor, b: Tensor, std: Tensor, keys: Tensor | None,
    offsets: Tensor | None, out: Tensor, guided: Tensor | None, guidance_scale: float, count: int, members: int,
) -> None:  # fmt: skip
    """:func:`reelforge.kernels.sde_step.fork` into ``out`` ``[R,...]`` and ``guided``.

    Raises:
        KernelError: no library, operands it cannot read, or an error of the launch.
    """
    tensors = {
        "x": x, "velocity": velocity, "v_uncond": v_uncond, "a": a, "b": b, "std": std, "keys": keys,
        "offsets": offsets, "out": out, "guided": guided,
    }  # fmt: skip
    pointers = [_pointer("sde_step", name, tensor) for name, tensor in tensors.items()]
    dtypes = {tensor.dtype for tensor in (velocity, v_uncond) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= _VELOCITY_DTYPES.keys():
        raise KernelError(
            f"sde_step: velocities are {' and '.join(map(str, dtypes))}.",
            f"The CUDA kernel takes one of {', '.join(map(str, _VELOCITY_DTYPES))} for both; pin triton or torch.",
        )
    found = library()
    if isinstance(found, str):
        raise KernelError(f"sde_step: {found}.", "Or pin triton or torch.")
    code = _VELOCITY_DTYPES[velocity.dtype]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = found.reelforge_sde_fork(*pointers, guidance_scale, count, len(x), members, code, stream)
    if error:
        raise KernelError(f"sde_step: the CUDA library returned error {error} on {x.device}.", "Pin triton or torch.")


def _pointer(op: str, name: str, tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor.

    Raises:
        KernelError: it is not contiguous, or not aligned to its elements.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise KernelError(f"{op}: {name} has strides {tensor.stride()}.", "The CUDA kernel takes contiguous tensors.")
    if tensor.data_ptr() % tensor.element_size():
        raise KernelError(
            f"{op}: {name} starts at {tensor.data_ptr():#x}.", f"It must be aligned to {tensor.element_size()} bytes."
        )
    return tensor.data_ptr()
