"""``reelforge doctor``: what this machine has, what runs on it and why, what is missing and what that costs."""

import argparse

import av

from reelforge.engine.core import hardware, probe
from reelforge.engine.core.probe import Finding
from reelforge.stages.console import emit

# libx264 and libx265 inside PyAV are GPL; reelforge bundles neither.
_ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "h264_nvenc")


def findings() -> dict[str, list[Finding]]:
    """Everything the verb prints, by heading."""
    facts = hardware.hardware()
    machine = [Finding(name.replace("_", " "), str(value)) for name, value in facts.items()]
    machine.append(_precision_advice(facts))
    versions = [Finding(name, version) for name, version in hardware.versions().items()]
    return {
        "Machine": machine,
        "Versions": versions,
        "Kernels": [*probe.kernels(), probe.cuda_library()],
        "Optional packages": probe.optional_packages(),
        "Video encoders": _encoders(),
    }


def _precision_advice(facts: dict[str, object]) -> Finding:
    if "gpu" in facts:
        return Finding("precision", "bf16 on the GPU")
    if facts["bf16_instructions"]:
        return Finding("precision", "bf16 autocast", "this CPU multiplies bf16 natively")
    return Finding("precision", "fp32", 'this CPU has no bf16 instructions: set precision = "fp32"')


def _encoders() -> list[Finding]:
    return [Finding(name, "usable" if name in av.codecs_available else "missing") for name in _ENCODERS]


def main(_: argparse.Namespace) -> int:
    for heading, lines in findings().items():
        emit(f"{heading}")
        width = max(len(line.subject) for line in lines)
        for line in lines:
            emit(f"  {line.subject:<{width}}  {line.state}" + (f"  ({line.consequence})" if line.consequence else ""))
    return 0
