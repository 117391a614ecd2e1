"""Who measured: the facts of hardware, software and source that go into every record."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

import torch

from reelforge.bench.records import Hardware, Identity, Software, fingerprint
from reelforge.bench.stamps import Nvml, connect
from reelforge.engine.core import hardware as core
from reelforge.kernels import dispatch


def identity(
    case_id: str, arm: str, op: str, impl: str, settings: Any, kind: Literal["rate", "accuracy"] = "rate"
) -> Identity:
    """Names a measurement that ends now.

    Args:
        case_id: the case.
        arm: ``records.OURS`` or a peer.
        op: of the case.
        impl: implementation that ran.
        settings: a dataclass or table that decides how it was measured.
        kind: what was measured.
    """
    revision = _revision()
    return Identity(
        case_id=case_id,
        arm=arm,
        kernel_impl=impl,
        kernel_hash=sources().get(f"{op}/{impl}", ""),
        config_hash=fingerprint(settings),
        git_sha=None if revision is None else revision.removesuffix("+dirty"),
        dirty=None if revision is None else revision.endswith("+dirty"),
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds"),
        kind=kind,
    )


@cache
def _revision() -> str | None:
    """Of the source tree as it was at the first record: the records themselves make it dirty."""
    return core.git_revision()


def sources() -> dict[str, str]:
    """``op/implementation`` to the hash of its present source, for every imported kernel of ours."""
    found = dispatch.registered().items()
    return {f"{op}/{entry.name}": entry.source for op, entries in found for entry in entries if entry.source}


def hardware(nvml: Nvml | str | None = None) -> Hardware:
    """The machine; what NVML alone knows is None where it does not answer."""
    facts = core.hardware()
    if "gpu" not in facts:
        return Hardware(host_cpu=facts["cpu"])
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvml = connect() if nvml is None else nvml
    return Hardware(
        host_cpu=facts["cpu"],
        gpu_name=facts["gpu"],
        gpu_capability=facts["gpu_capability"],
        sm_count=properties.multi_processor_count,
        uuid_hash=hashlib.sha256(str(properties.uuid).encode()).hexdigest()[:12],
        mem_gb=round(facts["gpu_memory_bytes"] / 1e9, 1),
        **({} if isinstance(nvml, str) else nvml_facts(nvml)),
    )


def nvml_facts(nvml: Nvml) -> dict[str, Any]:
    """Driver, power limit, ECC and MIG; None for what the device does not have."""
    module, handle = nvml

    def ask(query: Callable[[Any], Any]) -> Any:
        try:
            return query(handle)
        except module.NVMLError:
            return None

    limit, ecc, mig = map(ask, (module.nvmlDeviceGetEnforcedPowerLimit, module.nvmlDeviceGetEccMode,
                                module.nvmlDeviceGetMigMode))  # fmt: skip
    return {
        "driver": module.nvmlSystemGetDriverVersion(),
        "power_limit_w": None if limit is None else limit / 1e3,
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": None if mig is None else bool(mig[0]),
    }


def software() -> Software:
    """Versions that decide numbers and speed, and the switches that do."""
    versions = core.versions()
    cudnn = torch.backends.cudnn.version()
    return Software(
        python=versions["python"],
        torch=versions["torch"],
        triton=versions.get("triton"),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        flash_attn=versions.get("flash-attn"),
        te=versions.get("transformer-engine"),
        diffusers=versions.get("diffusers"),
        env_flags={
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": str(torch.backends.cudnn.benchmark),
            "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        },
    )
