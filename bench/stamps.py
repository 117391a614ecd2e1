"""Clock stamps: what NVML saw of the GPU while an arm ran, sampled in a side thread.

A rate without its clocks cannot be compared: a GPU that is held down by power or heat, or whose arms ran at different
clocks, gives no number. Without NVML the stamps say so, and the record they go into is invalid.
"""

import importlib
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch

from reelforge.bench.records import SLOWDOWNS, Span, Stamps

PERIOD_S = 0.01
_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


class Nvml(NamedTuple):
    """NVML and the device that torch computes on.

    Attributes:
        module: ``pynvml``, or what stands in for it.
        handle: of the device.
    """

    module: Any
    handle: Any


def connect(module: ModuleType | Any = None, uuid: str | None = None) -> Nvml | str:
    """NVML for a device, or why there is none.

    Args:
        module: in place of ``pynvml``.
        uuid: of the device; that of torch's current one when None.
    """
    try:
        pynvml: Any = importlib.import_module("pynvml") if module is None else module
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        if uuid is None:
            if not torch.cuda.is_available():
                return "there is no CUDA device"
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            uuid = f"GPU-{uuid.removeprefix('GPU-')}"
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError as error:
        return f"NVML: {error}"


def reason_names(bits: int) -> set[str]:
    """Names of NVML's clock event reasons; a bit it did not have when this was written is ``"unknown"``."""
    known = {name for bit, name in _REASONS.items() if bits & bit}
    return known | ({"unknown"} if bits & ~sum(_REASONS) else set())


class _Sample(NamedTuple):
    reasons: int
    sm_clock_mhz: int
    mem_clock_mhz: int | None
    power_mw: int | None
    temp_c: int | None
    energy_mj: int | None


def _sample(nvml: Nvml) -> _Sample:
    """Without clock and reasons there is no sample; what else a device does not tell is None."""
    module, handle = nvml

    def optional(query: Callable[..., int], *what: int) -> int | None:
        try:
            return query(handle, *what)
        except module.NVMLError:
            return None

    return _Sample(
        module.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        module.nvmlDeviceGetClockInfo(handle, module.NVML_CLOCK_SM),
        optional(module.nvmlDeviceGetClockInfo, module.NVML_CLOCK_MEM),
        optional(module.nvmlDeviceGetPowerUsage),
        optional(module.nvmlDeviceGetTemperature, module.NVML_TEMPERATURE_GPU),
        optional(module.nvmlDeviceGetTotalEnergyConsumption),
    )


@dataclass
class _Seen:
    samples: list[_Sample] = field(default_factory=list)
    energy_mj: int = 0


class Sampler:
    """Reads NVML every few milliseconds while an arm runs, and once at the end of each of its turns.

    ::

        with Sampler() as sampler:
            for _ in range(rounds):
                for name, run in arms.items():
                    with sampler.arm(name):
                        run()
                        torch.cuda.synchronize()
        stamps = sampler.stamps()

    Args:
        nvml: from :func:`connect`; a string says why there is none.
        period_s: between two samples of the thread.
    """

    def __init__(self, nvml: Nvml | str | None = None, period_s: float = PERIOD_S) -> None:
        self._nvml = connect() if nvml is None else nvml
        self._period_s = period_s
        self._seen: dict[str, _Seen] = {}
        self._failure = self._nvml if isinstance(self._nvml, str) else ""
        self._running: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)

    def __enter__(self) -> Self:
        if not self._failure:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    @contextmanager
    def arm(self, name: str) -> Iterator[None]:
        """What is sampled inside belongs to ``name``; the GPU's work must end inside too."""
        seen = self._seen.setdefault(name, _Seen())
        first = self._read()
        self._running = name
        try:
            yield
        finally:
            self._running = None
        last = self._read()
        if first is not None and last is not None:
            seen.samples.append(last)
            if first.energy_mj is not None and last.energy_mj is not None:
                seen.energy_mj += last.energy_mj - first.energy_mj

    def stamps(self) -> dict[str, Stamps]:
        """Arm to stamps, each with the spread of the arms' clocks."""
        found = {name: _stamps(seen, self._failure) for name, seen in self._seen.items()}
        spread = clock_spread(found)
        return {name: replace(stamps, sm_clock_spread=spread) for name, stamps in found.items()}

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            name = self._running
            sample = self._read() if name is not None else None
            if sample is not None and name is not None and self._running == name:  # else it ended in the meantime
                self._seen[name].samples.append(sample)

    def _read(self) -> _Sample | None:
        """One sample; none without NVML, or once it has failed."""
        if isinstance(self._nvml, str) or self._failure:
            return None
        try:
            return _sample(self._nvml)
        except self._nvml.module.NVMLError as error:
            self._failure = f"NVML: {error}"
            return None


def _stamps(seen: _Seen, failure: str) -> Stamps:
    if failure or not seen.samples:
        return Stamps(False, note=failure or "no sample")
    reasons = set[str]().union(*(reason_names(sample.reasons) for sample in seen.samples))
    told = {name: [value for sample in seen.samples if (value := getattr(sample, name)) is not None]
            for name in _Sample._fields}  # fmt: skip
    return Stamps(
        valid=not reasons & SLOWDOWNS,
        samples=len(seen.samples),
        sm_clock_mhz=_span(told["sm_clock_mhz"]),
        mem_clock_mhz=_span(told["mem_clock_mhz"]),
        power_w=_span([milliwatts / 1e3 for milliwatts in told["power_mw"]]),
        temp_c=_span(told["temp_c"]),
        energy_j=seen.energy_mj / 1e3 or None,
        throttle_reasons=tuple(sorted(reasons)),
    )


def _span(values: Sequence[float]) -> Span | None:
    return None if not values else Span(float(min(values)), float(statistics.median(values)), float(max(values)))


def clock_spread(stamps: Mapping[str, Stamps]) -> float:
    """(largest - smallest) / smallest of the arms' median SM clocks; 0 for fewer than two arms."""
    clocks = [found.sm_clock_mhz.med for found in stamps.values() if found.sm_clock_mhz is not None]
    return (max(clocks) - min(clocks)) / min(clocks) if len(clocks) > 1 else 0.0
