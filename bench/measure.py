"""A case on this machine: the accuracy of every arm, then its rates, as records."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from reelforge.bench import accuracy, cost, stamps, timing
from reelforge.bench.accuracy import Exact
from reelforge.bench.arms import COMPILED, FAILURES, Arm, kernel_arms, peer_arms
from reelforge.bench.cases.case import Case, Operands
from reelforge.bench.records import (
    MAX_CLOCK_SPREAD,
    SLOWDOWNS,
    Derived,
    Memory,
    Quality,
    Ratio,
    Record,
    Stamps,
    Timing,
    Verdict,
)
from reelforge.bench.samplers import sampler
from reelforge.bench.session import WHOLE_CASE, Kind, Session
from reelforge.kernels.errors import KernelError

COMPILING = frozenset({COMPILED, "flex"})  # arms whose first call compiles, which takes up to minutes
_GENTLE_BURST_S, _GENTLE_REST = 5e-3, 8.0  # below a power limit that acts within milliseconds
_UNFIT = "which does not fit"  # in what dispatch says of a pin
_L2: tuple[timing.L2, ...] = ("cold", "warm")


def prove(session: Session, case: Case) -> Iterator[Record]:
    """Accuracy of every kernel behind the case's op, without times."""
    arms = [arm for arm in kernel_arms(case) if session.wants(case.name, arm.name)]
    if not arms:
        return
    prepared = _prepared(session, case, "accuracy")
    if isinstance(prepared, str):
        yield session.record(case, (), WHOLE_CASE, "accuracy", verdict=_verdict(prepared))
        return
    operands, exact = prepared
    for arm, quality in _checked(session, case, operands, exact, arms, "accuracy"):
        found = quality if isinstance(quality, Quality) else None
        yield session.record(case, operands, arm, "accuracy", quality=found, verdict=_verdict(quality))
    del operands, exact, prepared
    release(session.device)


def rates(session: Session, case: Case, arms: list[Arm]) -> Iterator[Record]:
    """Accuracy, then times with cold and with warm L2, of every arm; an arm that fails leaves a record that says so.

    Arms that compile come last, in rounds of their own with the first other arm that runs: what they cost or break is
    not the others' loss. That arm's second records keep its ratios to those others.
    """
    torch._dynamo.reset()  # compiled arms compile at their first call; after eight shapes of one they would not
    prepared = _prepared(session, case, "rate")
    if isinstance(prepared, str):
        yield session.record(case, (), WHOLE_CASE, "rate", verdict=_verdict(prepared))
        return
    operands, exact = prepared
    done: list[Record] = []
    for record in _together(session, case, operands, exact, [arm for arm in arms if arm.name not in COMPILING]):
        done.append(record)
        yield record
    late = [arm for arm in arms if arm.name in COMPILING]
    timed = {(record.identity.arm, record.timing.l2): record for record in done if record.timing is not None}
    first = [arm for arm in arms if (arm.name, "warm") in timed][:1]
    for record in _together(session, case, operands, exact, [*first, *late]) if late else ():
        before = timed.get((record.identity.arm, record.timing.l2)) if record.timing is not None else None
        yield record if before is None else _joined(record, before)
    del operands, exact, prepared
    release(session.device)


def _together(session: Session, case: Case, operands: Operands, exact: Exact, arms: list[Arm]) -> Iterator[Record]:
    """Arms that take turns: their failures, then their times."""
    checked = list(_checked(session, case, operands, exact, arms, "rate"))
    release(session.device)
    for arm, quality in checked:
        if isinstance(quality, str):
            yield session.record(case, operands, arm, "rate", verdict=_verdict(quality))
    runnable = [(arm, quality) for arm, quality in checked if isinstance(quality, Quality)]
    for l2 in _L2 if runnable else ():
        yield from _timed(session, case, operands, runnable, l2)


def _joined(record: Record, before: Record) -> Record:
    """An arm's record with its ratios of earlier rounds."""
    ratios = {**before.derived.ratio_vs, **record.derived.ratio_vs}
    return replace(record, derived=replace(record.derived, ratio_vs=ratios))


def run_once(session: Session, case: Case, arm: Arm) -> str:
    """One call, for a checker that watches from outside; what came of it."""
    operands = session.operands(case)
    session.announce(case, operands, arm, "accuracy")
    try:
        with arm.active(case.backward):
            accuracy.evaluate(arm.op, operands, case.backward)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
    except FAILURES as error:
        return failure(error, session.device)
    return "ran"


def all_arms(session: Session, case: Case, *, compiled: bool) -> list[Arm]:
    """Arms of a case that the session wants."""
    arms = kernel_arms(case) + peer_arms(case, compiled=compiled)
    return [arm for arm in arms if session.wants(case.name, arm.name)]


def _prepared(session: Session, case: Case, kind: Kind) -> tuple[Operands, Exact] | str:
    """Inputs and the exact result, or why there are none."""
    session.announce(case, kind=kind)
    try:
        operands = session.operands(case)
        return operands, Exact(case, operands)
    except FAILURES as error:
        return failure(error, session.device)


def _checked(
    session: Session, case: Case, operands: Operands, exact: Exact, arms: list[Arm], kind: Kind
) -> Iterator[tuple[Arm, Quality | str]]:
    """Each fitting arm's accuracy, or why it did not run."""
    for arm in arms:
        session.announce(case, operands, arm, kind)
        found = _quality(session, case, exact, arm)
        if found is not None:
            yield arm, found


