"""Records and tables of measured RLHF iterations.

An iteration is a case of op ``rl_iteration``; each part of it that took time is a case of ``rl_<part>`` of the same
label. ``floor_us`` of the iteration, of ``rl_branches`` and of ``rl_train`` is what the calls' own times let expect,
``bound`` says so; ``quality`` is the distance of the arm's gradient to that of the reference loop, one forward a
sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reelforge.bench import measure, rl_cost
from reelforge.bench.arms import Arm as RecordArm
from reelforge.bench.cases.case import Case, Shape, Work
from reelforge.bench.records import OURS, Derived, Memory, Quality, Ratio, Record, Stamps
from reelforge.bench.rl_arms import COLLAPSED, FLASH, Arm, Setting
from reelforge.bench.rl_cost import Layout
from reelforge.bench.rl_iteration import PARTS, Bench, Round, compare, expected, forwards, median_calls, times
from reelforge.bench.rl_training import Peak, gradient_error, peak
from reelforge.bench.session import Session
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.tables import lines
from reelforge.bench.timing import spread

OP = "rl_iteration"
EXPECTED = "calls of the network"
_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # of a gradient
_EXPECTED_PARTS = ("total", "branches", "train")


def case(size: Shape, setting: Setting, part: str = "total", flops: float = 0.0) -> Case:
    """An iteration, or a part of it; it has no operands of its own."""

    def unbuilt(*_: object) -> Any:
        raise AssertionError("an iteration's inputs come with its world")

    op = OP if part == "total" else f"rl_{part}"
    return Case(op, f"{size.name} {size.tokens} {setting.label}", unbuilt, unbuilt, unbuilt, Work(0.0, flops))


def events(session: Session, bench: Bench, deadline: float) -> Iterator[dict[str, Any]]:
    """Records of every arm and part, and tables, of as many rounds as fit."""
    world, setting = bench.world, bench.setting

    def announce(arm: Arm) -> None:
        session.announce(case(world.size, setting), (), _named(arm))

    errors = {}
    for arm in bench.arms:
        announce(arm)
        errors[arm.name] = gradient_error(world, setting, arm, FLASH)
    memory = peaks(bench)
    bench.warm_up()
    found: list[Round] = []
    with ClockSampler(session.nvml) as clocks:
        for each in bench.rounds(session.rounds, deadline, clocks, announce):
            found.append(each)
            yield {"note": f"round {len(found)}: " + _totals(each)}
    stamps = clocks.stamps()
    for arm in bench.arms:
        for record in _records(session, bench, found, arm, stamps[arm.name], errors[arm.name], memory):
            yield {"record": record.table()}
    parts = (iteration_table(bench, found), comparisons(bench, found), memory_table(memory), outlook(found))
    yield {"page": page(case(world.size, setting).name, "\n\n".join(filter(None, parts)))}


def page(title: str, text: str) -> str:
    """A section for the report."""
    return f"### {title}\n\n```\n{text}\n```\n"


def _named(arm: Arm) -> RecordArm:
    return RecordArm(arm.name, "plain" if arm.plain else "fused", lambda: (), ours=arm.name == OURS)


def _totals(found: Round) -> str:
    return ", ".join(f"{name} {split.total:.3g} s" for name, split in found.splits.items())


def _records(
    session: Session, bench: Bench, found: Sequence[Round], arm: Arm, stamps: Stamps, error: float,
    memory: Mapping[int, Peak | str],
) -> Iterator[Record]:  # fmt: skip
    world, setting = bench.world, bench.setting
    tolerance = _TOLERANCE[world.precision]
    quality = Quality(error, tolerance, "pass" if error <= tolerance else "fail")
    sample: tuple[Tensor] = (torch.empty(0, dtype=world.model.proj_out.weight.dtype),)
    for part in PARTS:
        taken = times(found, arm, part)
        if taken.seconds.min <= 0:
            continue  # nothing to wait for, no prefix
        counted = forwards(bench, arm, found, rollout=part == "total") if part in ("total", "train") else 0.0
        made = case(world.size, setting, part, counted * world.forward_flops)
        record = session.record(
            made, sample, _named(arm), "rate", quality=quality, timing=measure.summary(taken), stamps=stamps,
            derived=_derived(bench, found, arm, part, made.work.flops), memory=_memory(memory, arm, setting, part),
        )  # fmt: skip
        inside = ("rollout", "decode", "score", "train", "optimizer") if part == "total" else (part,)
        batch = setting.prompts * setting.group_size
        yield replace(record, workload=replace(record.workload, inside_timer=inside, batch=batch))


def _derived(bench: Bench, found: Sequence[Round], arm: Arm, part: str, flops: float) -> Derived:
    taken = times(found, arm, part)
    ratios = {}
    for other in bench.arms:
        theirs = times(found, other, part)
        if other is not arm and theirs.seconds.min > 0:
            of = taken.ratios(theirs)
            ratios[other.name] = Ratio(of.median, of.p20, of.p80)
    known = part in _EXPECTED_PARTS
    floor = spread([getattr(expected(bench, arm, each), part) for each in found]).median
    return Derived(
        tflops=flops / taken.seconds.median / 1e12 or None,
        bound=EXPECTED if known else None,
        floor_us=1e6 * floor if known else None,
        ratio_vs=ratios,
    )


def _memory(memory: Mapping[int, Peak | str], arm: Arm, setting: Setting, part: str) -> Memory:
    """Of the training step: one state collapsed, a group's samples at once otherwise."""
    found = memory.get(1 if arm.collapsed else setting.group_size)
    if part != "train" or not isinstance(found, Peak) or found.allocated is None:
        return Memory()
    return Memory(peak_alloc_mb=found.allocated / 1e6)


