"""What is usable on this machine: optional packages by a real import, the CUDA library by loading it.

A package that is installed is not yet one that works (transformer-engine installs an empty shell where it cannot
build), so nothing here trusts ``find_spec``.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from reelforge.kernels import dispatch
from reelforge.kernels.backends import sm90


@dataclass(frozen=True)
class Finding:
    """One line of ``reelforge doctor``.

    Attributes:
        subject: what was looked at.
        state: what was found.
        consequence: what that means for a run; empty where nothing follows.
    """

    subject: str
    state: str
    consequence: str = ""


_OPTIONAL = {
    "diffusers": "needed for Wan's own VAE: pip install 'reelforge[wan]'",
    "transformers": "needed for UMT5: pip install 'reelforge[wan]'",
    "triton": "fused GPU kernels; CPU runs do without",
    "flash_attn": "an attention backend for GPUs; torch's own runs instead",
    "transformer_engine.pytorch": "a peer in benchmarks; nothing depends on it",
}


def optional_packages() -> list[Finding]:
    """Import each optional package and say what its absence costs."""
    return [_try_import(name, cost) for name, cost in _OPTIONAL.items()]


def _try_import(name: str, cost: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        return Finding(name, f"not usable ({type(error).__name__}: {str(error).splitlines()[0][:80]})", cost)
    return Finding(name, str(vars(module).get("__version__", "importable")))


def kernels() -> list[Finding]:
    """What runs for each fused op on this machine, and why not something better."""
    dispatch.load()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        Finding(choice.op, choice.name, "; ".join(f"not {name}: {reason}" for name, reason in choice.passed_over))
        for choice in dispatch.explain(device)
    ]


def pin_kernels(pins: Iterable[tuple[str, str]]) -> None:
    """Force implementations, as (op, implementation).

    Raises:
        KernelError: an op or implementation that does not exist.
    """
    dispatch.load()
    for op, implementation in pins:
        dispatch.pin(op, implementation)


def cuda_library() -> Finding:
    """The library that CMake built from csrc/, if it did and it loads."""
    found = sm90.library()
    if isinstance(found, str):
        return Finding("CUDA library (sm_90a)", "not usable", found)
    runtime = found.reelforge_cuda_runtime_version()
    devices = found.reelforge_hopper_device_count()
    state = f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    if devices < 0:
        return Finding("CUDA library (sm_90a)", state, f"no usable driver here (CUDA error {-devices}); it stays idle")
    return Finding("CUDA library (sm_90a)", state, f"{devices} Hopper devices")
