"""What a run ran on: versions, processor, accelerator. Goes into run.json and results.json."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "safetensors",
    "av",
    "diffusers",
    "transformers",
    "flash-attn",
    "transformer-engine",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers and speed; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in ("reelforge", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, threads, and the CUDA device if there is one."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": has_bf16_instructions(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return facts


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_info().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bf16 natively; without it, autocast on CPU is slower than fp32."""
    return "avx512_bf16" in _cpu_info() or "amx_bf16" in _cpu_info()


def git_revision() -> str | None:
    """Commit of the source tree, ``+dirty`` when it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