def _quality(session: Session, case: Case, exact: Exact, arm: Arm) -> Quality | str | None:
    """An arm's accuracy, or why it did not run; None where its implementation is not for this machine or dtype."""
    try:
        with arm.active(case.backward):
            return exact.quality(arm.op, poisoned=arm.ours)
    except KernelError as error:
        return None if _UNFIT in error.what else failure(error, session.device)
    except FAILURES as error:
        return failure(error, session.device)


def failure(error: BaseException, device: torch.device) -> str:
    """One line on why an arm did not run.

    Raises:
        RuntimeError: the CUDA context is lost, and this process with it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        release(device)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _verdict(quality: Quality | str) -> Verdict:
    return Verdict() if isinstance(quality, Quality) else Verdict(status=f"failed: {quality}")


def release(device: torch.device) -> None:
    """Give memory back, so that the next case finds it in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- times -------------------------------------------------------------------------------------------------------------


def _timed(
    session: Session, case: Case, operands: Operands, checked: list[tuple[Arm, Quality]], l2: timing.L2
) -> Iterator[Record]:
    made: dict[str, timing.Sampler] = {}
    memory: dict[str, Memory] = {}
    for arm, quality in checked:
        session.announce(case, operands, arm)
        try:
            with arm.active(case.backward):
                call = accuracy.step(arm.op, operands, case.backward)
                memory[arm.name] = peak_memory(call, session.device)
                made[arm.name] = sampler(call, session.device, l2, graph=arm.graph and not case.backward)
        except FAILURES as error:
            verdict = _verdict(failure(error, session.device))
            yield session.record(case, operands, arm, "rate", quality=quality, verdict=verdict)
    session.announce(case, operands)
    arms = {arm.name: arm for arm, _ in checked}
    times, clocks = interleave(session, made, lambda name: arms[name].active(case.backward))
    for arm, quality in checked:
        if arm.name in times:
            yield session.record(
                case, operands, arm, "rate", quality=quality, timing=summary(times[arm.name]),
                stamps=clocks[arm.name], derived=derive(session, case.work, times, arm.name), memory=memory[arm.name],
            )  # fmt: skip


def interleave(
    session: Session, samplers: Mapping[str, timing.Sampler], active: Callable[[str], Any]
) -> tuple[dict[str, timing.Times], dict[str, Stamps]]:
    """Times and clocks of all arms; where clocks were held down or differ, again in short bursts with long rests."""
    times, clocks = _interleave(session, samplers, active, timing.REST)
    if any(map(_slowed, clocks.values())):
        for each in samplers.values():
            each.burst(_GENTLE_BURST_S)
        times, clocks = _interleave(session, samplers, active, _GENTLE_REST)
    return times, clocks


def _slowed(found: Stamps) -> bool:
    return found.sm_clock_spread > MAX_CLOCK_SPREAD or not SLOWDOWNS.isdisjoint(found.throttle_reasons)


def _interleave(
    session: Session, samplers: Mapping[str, timing.Sampler], active: Callable[[str], Any], rest: float
) -> tuple[dict[str, timing.Times], dict[str, Stamps]]:
    with stamps.Sampler(session.nvml) as clocks:
        times = timing.interleave(samplers, session.rounds, clocks.arm, active, rest)
    return times, clocks.stamps()


def peak_memory(call: Callable[[], object], device: torch.device) -> Memory:
    """What one call adds to the allocated memory at its peak."""
    if device.type != "cuda":
        return Memory()
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    return Memory(peak_alloc_mb=allocated / 1e6, peak_reserved_mb=reserved / 1e6)


# -- what times mean ---------------------------------------------------------------------------------------------------


def summary(times: timing.Times) -> Timing:
    """Microseconds of one call."""
    micro = timing.Spread(*(1e6 * value for value in times.seconds))
    return Timing(
        method=times.method,
        warmup=times.warmup,
        rounds=len(times.rounds),
        iters=times.iters,
        l2=times.l2,
        median_us=micro.median,
        p20=micro.p20,
        p80=micro.p80,
        min=micro.min,
        mean=micro.mean,
        stdev=micro.stdev,
        host_us=None if times.host_s is None else 1e6 * times.host_s,
        rest=times.rest,
    )


def derive(session: Session, work: cost.Work, times: Mapping[str, timing.Times], arm: str) -> Derived:
    """Rates, shares of the peaks, and ratios to the other arms."""
    seconds = times[arm].seconds.median
    rate = cost.rates(work, seconds)
    sheet, measured = session.datasheet, session.measured
    assert measured is not None, "a rated session knows its peaks"
    floor = cost.floor(work, sheet or measured)
    ratios = {name: times[arm].ratios(other) for name, other in times.items() if name != arm}
    return Derived(
        tflops=rate.tflops or None,
        gbps=rate.gbps,
        pct_datasheet=100 * floor.seconds / seconds if sheet else None,
        pct_measured_peak=100 * cost.floor(work, measured).seconds / seconds,
        bound=floor.bound,
        floor_us=1e6 * floor.seconds,
        ratio_vs={name: Ratio(found.median, found.p20, found.p80) for name, found in ratios.items()},
        peak_gbps=measured.bytes_per_s / 1e9,
        peak_tflops=measured.flops[work.dtype] / 1e12,
        datasheet_gbps=sheet.bytes_per_s / 1e9 if sheet else None,
        datasheet_tflops=sheet.flops[work.dtype] / 1e12 if sheet else None,
    )
