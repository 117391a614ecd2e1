"""Other people's attention, at its best settings, on this machine: what ours is held against.

Every peer takes q, k and v as ``[B, L, N, D]`` and gives ``[B, L, N, D]``; what it needs besides (a transpose, a
quantisation) is inside its timer. Packages are tried by importing them and are no dependency.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from reelforge.bench import cost
from reelforge.bench.arms import FAILURES, compile_op
from reelforge.bench.cases.case import Case, Draw, Op, Operands
from reelforge.kernels.attention import explicit_attention

OP = "attention peers"
HEAD_DIM = 128
HEADS = {"1.3B": 12, "14B": 40}
SIZES = ((32760, 32760), (4680, 4680), (4680, 18720), (4680, 32760), (1560, 32760))
SMALL = ((24, 40),)
_CHECKED_ROWS = 64  # the exact result of all rows would take minutes
_TOLERANCE = 8e-3  # bf16 probabilities and results


def cases(peers: Mapping[str, Op], *, small: bool = False) -> list[Case]:
    """Attention at a model's heads and a stream's lengths, the most expensive last."""
    found = [_case(model, *size, peers) for size in (SMALL if small else SIZES) for model in HEADS]
    return sorted(found, key=lambda case: case.work.flops)


def _case(model: str, queries: int, keys: int, peers: Mapping[str, Op]) -> Case:
    heads = HEADS[model]

    def inputs(draw: Draw) -> Operands:
        return (
            draw(1, queries, heads, HEAD_DIM),
            draw(1, keys, heads, HEAD_DIM),
            draw(1, keys, heads, HEAD_DIM),
        )

    def exact(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        rows = torch.linspace(0, queries - 1, min(_CHECKED_ROWS, queries), device=outputs[0].device).long()
        q, k, v = (tensor.transpose(1, 2) for tensor in operands if tensor is not None)
        parts = [
            explicit_attention(q[:, head, rows].double(), k[:, head].double(), v[:, head].double())
            for head in range(heads)
        ]
        return outputs[0][:, rows], torch.stack(parts, dim=2)

    work = cost.attention(queries, keys, heads, HEAD_DIM, torch.bfloat16)
    label = f"{model} {queries}x{keys}"
    return Case(OP, label, inputs, sdpa, sdpa, work, _TOLERANCE, peers=peers, exact=exact)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def forced(backend: SDPBackend) -> Op:
    """SDPA by one backend; an error where that does not fit."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attend


def _flex() -> Op:
    """FlexAttention as its users call it: compiled, without a mask."""
    compiled = compile_op(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    return attend


def available(device: torch.device) -> tuple[dict[str, Op], list[str]]:
    """The peers that run here by name, and why each other one does not."""
    if device.type != "cuda":
        return {"sdpa": sdpa}, ["the others: no CUDA device"]
    found: dict[str, Op] = {
        "cudnn": forced(SDPBackend.CUDNN_ATTENTION),
        "flash": forced(SDPBackend.FLASH_ATTENTION),
        "flex": _flex(),
    }
    missing = []
    for module, (name, adapt) in _PACKAGES.items():
        try:
            found[name] = adapt(importlib.import_module(module))
        except FAILURES as error:
            missing.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    return found, missing


def _flash_attn_2(module: ModuleType) -> Op:
    return module.flash_attn_func


def _flash_attn_3(module: ModuleType) -> Op:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = module.flash_attn_func(q, k, v)
        return result[0] if isinstance(result, tuple) else result

    return attend


def _sage(module: ModuleType) -> Op:
    """8-bit: its quantisers are inside the timer."""
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="NHD")


def _xformers(module: ModuleType) -> Op:
    return module.memory_efficient_attention


def _transformer_engine(module: ModuleType) -> Op:
    attention = {heads: module.DotProductAttention(heads, HEAD_DIM, qkv_format="bshd", attn_mask_type="no_mask")
                 for heads in HEADS.values()}  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention[q.shape[2]](q, k, v).unflatten(-1, q.shape[2:])

    return attend


_PACKAGES: dict[str, tuple[str, Callable[[ModuleType], Op]]] = {
    "flash_attn": ("flash_attn 2", _flash_attn_2),
    "flash_attn_interface": ("flash_attn 3", _flash_attn_3),
    "sageattention": ("sage", _sage),
    "xformers.ops": ("xformers", _xformers),
    "transformer_engine.pytorch": ("transformer_engine", _transformer_engine),
}
