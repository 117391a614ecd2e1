"""Benchmark records: one JSON object per case and arm, one per line, written as they come.

A record says what was timed, on what, at which clocks and how accurate the result was. :func:`validate` names every
reason why a record must not be quoted: a fast wrong kernel or a throttled GPU gives no number. Times are microseconds
of one call; sizes of memory are 1e6 bytes, rates 1e9 bytes/s and 1e12 operations/s.

The folder also keeps what was recorded: measurements by GPU, ``proven.json`` and the compile gate's tables.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 1
OURS = "ours"
MIN_ROUNDS = 5
MAX_CLOCK_SPREAD = 0.03  # between the arms of a case: beyond it they did not run on the same machine
# Clocks held down by power, heat or another device. Idle and clocks set by the user are states, not slow-downs.
SLOWDOWNS = frozenset(
    {"sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake", "sync_boost",
     "board_limit", "reliability", "unknown"}
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Which measurement of which code this is.

    Attributes:
        case_id: names the case among all of the benchmark's.
        arm: :data:`OURS` for the engine's op, ``"ours/<implementation>"`` for a further one of ours, else the peer.
        kernel_impl: implementation that ran, as ``kernels.dispatch`` names it; a peer's own name.
        kernel_hash: ``dispatch.source_hash`` of what ran; empty for other people's libraries.
        config_hash: fingerprint of the settings of the measurement.
        git_sha, dirty: of the source tree; None outside a checkout.
        timestamp: UTC, ISO 8601.
        kind: ``"accuracy"`` records carry no timing and prove a kernel all the same.
    """

    case_id: str
    arm: str
    kernel_impl: str
    kernel_hash: str
    config_hash: str
    git_sha: str | None
    dirty: bool | None
    timestamp: str
    kind: Literal["rate", "accuracy"] = "rate"
    schema_version: int = SCHEMA_VERSION

    @property
    def ours(self) -> bool:
        return self.arm.split("/")[0] == OURS


@dataclass(frozen=True)
class Workload:
    """What was computed.

    Attributes:
        op: its name in ``kernels.dispatch``, or a pipeline's.
        label: what tells the case from the op's other cases.
        backward: forward and backward, not the forward alone.
        inside_timer: the steps that the time includes, never empty: ``("kernel",)``, ``("quantise", "kernel")`` ...
        bytes, flops: what the work takes at least; flops are the tensor cores'.
        scales: granularity of the quantisation scales; None where nothing is quantised.
    """

    op: str
    label: str
    backward: bool
    dtype_in: str
    seed: int
    inside_timer: tuple[str, ...]
    bytes: float
    flops: float
    model: str | None = None
    tokens: int | None = None
    kv_tokens: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    dim: int | None = None
    batch: int | None = None
    dtype_acc: str | None = None
    scales: str | None = None


@dataclass(frozen=True)
class Hardware:
    """The machine; None where it has no GPU or NVML does not say."""

    host_cpu: str
    gpu_name: str | None = None
    gpu_capability: str | None = None
    sm_count: int | None = None
    uuid_hash: str | None = None
    driver: str | None = None
    power_limit_w: float | None = None
    mem_gb: float | None = None
    ecc: bool | None = None
    mig: bool | None = None


