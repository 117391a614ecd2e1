"""Rounding of Triton's interpreter, repaired for tests.

Triton 3.6 and 3.9 interpret a cast to bf16 as truncation, casts to fp8 that wrap on overflow, and ``tl.dot`` on bf16
as a product of the raw bit patterns. The GPU rounds to nearest even and saturates fp8 (``cvt.rn.satfinite``), which is
what torch's CPU casts do, so :func:`repaired` sends casts and dot operands through those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# Triton's type: torch's, an integer type of its width, and the numpy type the interpreter stores it in.
_TYPES = {
    tl.float64: (torch.float64, np.int64, np.float64),
    tl.float32: (torch.float32, np.int32, np.float32),
    tl.float16: (torch.float16, np.int16, np.float16),
    tl.bfloat16: (torch.bfloat16, np.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8, np.uint8),
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_NATIVE = (tl.float64, tl.float32, tl.float16)
_METHODS = ("cast_impl", "create_fp_to_fp", "create_fp_trunc", "create_fp_ext", "create_dot")
_builder = interpreter.InterpreterBuilder
_originals = {name: getattr(_builder, name) for name in _METHODS}


def _cast(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    dtype, bits, _ = _TYPES[source]
    flat = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(bits).copy()).view(dtype)
    if target in _LARGEST:
        flat = flat.float().clamp(-_LARGEST[target], _LARGEST[target])
    dtype, bits, stored = _TYPES[target]
    as_bits = flat.to(dtype).view(getattr(torch, np.dtype(bits).name))
    return as_bits.numpy().view(stored).reshape(np.shape(data))


def _cast_impl(self: Any, source: Any, target_type: Any) -> Any:
    before, after = source.dtype.scalar, target_type.scalar
    if before in _TYPES and after in _TYPES and before != after:
        return interpreter.TensorHandle(_cast(source.data, before, after), after)
    return _originals["cast_impl"](self, source, target_type)


def _create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
    def operand(handle: Any) -> np.ndarray:
        kind = handle.dtype.scalar
        return handle.data if kind in _NATIVE else _cast(handle.data, kind, tl.float32)

    product = np.matmul(operand(a), operand(b), dtype=accumulator.data.dtype)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def repair() -> None:
    """Casts and dots as the GPU computes them."""
    _builder.cast_impl = _cast_impl
    _builder.create_fp_to_fp = lambda self, source, target, rounding=None: _cast_impl(self, source, target)
    _builder.create_fp_trunc = _builder.create_fp_ext = _cast_impl
    _builder.create_dot = _create_dot


@contextmanager
def unrepaired() -> Iterator[None]:
    """Triton's own interpreter, for the test that says whether it still needs the repair."""
    for name, method in _originals.items():
        setattr(_builder, name, method)
    try:
        yield
    finally:
        repair()
