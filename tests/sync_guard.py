"""Finds host synchronisation without a GPU: operators on fake CUDA tensors that would make the host wait, or copy."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A model with every part of Wan's, and the height and width of its latents.
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 2,
}
SIZE = (8, 8)

_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_MASKED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class HostSync(AssertionError):
    """An operator on the hot path makes the host wait for the device."""


class SyncGuard(TorchDispatchMode):
    """Raises :class:`HostSync` at an operator that reads the device from the host, or copies between them.

    Attributes:
        watched: names of the operators it saw pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[str] = []

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Scalars of the host go into a kernel's arguments; only a copy of one is a transfer.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {tensor.device.type for tensor in tensors if tensor.ndim or operator in _COPIES}
        if operator in _WAITING or (operator in _MASKED and _has_mask(args[1])):
            raise HostSync(f"{operator} waits for the device")
        result = operator(*args, **kwargs)
        after = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if before and after - before or len(before) > 1:
            raise HostSync(f"{operator} copies between {sorted(before | after)}")
        self.watched.append(str(operator))
        return result


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors have shapes but no storage, and a CUDA device need not exist; forward passes only."""
    _allow_fake_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def _allow_fake_cuda() -> None:
    """Give a torch without CUDA the meta device's guard for it, one that does nothing: slicing asks for a guard.

    torch does so itself in a CUDA build on a machine without a GPU (``_ensureCUDADeviceGuardSet``).
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if not guards[cuda]:
        guards[cuda] = guards[meta]
