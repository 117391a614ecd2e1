"""Softmax attention without a mask: softmax(q k^T / sqrt(D)) v.

Causality is never a mask here. Chunk-causal layouts call this once per dense rectangle of queries and keys, so
no mask object is built, cached or recompiled, and no masked score is computed. Keys and values may be views of a
cache, ``[B, visible, N, D]`` of ``[B, capacity, N, D]``: every implementation reads them where they lie, by strides.

Implementations, best first, as published rates on Hopper rank them: FlashAttention 3 where it is installed, cuDNN, our
Triton forward, FlashAttention 2, torch's own choice.
"""

import importlib
import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.kernels import attention_triton, dispatch
from reelforge.kernels.errors import KernelError

# Up to this many scores a head, three plain matmuls beat torch's CPU attention: its bf16 backward takes about half
# of a training step at 80 tokens.
_EXPLICIT_MAX_SCORES = 128 * 128
# The reference's scores a head at once: 400 MB in fp64 for 12 heads.
_REFERENCE_SCORES = 1 << 22


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend every query to every key; under autocast in its dtype, as torch's own attention.

    Args:
        q: ``[B, Lq, N, D]``, D contiguous.
        k: ``[B, Lk, N, D]``; ``v`` likewise.

    Returns:
        ``[B, Lq, N, D]`` in the operands' dtype.

    Raises:
        KernelError: shapes, dtypes or devices that do not match, a layout that the implementation does not take, or a
            pinned implementation that does not fit.
    """
    q, k, v = _autocast(q, k, v)
    _check(q, k, v)
    name = dispatch.choose("attention", dispatch.Query.of(q, k, v, head_dim=q.shape[-1]))
    return _RUN[name](q, k, v)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in fp32 or wider, some rows of queries at a time: never all scores at once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (tensor.transpose(1, 2).to(wide) for tensor in (q, k, v))
    rows = queries.split(max(1, _REFERENCE_SCORES // k.shape[1]), dim=2)
    return torch.cat([explicit_attention(part, keys, values) for part in rows], dim=2).transpose(1, 2).to(q.dtype)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula itself on ``[B, N, L, D]``; softmax in fp32 or wider."""
    scores = torch.matmul(q, k.transpose(-2, -1))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.to(wide) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.matmul(weights.to(v.dtype), v)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The casts that autocast applies to torch's attention; operators that it does not know get none from it."""
    device = q.device.type
    if q.dtype == k.dtype == v.dtype != torch.float32 or device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    sizes = q.shape
    if q.ndim != 4 or k.shape != v.shape or k.shape != (sizes[0], k.shape[1], *sizes[2:]) or not k.shape[1]:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (("q", q), ("k", k), ("v", v)))
        raise KernelError(f"attention got {shapes}.", "It takes q [B, Lq, N, D] and k and v [B, Lk, N, D], Lk >= 1.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (q, k, v))
        raise KernelError(f"attention got q, k, v of {kinds}.", "All three must agree: cast or move them.")


# -- implementations, each on [B, L, N, D] --------------------------------------------------------------------------


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_triton.forward(q, k, v)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's choice: flash on CUDA, which takes strides; on the CPU plain matmuls where those are faster."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= _EXPLICIT_MAX_SCORES:
        return explicit_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN by the operator that SDPA would call, differentiable and known to torch.compile.

    ``torch.nn.attention.sdpa_kernel`` switches global flags, 8 to 11 us a call, and SDPA then checks them again. The
    first call of given shapes and strides builds a plan, so it must come before a graph's capture; the strides are
    those of the views. The backward sums dq with atomics.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if needs_grad and strict:
        raise KernelError("cuDNN's attention has no deterministic backward.", "Pin attention to sdpa.")
    if k.shape[1] == 1:  # no plan of cuDNN's takes one key
        return _sdpa(q, k, v)
    _check_alignment("cudnn", q, k, v)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs_grad)
    return found[0].transpose(1, 2)


def _flash_attn(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check_alignment(name, q, k, v)
    return _package(name).attention(q, k, v)  # type: ignore[union-attr]


def _check_alignment(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Rows that start on 16 bytes: the libraries assume it, and do not check every pointer."""
    for operand, tensor in (("q", q), ("k", k), ("v", v)):
        offset, strides = tensor.storage_offset(), tensor.stride()
        if strides[3] != 1 or any(step % 8 for step in (offset, *strides[:3])):
            raise KernelError(
                f"attention: {operand} starts at element {offset} of its storage with strides {strides}.",
                f"{name} takes D contiguous and rows on multiples of 8 elements: copy it, or pin attention to sdpa.",
            )


@cache
def _package(name: str) -> ModuleType | str:
    """The adapter to an optional package, or the first line of why it does not import."""
    try:
        return importlib.import_module(f"reelforge.kernels.backends.{name}")
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).partition("\n")[0]


def _unfit(query: dispatch.Query, max_head_dim: int, capabilities: tuple[float, float]) -> str | None:
    """Why a library's 16-bit kernels cannot serve a query."""
    if query.device != "cuda":
        return f"it needs a CUDA device, not {query.device}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype} is not torch.bfloat16 or torch.float16"
    if query.head_dim % 8 or query.head_dim > max_head_dim:
        return f"head_dim {query.head_dim} is not a multiple of 8 up to {max_head_dim}"
    found = dispatch.hardware_class()
    if found and not capabilities[0] <= float(found) <= capabilities[1]:
        return f"compute capability {found} is not within {capabilities[0]} to {capabilities[1]}"
    return None


def _cudnn_unfit(query: dispatch.Query) -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if query.device == "cuda" and (version or 0) < 90000:
        return f"cuDNN 9 is needed, found {version}"
    return _unfit(query, 128, (8.0, math.inf))


def _flash_attn_unfit(name: str, capabilities: tuple[float, float], query: dispatch.Query) -> str | None:
    reason = _unfit(query, 256, capabilities)
    if reason is None and isinstance(package := _package(name), str):
        return f"it does not import: {package}"
    return reason


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash_attn_3": partial(_flash_attn, "flash_attn_3"),
    "cudnn": _cudnn,
    "triton": _triton,
    "flash_attn_2": partial(_flash_attn, "flash_attn_2"),
    "sdpa": _sdpa,
    dispatch.REFERENCE: reference,
}
dispatch.register("attention", "flash_attn_3", partial(_flash_attn_unfit, "flash_attn_3", (9.0, 9.0)))
dispatch.register("attention", "cudnn", _cudnn_unfit)
dispatch.register("attention", "triton", attention_triton.unfit, attention_triton)
dispatch.register("attention", "flash_attn_2", partial(_flash_attn_unfit, "flash_attn_2", (8.0, math.inf)))
dispatch.register("attention", "sdpa", lambda query: None)