def peaks(bench: Bench) -> dict[int, Peak | str]:
    """Memory of a training step on one state, and on as many as a group has."""
    return {states: peak(bench.world, bench.arms[-1], states) for states in (1, bench.setting.group_size)}


# -- tables ------------------------------------------------------------------------------------------------------------


def iteration_table(bench: Bench, found: Sequence[Round]) -> str:
    """Where an iteration's seconds go, medians over rounds."""
    rows = []
    for arm in bench.arms:
        seconds = [times(found, arm, part).seconds.median for part in PARTS]
        hoped = spread([expected(bench, arm, each).total for each in found]).median
        per_hour = 3600 * bench.setting.prompts * bench.setting.group_size / seconds[-1]
        rows.append((arm.name, *(f"{value:.3g}" for value in (*seconds, hoped)), f"{per_hour:.4g}"))
    head = ("seconds", *PARTS, "expected", "samples/h")
    return "\n".join([f"{case(bench.world.size, bench.setting).label}, {len(found)} rounds", *lines(head, rows)])


def comparisons(bench: Bench, found: Sequence[Round]) -> str:
    """Each arm against the one before it, and the last against the first."""
    pairs = [*zip(bench.arms, bench.arms[1:], strict=False)]
    rows = []
    for other, arm in [*pairs, *([(bench.arms[0], bench.arms[-1])] if len(pairs) > 1 else [])]:
        ratio = compare(bench, found, arm, other)
        measured = f"{ratio.measured.median:.2f} [{ratio.measured.p20:.2f}, {ratio.measured.p80:.2f}]"
        rows.append((f"{other.name} / {arm.name}", measured, f"{ratio.expected:.2f}", f"{ratio.forwards:.2f}"))
    return "\n".join(lines(("time over time", "measured", "expected", "by forwards"), rows))


def memory_table(memory: Mapping[int, Peak | str]) -> str:
    """Of the training step, collapsed and with a group's samples at once."""
    rows = [(str(states), *_megabytes(found)) for states, found in memory.items()]
    return "\n".join(lines(("states in a training forward", "MB kept for backward", "peak MB"), rows))


def _megabytes(found: Peak | str) -> tuple[str, str]:
    if isinstance(found, str):
        return found, "-"
    return f"{found.saved / 1e6:.4g}", "-" if found.allocated is None else f"{found.allocated / 1e6:.4g}"


def outlook(found: Sequence[Round]) -> str:
    """What these calls make of the layout that the goal is stated for."""
    calls = {plain: median_calls(found, plain) for plain in found[0].calls}
    if len(calls) < 2:
        return ""
    theirs, ours = rl_cost.independent(Layout()).mean(calls[True]), Layout().mean(calls[False])
    group = Layout().group_size
    return (
        f"the same calls at G {group}, T 20, K 10, network alone: {FLASH.name} {3600 * group / theirs:.4g} samples/h,"
        f" {COLLAPSED.name} {3600 * group / ours:.4g}: {theirs / ours:.2f}x"
    )
