"""Records and tables of measured self-forcing cycles.

A cycle is a case of op ``distill_cycle``, each part of it one of ``distill_<part>`` with the same label. ``quality`` is
the distance of the replayed gradient to the joint graph's; its gate also asks that rollout and replay agree and that
rollouts repeat bit for bit. ``max_abs`` is the gap between rollout and replay, in sizes of the samples. Memory is the
device's peak with everything that lies there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from reelforge.bench import measure
from reelforge.bench.arms import FAILURES
from reelforge.bench.arms import Arm as RecordArm
from reelforge.bench.cases.case import Case, Work
from reelforge.bench.distill_backward import Checks, Comparison, check, compare
from reelforge.bench.distill_cost import Network
from reelforge.bench.distill_cycle import Bench, Cycle, Split, times
from reelforge.bench.distill_forecast import Forecast
from reelforge.bench.distill_plan import CRITIC_TURN, STUDENT_TURN, plan
from reelforge.bench.distill_world import World, label_of
from reelforge.bench.records import Derived, Memory, Quality, Record, Stamps
from reelforge.bench.rl_arms import Arm, kernels
from reelforge.bench.rl_records import page
from reelforge.bench.session import Session
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.tables import lines
from reelforge.bench.timing import spread
from reelforge.engine.distill.trainer import REPLAY_TOLERANCE

OP = "distill_cycle"
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # of a gradient
PARTS = tuple(field.name for field in fields(Split))
_USUAL_CRITIC_STEPS = 5

Found = TypeVar("Found")


def case(label: str, part: str = "total", flops: float = 0.0) -> Case:
    """A cycle, or a part of it; it has no operands of its own."""

    def unbuilt(*_: object) -> Any:
        raise AssertionError("a cycle's inputs come with its world")

    return Case(OP if part == "total" else f"distill_{part}", label, unbuilt, unbuilt, unbuilt, Work(0.0, flops))


@dataclass(frozen=True)
class Flops:
    """Of a cycle's parts, by arithmetic; ``chunks`` of each chunk's replay."""

    parts: Mapping[str, float]
    chunks: tuple[float, ...]


def flops(bench: Bench) -> Flops:
    """What the parts of a measured cycle cost."""
    world, layout = bench.world, bench.world.layout
    student, critic, teacher = networks(world)
    chunks = tuple(layout.replays(student))
    parts = {
        "rollout": 2 * layout.rollout(student, bench.exits),
        "teacher": (1 if world.guidance == 1.0 else 2) * layout.whole(teacher),
        "critic_score": layout.whole(critic),
        "replay": sum(chunks),
        "critic": layout.critic_step(critic),
    }
    return Flops({**parts, "total": sum(parts.values()), "rest": 0.0}, chunks)


def networks(world: World) -> tuple[Network, Network, Network]:
    """Student, critic and teacher, for the arithmetic."""
    named = ((world.student.model, world.name), (world.critic, world.name), (world.teacher, world.teacher_name))
    student, critic, teacher = (world.network(model, name) for model, name in named)
    return student, critic, teacher


def events(session: Session, world: World, arm: Arm, deadline: float) -> Iterator[dict[str, Any]]:
    """Checks, records of the cycle and its parts, and tables, of as many rounds as fit."""
    with kernels(arm, world.device):
        planned = _attempt(lambda: plan(world), world)
        checks = check(world)
        yield {"note": f"checks: {checks_text(world, checks)}"}
        against = _attempt(lambda: compare(world, session.rounds), world)
        yield {"note": f"backward: {comparison_text(against)}"}
        bench = Bench(world)
        bench.cycle()  # compiles, plans, allocates the optimizers' moments
        found: list[Cycle] = []
        with ClockSampler(session.nvml) as clocks:
            for cycle in bench.rounds(session.rounds, deadline, clocks, arm.name):
                found.append(cycle)
                yield {"note": f"cycle {len(found)}: {cycle.split.total:.3g} s"}
    for record in records(session, bench, found, arm, clocks.stamps()[arm.name], checks):
        yield {"record": record.table()}
    parts = (parts_table(bench, found), chunks_table(bench, found), memory_text(planned, found), outlook(found))
    told = (*parts, checks_text(world, checks), comparison_text(against))
    yield {"page": page(f"{case(label_of(world)).name}, {arm.name}", "\n\n".join(told))}


def _attempt(call: Callable[[], Found], world: World) -> Found | str:
    """What may fail and leaves the measurement standing: a plan, and a graph that may be too large for the device."""
    try:
        return call()
    except FAILURES as error:
        return measure.failure(error, world.device)


def records(
    session: Session, bench: Bench, found: Sequence[Cycle], arm: Arm, stamps: Stamps, checks: Checks
) -> Iterator[Record]:
    """One of every part that took time."""
    world, cost = bench.world, flops(bench)
    quality = judged(world, checks)
    sample: tuple[Tensor] = (torch.empty(0, dtype=torch.bfloat16 if world.precision == "bf16" else torch.float32),)
    peak = max(max(cycle.critic_peak, cycle.student_peak) for cycle in found)
    for part in PARTS:
        taken, counted = times(found, part), cost.parts[part]
        made = case(label_of(world), part, counted)
        record = session.record(
            made, sample, named(arm), "rate", quality=quality, timing=measure.summary(taken), stamps=stamps,
            derived=Derived(tflops=counted / taken.seconds.median / 1e12 or None),
            memory=Memory(peak_alloc_mb=peak / 1e6) if part == "total" and peak else Memory(),
        )  # fmt: skip
        inside = tuple(name for name in PARTS if name != "total") if part == "total" else (part,)
        yield replace(record, workload=replace(record.workload, inside_timer=inside, batch=world.batch))


def named(arm: Arm) -> RecordArm:
    """As records name it."""
    return RecordArm(arm.name, "plain" if arm.plain else "fused", lambda: (), ours=not arm.plain)


def judged(world: World, checks: Checks) -> Quality:
    """The gate of every record of the world."""
    tolerance = TOLERANCE[world.precision]
    sound = checks.gradient_error <= tolerance and checks.replay_gap <= REPLAY_TOLERANCE[world.precision]
    passed = sound and checks.deterministic
    return Quality(checks.gradient_error, tolerance, "pass" if passed else "fail", max_abs=checks.replay_gap)


# -- tables ------------------------------------------------------------------------------------------------------------


def parts_table(bench: Bench, found: Sequence[Cycle]) -> str:
    """Where a cycle's seconds go, medians over cycles."""
    cost, whole = flops(bench), times(found, "total").seconds.median
    rows = []
    for part in PARTS:
        seconds, counted = times(found, part).seconds.median, cost.parts[part]
        rows.append((part, f"{seconds:.3g}", f"{100 * seconds / whole:.1f}", *_rate(counted, seconds)))
    head = ("part", "s", "%", "TFLOP", "TF/s")
    return "\n".join([f"{label_of(bench.world)}, {len(found)} cycles", *lines(head, rows)])