@dataclass(frozen=True)
class Software:
    """Versions, and in ``env_flags`` the switches of torch and Triton that change numbers or speed."""

    python: str
    torch: str
    triton: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    flash_attn: str | None = None
    te: str | None = None
    diffusers: str | None = None
    env_flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Statistics over rounds, in microseconds of one call.

    Attributes:
        rounds: samples, each a mean over ``iters`` calls.
        l2: whether the L2 cache was flushed before each call.
        host_us: time the host takes to launch a call; None where a graph replays it.
        rest: how long the GPU idled after each of the arm's turns, in lengths of the turn; more than 1 where the arms
            ran into the power limit at first.
    """

    method: Literal["cupti", "event", "graph", "wall"]
    warmup: int
    rounds: int
    iters: int
    l2: Literal["cold", "warm"]
    median_us: float
    p20: float
    p80: float
    min: float
    mean: float
    stdev: float
    host_us: float | None = None
    rest: float = 1.0


@dataclass(frozen=True)
class Ratio:
    """A distribution over rounds of the other arm's time over this one's: above 1 where this one is faster."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Derived:
    """What follows from time, work and machine.

    Attributes:
        pct_datasheet, pct_measured_peak: of the roof that ``bound`` names, by the datasheet and as measured in
            this run.
        bound: what limits the case in the arithmetic model.
        floor_us: the model's time.
        ratio_vs: arm to ratio.
        peak_gbps, peak_tflops: copy bandwidth and GEMM rate measured in this run.
        datasheet_gbps, datasheet_tflops: the same by the datasheet, for the workload's dtype.
    """

    tflops: float | None = None
    gbps: float | None = None
    pct_datasheet: float | None = None
    pct_measured_peak: float | None = None
    bound: str | None = None
    floor_us: float | None = None
    ratio_vs: Mapping[str, Ratio] = field(default_factory=dict)
    peak_gbps: float | None = None
    peak_tflops: float | None = None
    datasheet_gbps: float | None = None
    datasheet_tflops: float | None = None


@dataclass(frozen=True)
class Span:
    """Extremes and median of what was sampled."""

    min: float
    med: float
    max: float


@dataclass(frozen=True)
class Stamps:
    """The GPU's state while an arm ran.

    Attributes:
        valid: NVML was read and saw no slow-down.
        throttle_reasons: all that NVML gave, the harmless ones too; see :data:`SLOWDOWNS`.
        samples: how often NVML was read.
        energy_j: of the board over all of the arm's turns, flushes of the cache included; None when its counter did
            not move or cannot be read.
        sm_clock_spread: of the arms' median SM clocks: (largest - smallest) / smallest.
        note: why there are no stamps.
    """

    valid: bool
    samples: int = 0
    sm_clock_mhz: Span | None = None
    mem_clock_mhz: Span | None = None
    power_w: Span | None = None
    temp_c: Span | None = None
    energy_j: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    sm_clock_spread: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Quality:
    """Distance to the reference in fp64, the worst over outputs and gradients.

    Attributes:
        rel_l2: relative L2 error; None when it was not measured, which makes the record invalid.
        tolerance: of ``rel_l2``.
        gate: whether the accuracy test passed.
    """

    rel_l2: float | None
    tolerance: float
    gate: Literal["pass", "fail"]
    cosine: float | None = None
    max_abs: float | None = None
    lpips: float | None = None
    ssim: float | None = None
    logprob_abs_err: float | None = None


@dataclass(frozen=True)
class Memory:
    """Of the device, in 1e6 bytes."""

    peak_alloc_mb: float | None = None
    peak_reserved_mb: float | None = None
    workspace_mb: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What ``bench compare`` said; deltas are of the median time to the baseline, positive is slower.

    Attributes:
        status: a status of ``bench.compare``, or ``"failed: <why>"`` for an arm that did not run.
    """

    status: str | None = None
    baseline_id: str | None = None
    delta_pct: float | None = None
    delta_abs: float | None = None


@dataclass(frozen=True)
class Record:
    """One case and arm."""

    identity: Identity
    workload: Workload
    hardware: Hardware
    software: Software
    quality: Quality | None = None
    timing: Timing | None = None
    stamps: Stamps | None = None
    derived: Derived = Derived()
    memory: Memory = Memory()
    verdict: Verdict = Verdict()

    def table(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)


def fingerprint(*parts: Any) -> str:
    """sha256 of the parts' canonical JSON, 16 hex digits; dataclasses count as tables."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()[:16]


# -- from JSON --------------------------------------------------------------------------------------------------------


def parse(table: Any) -> Record | list[str]:
    """The record, or everything that keeps the table from being one: unknown and missing keys, wrong types."""
    faults: list[str] = []
    record = _convert(Record, table, "record", faults)
    return faults or cast(Record, record)


