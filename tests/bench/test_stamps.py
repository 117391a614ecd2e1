"""Clock stamps against a stand-in for NVML, and on this machine as it is."""

import sys
import time

import pytest
import torch

from reelforge.bench import machine
from reelforge.bench.records import SLOWDOWNS, Span, Stamps
from reelforge.bench.stamps import Nvml, Sampler, clock_spread, connect, reason_names


class ExampleNvml:
    """The part of ``pynvml`` that stamps use, for a device whose state the test sets."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.sm_mhz, self.reasons, self.energy_mj, self.reads = 1980, 0, 1000, 0
        self.fails_after: int | None = None
        self.lacks: set[str] = set()

    def require(self, what: str) -> None:
        if what in self.lacks:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        if "library" in self.lacks:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-example":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert handle == "handle"
        self.require("SM clock" if kind == self.NVML_CLOCK_SM else "memory clock")
        return self.sm_mhz if kind == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self.require("power")
        return 500_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self.require("temperature")
        return 45

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.require("energy")
        self.energy_mj += 250
        return self.energy_mj

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self.reads += 1
        if self.fails_after is not None and self.reads > self.fails_after:
            raise self.NVMLError("GPU is lost")
        return self.reasons

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetEccMode(self, handle: str) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if "mig" in self.lacks:
            raise self.NVMLError("Not Supported")
        return [0, 0]


@pytest.fixture
def nvml() -> Nvml:
    return connect(ExampleNvml(), "GPU-example")


def wait_for_reads(nvml: Nvml, count: int) -> None:
    """Until the side thread has read so often."""
    target, deadline = nvml.module.reads + count, time.monotonic() + 10
    while nvml.module.reads < target:
        assert time.monotonic() < deadline, "the side thread does not read"
        time.sleep(0.001)


def test_clocks_power_and_energy_of_each_arm(nvml: Nvml) -> None:
    with Sampler(nvml, period_s=0.001) as sampler:
        for _ in range(2):
            for arm, clock in (("ours", 1980), ("eager", 1950)):
                nvml.module.sm_mhz = clock
                with sampler.arm(arm):
                    wait_for_reads(nvml, 3)
    found = sampler.stamps()
    assert set(found) == {"ours", "eager"}
    ours = found["ours"]
    assert ours.valid and ours.note == "" and ours.samples >= 4
    assert ours.sm_clock_mhz == Span(1980.0, 1980.0, 1980.0) and found["eager"].sm_clock_mhz.med == 1950.0
    assert ours.mem_clock_mhz.max == 3201.0 and ours.power_w.med == 500.0 and ours.temp_c.min == 45.0
    assert ours.energy_j >= 2 * 3 * 0.25
    assert ours.sm_clock_spread == found["eager"].sm_clock_spread == pytest.approx(30 / 1950)


def test_an_arm_that_is_over_before_the_thread_looks_has_a_sample(nvml: Nvml) -> None:
    with Sampler(nvml, period_s=60) as sampler, sampler.arm("ours"):
        pass
    assert sampler.stamps()["ours"].samples == 1


def test_nothing_is_sampled_between_arms(nvml: Nvml) -> None:
    with Sampler(nvml, period_s=0.001) as sampler:
        with sampler.arm("ours"):
            wait_for_reads(nvml, 2)
        nvml.module.reasons = 0x4
        time.sleep(0.02)
    assert sampler.stamps()["ours"].valid


@pytest.mark.parametrize(
    ("bits", "names", "valid"),
    [
        (0x0, (), True),
        (0x1 | 0x2 | 0x100, ("applications_clocks_setting", "display_clock_setting", "gpu_idle"), True),
        (0x4 | 0x1, ("gpu_idle", "sw_power_cap"), False),
        (0x8, ("hw_slowdown",), False),
        (0x20, ("sw_thermal_slowdown",), False),
        (0x40, ("hw_thermal_slowdown",), False),
        (0x80, ("hw_power_brake",), False),
        (0x10, ("sync_boost",), False),
        (0x8000, ("unknown",), False),
    ],
)
def test_slow_downs_make_stamps_invalid(nvml: Nvml, bits: int, names: tuple[str, ...], valid: bool) -> None:
    nvml.module.reasons = bits
    with Sampler(nvml) as sampler, sampler.arm("ours"):
        pass
    found = sampler.stamps()["ours"]
    assert (found.throttle_reasons, found.valid) == (names, valid)


def test_the_reasons_are_those_of_the_real_library() -> None:
    pynvml = pytest.importorskip("pynvml")
    ours = {
        "GpuIdle": "gpu_idle",
        "ApplicationsClocksSetting": "applications_clocks_setting",
        "SwPowerCap": "sw_power_cap",
        "HwSlowdown": "hw_slowdown",
        "SyncBoost": "sync_boost",
        "SwThermalSlowdown": "sw_thermal_slowdown",
        "HwThermalSlowdown": "hw_thermal_slowdown",
        "HwPowerBrakeSlowdown": "hw_power_brake",
        "DisplayClockSetting": "display_clock_setting",
        "BoardLimit": "board_limit",
        "Reliability": "reliability",
    }
    for theirs, name in ours.items():
        assert reason_names(getattr(pynvml, f"nvmlClocksThrottleReason{theirs}")) == {name}
    assert reason_names(pynvml.nvmlClocksThrottleReasonAll) == set(ours.values())
    assert set(ours.values()) - SLOWDOWNS == {"gpu_idle", "applications_clocks_setting", "display_clock_setting"}


def test_every_function_that_is_called_exists_in_the_real_library() -> None:
    pynvml = pytest.importorskip("pynvml")
    used = [name for name in dir(ExampleNvml) if name.startswith(("nvml", "NVML"))]
    assert len(used) >= 14
    for name in used:
        assert hasattr(pynvml, name), name


def test_a_device_that_is_lost_meanwhile_spoils_the_stamps(nvml: Nvml) -> None:
    nvml.module.fails_after = 3
    with Sampler(nvml, period_s=60) as sampler:
        for _ in range(2):
            with sampler.arm("ours"):
                pass
    found = sampler.stamps()["ours"]
    assert not found.valid and found.note == "NVML: GPU is lost"


def test_what_a_device_does_not_tell_is_left_out(nvml: Nvml) -> None:
    nvml.module.lacks = {"power", "temperature", "energy", "memory clock"}
    with Sampler(nvml, period_s=60) as sampler, sampler.arm("ours"):
        pass
    found = sampler.stamps()["ours"]
    assert found == Stamps(True, 1, Span(1980.0, 1980.0, 1980.0))
    nvml.module.lacks = {"energy"}
    with Sampler(nvml, period_s=60) as sampler, sampler.arm("ours"):
        pass
    assert sampler.stamps()["ours"].temp_c == Span(45.0, 45.0, 45.0)


def test_a_device_without_clocks_has_no_stamps(nvml: Nvml) -> None:
    nvml.module.lacks = {"SM clock"}
    with Sampler(nvml, period_s=60) as sampler, sampler.arm("ours"):
        pass
    found = sampler.stamps()["ours"]
    assert not found.valid and found.note == "NVML: Not Supported"


def test_why_there_is_no_nvml() -> None:
    broken = ExampleNvml()
    broken.lacks.add("library")
    assert connect(broken) == "NVML: NVML Shared Library Not Found"
    assert connect(ExampleNvml(), "GPU-other") == "NVML: Not Found"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert connect() == "nvidia-ml-py is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_gives_stamps_that_say_so() -> None:
    with Sampler() as sampler, sampler.arm("ours"):
        pass
    found = sampler.stamps()["ours"]
    assert not found.valid and found.samples == 0 and found.note


def test_the_body_of_an_arm_may_fail(nvml: Nvml) -> None:
    with Sampler(nvml, period_s=60) as sampler:
        with pytest.raises(ZeroDivisionError), sampler.arm("ours"):
            raise ZeroDivisionError
        with sampler.arm("eager"):
            pass
    assert sampler.stamps()["eager"].valid
    assert sampler.stamps()["ours"].note == "no sample"


def test_the_spread_of_clocks() -> None:
    at = {mhz: Stamps(True, sm_clock_mhz=Span(0.0, mhz, 9999.0)) for mhz in (1900.0, 1957.0, 1930.0)}
    assert clock_spread({str(mhz): found for mhz, found in at.items()}) == pytest.approx(0.03)
    assert clock_spread({"one": at[1900.0], "none": Stamps(False)}) == 0.0
    assert clock_spread({}) == 0.0


def test_facts_of_the_machine(nvml: Nvml) -> None:
    facts = machine.nvml_facts(nvml)
    assert facts == {"driver": "580.1", "power_limit_w": 700.0, "ecc": True, "mig": False}
    nvml.module.lacks.add("mig")
    assert machine.nvml_facts(nvml)["mig"] is None
    here = machine.hardware("no NVML")
    assert here.host_cpu and (here.gpu_name is None) == (not torch.cuda.is_available())
    software = machine.software()
    assert torch.__version__.startswith(software.torch) and software.env_flags["cudnn_benchmark"] == "False"


def test_an_identity_names_the_source_that_ran() -> None:
    from reelforge.kernels import dispatch, norm_modulate

    found = machine.identity("a case", "ours", "norm_modulate", "triton", {"rounds": 7})
    assert found.kernel_hash == dispatch.source_hash(norm_modulate)
    peer = machine.identity("a case", "eager", "norm_modulate", "torch", {"rounds": 9})
    assert peer.kernel_hash == "" and peer.config_hash != found.config_hash
    assert found.timestamp.endswith("+00:00")