def chunks_table(bench: Bench, found: Sequence[Cycle]) -> str:
    """The replay of each chunk."""
    layout, cost, rows, seen = bench.world.layout, flops(bench), [], 0
    for number, (frames, counted) in enumerate(zip(layout.pattern, cost.chunks, strict=True)):
        seen += frames
        seconds = spread([cycle.chunks[number] for cycle in found]).median
        tokens = (str(frames * layout.frame_tokens), str(seen * layout.frame_tokens))
        rows.append((str(number), *tokens, f"{seconds:.3g}", *_rate(counted, seconds)))
    return "\n".join(lines(("replay of chunk", "tokens", "sees", "s", "TFLOP", "TF/s"), rows))


def _rate(flops: float, seconds: float) -> tuple[str, str]:
    return (f"{flops / 1e12:.4g}", f"{flops / seconds / 1e12:.3g}") if flops else ("-", "-")


def memory_text(planned: Forecast | str, found: Sequence[Cycle]) -> str:
    """The device's peak in each turn, beside the plan's where there is one."""
    rows = []
    for name, moments in (("critic", CRITIC_TURN), ("student", STUDENT_TURN)):
        peak = max(getattr(cycle, f"{name}_peak") for cycle in found)
        expected = 0 if isinstance(planned, str) else max(map(planned.total, moments))
        sizes = (f"{size / 1e9:.4g}" if size else "-" for size in (expected, peak))
        rows.append((f"{name}'s turn", *sizes, f"{peak / expected:.3f}" if peak and expected else "-"))
    table = lines(("peak memory, GB", "planned", "measured", "measured / planned"), rows)
    return "\n".join([*table, f"no plan: {planned}"] if isinstance(planned, str) else table)


def outlook(found: Sequence[Cycle]) -> str:
    """Mean optimizer step at the usual number of critic steps."""
    split = {part: times(found, part).seconds.median for part in PARTS}
    student = split["rollout"] / 2 + split["teacher"] + split["critic_score"] + split["replay"] + split["rest"] / 2
    critic = split["rollout"] / 2 + split["critic"] + split["rest"] / 2
    cycle = student + _USUAL_CRITIC_STEPS * critic
    return f"a student's step with {_USUAL_CRITIC_STEPS} critic steps, every chunk to its last step: {cycle:.3g} s"


def checks_text(world: World, checks: Checks) -> str:
    """The checks in words."""
    precision = world.precision
    repeated = "are the same bit for bit" if checks.deterministic else "DIFFER"
    return (
        f"replayed gradient against the joint graph on {world.slice_layers} layers:"
        f" {checks.gradient_error:.2g} of {TOLERANCE[precision]:g};"
        f" rollout against replay: {checks.replay_gap:.2g} of {REPLAY_TOLERANCE[precision]:g};"
        f" two rollouts {repeated}"
    )


def comparison_text(found: Comparison | str) -> str:
    """The replayed backward beside the joint graph, or why that is missing."""
    if isinstance(found, str):
        return f"no joint graph: {found}"
    rows = [
        ("replayed", f"{found.replayed_s:.3g}", f"{found.replayed_bytes / 1e6:.4g}", _peak(found.replayed_peak)),
        ("joint", f"{found.joint_s:.3g}", f"{found.joint_bytes / 1e6:.4g}", _peak(found.joint_peak)),
        (
            "replayed / joint", f"{found.replayed_s / found.joint_s:.3f}",
            f"{found.replayed_bytes / found.joint_bytes:.3f}", "",
        ),
    ]  # fmt: skip
    head = (f"rollout and backward, {found.layers} layers", "s", "MB kept for backward", "peak MB")
    return "\n".join([*lines(head, rows), f"time by arithmetic: {found.expected:.3f}"])


def _peak(found: float | None) -> str:
    return "-" if found is None else f"{found / 1e6:.4g}"