def _convert(hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    """``value`` as ``hint``; what does not fit is added to ``faults``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        hint = next(arg for arg in args if arg is not NoneType)
        return None if value is None else _convert(hint, value, where, faults)
    if dataclasses.is_dataclass(hint):
        return _convert_group(hint, value, where, faults)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, f"{where}[{i}]", faults) for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: _convert(args[1], item, f"{where}.{name}", faults) for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if value not in args if origin is Literal else type(value) is not hint:
        wanted = " or ".join(map(repr, args)) if origin is Literal else hint.__name__
        faults.append(f"{where} is {value!r}, not {wanted}")
    return value


def _convert_group(cls: Any, value: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(value, dict):
        faults.append(f"{where} is {value!r}, not a table")
        return None
    hints = get_type_hints(cls)
    faults += [f"unknown key {where}.{name}" for name in value if name not in hints]
    required = [f.name for f in dataclasses.fields(cls) if _required(f)]
    missing = [f"{where}.{name} is missing" for name in required if name not in value]
    faults += missing
    values = {name: _convert(hints[name], value[name], f"{where}.{name}", faults) for name in hints if name in value}
    return None if missing else cls(**values)


def _required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


# -- validity ---------------------------------------------------------------------------------------------------------


def validate(record: Record | Mapping[str, Any]) -> list[str]:
    """Every reason why the record must not be used; empty for a valid one."""
    parsed = parse(record.table() if isinstance(record, Record) else record)
    if isinstance(parsed, list):
        return parsed
    reasons = []
    if parsed.identity.schema_version != SCHEMA_VERSION:
        reasons.append(f"schema version {parsed.identity.schema_version} is not {SCHEMA_VERSION}")
    status = parsed.verdict.status or ""
    reasons += [status] if status.startswith("failed") else []
    reasons += accuracy_faults(parsed)
    if parsed.identity.kind == "rate":
        reasons += _timing_faults(parsed) + _stamp_faults(parsed)
    return reasons


def accuracy_faults(record: Record) -> list[str]:
    """Why the result was not accurate, or is not known to be."""
    quality = record.quality
    if quality is None or quality.rel_l2 is None:
        return ["no accuracy"]
    if not math.isfinite(quality.rel_l2):
        return [f"rel-L2 is {quality.rel_l2}"]
    if quality.rel_l2 > quality.tolerance:
        return [f"rel-L2 {quality.rel_l2:.3g} is above its tolerance {quality.tolerance:.3g}"]
    return ["the accuracy gate failed"] if quality.gate == "fail" else []


def _timing_faults(record: Record) -> list[str]:
    timing = record.timing
    if timing is None:
        return ["no timing"]
    reasons = [] if record.workload.inside_timer else ["what is inside the timer is not said"]
    if timing.rounds < MIN_ROUNDS:
        reasons.append(f"{timing.rounds} rounds, not at least {MIN_ROUNDS}")
    if not 0 < timing.min <= timing.p20 <= timing.median_us <= timing.p80 < math.inf:
        reasons.append(f"times {timing.min}, {timing.p20}, {timing.median_us}, {timing.p80} us are not in order")
    return reasons


def _stamp_faults(record: Record) -> list[str]:
    stamps = record.stamps
    if stamps is None:
        return ["no clock stamps"]
    reasons = []
    slow = sorted(SLOWDOWNS.intersection(stamps.throttle_reasons))
    if slow:
        reasons.append(f"throttled: {', '.join(slow)}")
    elif not stamps.valid:
        reasons.append(f"clock stamps are not valid{': ' if stamps.note else ''}{stamps.note}")
    if not stamps.sm_clock_spread <= MAX_CLOCK_SPREAD:
        reasons.append(f"the arms' SM clocks differ by {stamps.sm_clock_spread:.1%}, more than {MAX_CLOCK_SPREAD:.0%}")
    return reasons
