"""Accuracy of arms, records of a case, and the process that outlives its workers."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelforge.bench import accuracy, cost, machine, measure, runner, supervise, tables, worker
from reelforge.bench.arms import Arm
from reelforge.bench.cases.case import Case, Draw, Operands, Work
from reelforge.bench.record_files import read
from reelforge.bench.records import OURS, Record, Stamps, parse
from reelforge.bench.session import WHOLE, Session
from reelforge.bench.supervise import Folder
from reelforge.bench.worker import Job, Kind
from reelforge.kernels.errors import KernelError

CPU = torch.device("cpu")
PEAK = cost.Peak("measured", 1e10, cost.tensor_core_rates(1e11, 2e11), 1, 2e9)


def inputs(draw: Draw) -> Operands:
    return draw(7, 5, dtype=torch.float32, grad=True), draw(5, dtype=torch.float32, grad=True), None


def product(x: Tensor, row: Tensor, _: None) -> Tensor:
    return x * row


def case(**changes: object) -> Case:
    made = Case("product", "1.3B 4680 x 18720", inputs, product, product, Work(1e3, 2e3), tolerance=1e-6)
    return replace(made, **changes)


def session(**changes: object) -> Session:
    made = Session(CPU, "no NVML here", machine.hardware(), machine.software(), PEAK, rounds=5)
    return replace(made, **changes)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def quality(op: Callable, backward: bool = False, poisoned: bool = False) -> object:
    tested = case(backward=backward)
    return accuracy.Exact(tested, session().operands(tested)).quality(op, poisoned=poisoned)


@pytest.mark.parametrize("backward", [False, True])
def test_a_right_op_passes(backward: bool) -> None:
    found = quality(product, backward, poisoned=True)
    assert found.gate == "pass" and found.rel_l2 < 1e-7 and found.cosine == pytest.approx(1.0)


def test_an_unwritten_element_fails() -> None:
    def partial(x: Tensor, row: Tensor, _: None) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = (x * row)[:-1]
        return out

    found = quality(partial, poisoned=True)
    assert found.gate == "fail" and found.rel_l2 != found.rel_l2


def test_a_wrong_gradient_fails_where_the_output_is_right() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, row: Tensor) -> Tensor:
            return x * row

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad.sum(0)

    def op(x: Tensor, row: Tensor, _: None) -> Tensor:
        return Wrong.apply(x, row)

    assert quality(op).gate == "pass"
    assert quality(op, backward=True).gate == "fail"


def test_a_result_that_moves_between_runs_fails() -> None:
    runs = iter((0.0, 1e-7))

    def racing(x: Tensor, row: Tensor, _: None) -> Tensor:
        return x * row + next(runs)

    assert quality(racing, poisoned=True).gate == "fail"


def test_an_op_that_writes_its_operand_meets_the_same_one_every_time() -> None:
    def in_place(x: Tensor, row: Tensor, _: None) -> Tensor:
        return x.mul_(row)

    assert quality(in_place, poisoned=True).gate == "pass"


def test_an_exact_part_is_compared_alone() -> None:
    def first_row(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, row, _ = operands
        return outputs[0][0], x[0].double() * row.double()

    def wrong_below(x: Tensor, row: Tensor, _: None) -> Tensor:
        return torch.cat(((x * row)[:1], x[1:]))

    tested = case(exact=first_row)
    assert accuracy.Exact(tested, session().operands(tested)).quality(wrong_below).gate == "pass"


def test_distance_of_zeros_and_of_integers() -> None:
    zero = torch.zeros(3)
    assert accuracy.distance(zero, zero) == accuracy.Distance(0.0, 1.0, 0.0)
    assert accuracy.distance(zero + 1, zero).rel_l2 > 0
    bytes_ = torch.tensor([1, 2, 200], dtype=torch.uint8)
    assert accuracy.distance(bytes_, bytes_).rel_l2 == 0.0


# -- records of a case -------------------------------------------------------------------------------------------------


def fails(*_: object) -> Tensor:
    raise RuntimeError("CUDA out of memory:\n tried to allocate")


def unfit(*_: object) -> Tensor:
    raise KernelError("product is pinned to cuda, which does not fit: it was not built.", "Choose of ['torch'].")


def slow(x: Tensor, row: Tensor, _: None) -> Tensor:
    time.sleep(2e-3)
    return x * row


ARMS = [
    Arm(OURS, "triton", product, ours=True),
    Arm("slow", "slow", slow),
    Arm("broken", "broken", fails),
    Arm("elsewhere", "cuda", unfit),
]


def test_every_arm_leaves_its_records() -> None:
    begun: list[tuple[str, str]] = []
    told = session(begin=lambda record: begun.append((record.identity.case_id, record.identity.arm)))
    records = list(measure.rates(told, case(), ARMS))
    timed_arms = (OURS, "slow", WHOLE)
    assert begun == [("product 1.3B 4680 x 18720", arm) for arm in
                     (WHOLE, OURS, "slow", "broken", "elsewhere", *timed_arms, *timed_arms)]  # fmt: skip
    broken, *timed = records
    assert broken.verdict.status == "failed: RuntimeError: CUDA out of memory: tried to allocate"
    assert [(r.identity.arm, r.timing.l2) for r in timed if r.timing] == [
        (OURS, "cold"), ("slow", "cold"), (OURS, "warm"), ("slow", "warm"),
    ]  # fmt: skip
    check_derived(timed[0])
    text = tables.rates(case(), records)
    assert "floor" in text and "slow" in text and "broken: failed: RuntimeError" in text


def check_derived(record: Record) -> None:
    assert record.timing is not None and record.quality is not None and record.timing.rounds == 5
    seconds = record.timing.median_us / 1e6
    assert record.derived.gbps == pytest.approx(1e3 / seconds / 1e9)
    assert record.derived.pct_measured_peak == pytest.approx(100 * 1e-7 / seconds)
    assert record.derived.bound == "bytes" and record.derived.floor_us == pytest.approx(0.1)
    assert record.derived.ratio_vs["slow"].median > 1
    assert (record.workload.model, record.workload.tokens, record.workload.kv_tokens) == ("1.3B", 4680, 18720)
    assert record.workload.inside_timer == ("forward",)
    assert record.stamps is not None and not record.stamps.valid and record.stamps.note == "no NVML here"


def test_attention_says_what_its_last_wave_loses() -> None:
    told = session(hardware=replace(machine.hardware(), sm_count=132))
    records = list(measure.rates(told, case(op="attention"), ARMS[:1]))
    assert "128-row CTAs fill 83 % of 4 waves" in tables.rates(case(op="attention"), records)


def test_a_reference_that_fails_is_the_cases_failure() -> None:
    (lost,) = measure.rates(session(), case(reference=fails), ARMS)
    assert lost.identity.arm == WHOLE and lost.verdict.status == (
        "failed: RuntimeError: CUDA out of memory: tried to allocate"
    )


def test_forward_cases_carry_no_gradients_and_backward_cases_do() -> None:
    assert not any(t.requires_grad for t in session().operands(case()) if t is not None)
    records = list(measure.rates(session(), case(backward=True), ARMS[:1]))
    assert records[0].workload.inside_timer == ("forward", "backward")
    assert records[0].quality is not None and records[0].quality.gate == "pass"


class Bursts:
    """What a sampler was told of the length of its turns."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def burst(self, seconds: float) -> None:
        self.told.append(seconds)


@pytest.mark.parametrize(
    ("first", "rests", "bursts"),
    [
        (Stamps(True, sm_clock_spread=0.05), [1.0, 8.0], [5e-3]),
        (Stamps(False, throttle_reasons=("gpu_idle", "sw_power_cap")), [1.0, 8.0], [5e-3]),
        (Stamps(True, sm_clock_spread=0.01, throttle_reasons=("gpu_idle",)), [1.0], []),
        (Stamps(False, note="no NVML here"), [1.0], []),
    ],
    ids=["clocks that differ", "throttled", "sound", "unknown"],
)
def test_what_ran_at_slow_clocks_is_measured_once_more_and_gently(
    monkeypatch: pytest.MonkeyPatch, first: Stamps, rests: list[float], bursts: list[float]
) -> None:
    rested: list[float] = []

    def once(told: Session, samplers: dict, active: Callable, rest: float) -> tuple[dict, dict]:
        rested.append(rest)
        return {"a": len(rested)}, {"a": first}

    monkeypatch.setattr(measure, "_interleave", once)
    sampler = Bursts()
    times, _ = measure.interleave(session(), {"a": sampler}, lambda name: None)
    assert (rested, sampler.told, times) == (rests, bursts, {"a": len(rests)})


def test_what_compiles_comes_last_and_beside_the_first_arm() -> None:
    begun: list[str] = []
    told = session(begin=lambda record: begun.append(record.identity.arm))
    late = Arm("compiled", "compiled", slow)
    records = list(measure.rates(told, case(), [ARMS[0], late, ARMS[1]]))
    timed = [(r.identity.arm, r.timing.l2) for r in records if r.timing]
    assert timed == [
        (OURS, "cold"), ("slow", "cold"), (OURS, "warm"), ("slow", "warm"),
        (OURS, "cold"), ("compiled", "cold"), (OURS, "warm"), ("compiled", "warm"),
    ]  # fmt: skip
    assert begun.index("compiled") > begun.index("slow") + 2, "not even called before the others' times are taken"
    assert set(records[-2].derived.ratio_vs) == {"slow", "compiled"}, "and no ratio is lost"
    row = tables.rates(case(), records).splitlines()[-1].split()
    assert row[0] == "compiled" and float(row[-2]) > 0 and len(row) == 11 + 1


def test_a_late_arm_that_fails_leaves_the_others_times() -> None:
    late = Arm("compiled", "compiled", fails)
    records = list(measure.rates(session(), case(), [*ARMS[:2], late]))
    assert sum(record.timing is not None for record in records) == 4 + 2
    assert [r.verdict.status for r in records if r.identity.arm == "compiled"] == [
        "failed: RuntimeError: CUDA out of memory: tried to allocate"
    ]


def test_arms_that_compile_are_left_out_late_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    affordable = worker._affordable(Job("peers", budget_s=100.0))
    arms = [Arm(name, name, product) for name in ("cudnn", "flex", "compiled")]
    now[0] = 59.0
    assert affordable(arms) == arms
    now[0] = 61.0
    assert [arm.name for arm in affordable(arms)] == ["cudnn"]


def test_a_lost_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure.failure(RuntimeError("illegal"), torch.device("cuda"))


# -- workers -----------------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import json, os, sys, time
job, events = json.loads(sys.argv[-1]), json.loads(open(sys.argv[1]).read())
skip = [tuple(pair) for pair in job["skip"]]
for name, record in events:
    case, arm = (record["identity"]["case_id"], record["identity"]["arm"]) if record else (None, None)
    if (case, arm) in skip or (case, "case") in skip:
        continue
    if name == "note":
        print(json.dumps({"note": "a note"}), flush=True)
    elif name == "print":
        print("AUTOTUNE mm", flush=True)
        print("{'a': 'dict'}", flush=True)
        print("7", flush=True)
    elif name == "record":
        print(json.dumps({"record": record}), flush=True)
    elif name == "begin":
        print(json.dumps({"begin": record}), flush=True)
    elif name == "die":
        sys.stderr.write("an illegal memory access\\n")
        os._exit(7)
    elif name == "hang":
        time.sleep(60)
    elif name == "end":
        print(json.dumps({"end": True}), flush=True)
"""


def record(case_id: str, arm: str) -> dict:
    told = session()
    made = told.record(case(), (), Arm(arm, arm, product), "accuracy")
    return replace(made, identity=replace(made.identity, case_id=case_id)).table()


def follow(
    tmp_path: Path,
    events: list[tuple[str, dict | None]],
    limit_s: float = 20.0,
    step_limit_s: float = 10.0,
    kind: Kind = "accuracy",
) -> tuple[supervise.Outcome, list[Record], str]:
    script, plan = tmp_path / "worker.py", tmp_path / "plan.json"
    script.write_text(FAKE_WORKER)
    plan.write_text(json.dumps(events))
    with Folder(tmp_path / "out") as folder:
        launcher = (sys.executable, str(script), str(plan))
        outcome = supervise.run(
            Job(kind), folder, time.monotonic() + limit_s, launcher=launcher, step_limit_s=step_limit_s
        )
    found = [entry.record for entry in read(folder.records) if entry.record]
    return outcome, found, folder.log.read_text() if folder.log.exists() else ""


def test_records_and_notes_are_written(tmp_path: Path) -> None:
    events = [("begin", record("a", OURS)), ("print", None), ("record", record("a", OURS)), ("note", None)]
    outcome, found, log = follow(tmp_path, events)
    assert outcome == supervise.Outcome(True, 1, 0)
    assert [each.identity.case_id for each in found] == ["a"]
    assert "a note" in log and "AUTOTUNE" in log


def test_a_dead_worker_costs_one_arm(tmp_path: Path) -> None:
    events = [
        ("begin", record("a", OURS)), ("record", record("a", OURS)),
        ("begin", record("b", "peer")), ("die", record("b", "peer")),
        ("begin", record("c", OURS)), ("record", record("c", OURS)),
    ]  # fmt: skip
    outcome, found, log = follow(tmp_path, events)
    assert outcome.finished and outcome.failed == 1
    assert [(each.identity.case_id, each.verdict.status) for each in found] == [
        ("a", None), ("b", "failed: its process ended with exit code 7"), ("c", None),
    ]  # fmt: skip
    assert "an illegal memory access" in log


def test_what_dies_under_a_checker_is_no_record_of_the_kernel(tmp_path: Path) -> None:
    events = [("begin", record("a", OURS)), ("die", record("a", OURS))]
    outcome, found, log = follow(tmp_path, events, kind="sanitize")
    assert outcome == supervise.Outcome(True, 0, 1) and not found and "exit code 7" in log


def test_a_hanging_arm_is_ended(tmp_path: Path) -> None:
    events = [("begin", record("a", OURS)), ("hang", record("a", OURS)), ("begin", record("b", OURS))]
    outcome, found, _ = follow(tmp_path, events, step_limit_s=1.0)
    assert outcome == supervise.Outcome(True, 0, 1)
    assert found[0].verdict.status == "failed: no progress for 1 s"


@pytest.mark.parametrize("end", ["die", "hang"])
def test_what_a_worker_does_after_its_last_line_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(supervise, "_EXIT_S", 0.5)
    events = [("begin", record("a", OURS)), ("record", record("a", OURS)), ("end", None), (end, None)]
    start = time.monotonic()
    outcome, found, _ = follow(tmp_path, events)
    assert outcome == supervise.Outcome(True, 1, 0) and time.monotonic() - start < 8
    assert [each.verdict.status for each in found] == [None]


def test_a_case_whose_times_are_there_is_not_run_again_for_what_compiles(tmp_path: Path) -> None:
    warm = next(r for r in measure.rates(session(), case(), ARMS[:1]) if r.timing and r.timing.l2 == "warm")
    warm = replace(warm, identity=replace(warm.identity, case_id="a"))
    events = [
        ("begin", record("a", OURS)), ("record", warm.table()),
        ("begin", record("a", "compiled")), ("die", record("a", "compiled")),
        ("begin", record("b", OURS)), ("record", record("b", OURS)),
    ]  # fmt: skip
    outcome, found, _ = follow(tmp_path, events)
    assert outcome == supervise.Outcome(True, 2, 1)
    assert [(each.identity.case_id, each.identity.arm) for each in found] == [
        ("a", OURS), ("a", "compiled"), ("b", OURS),
    ]  # fmt: skip


def test_a_worker_says_that_it_is_done_and_goes_at_once(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    codes: list[int] = []
    monkeypatch.setattr(worker, "run", lambda job, device: iter([{"note": "x"}]))
    monkeypatch.setattr(worker.os, "_exit", codes.append)
    assert worker.main([Job("accuracy").text()]) == 0 and codes == [0]
    assert capsys.readouterr().out.splitlines() == ['{"note": "x"}', '{"end": true}']
    assert worker.main([Job("sanitize").text()]) == 0 and codes == [0], "a checker sees a regular exit"


def settled(*records: dict) -> set[str]:
    return worker._settled([parse(each) for each in records])


def test_what_was_lost_is_tried_again() -> None:
    ran = {**record("a", OURS), "quality": {"rel_l2": 0.0, "tolerance": 1e-6, "gate": "pass"}}
    crashed, whole = record("a", "cudnn"), record("a", WHOLE)
    assert settled(ran) == {"a"}
    assert settled(whole) == settled(ran, crashed) == settled(crashed, ran) == settled(ran, whole) == set()
    assert settled(whole, ran) == {"a"}
    peer = {**ran, "identity": crashed["identity"]}
    assert settled(crashed, ran, peer) == {"a"}, "it ran later"
    rate = {**crashed, "identity": {**crashed["identity"], "kind": "rate"}}
    warm = next(r for r in measure.rates(session(), case(), ARMS[:1]) if r.timing and r.timing.l2 == "warm")
    timed = replace(warm, identity=replace(warm.identity, case_id="a")).table()
    assert settled(rate) == set() and settled(timed, rate) == settled(rate, timed) == {"a"}


def test_time_is_up_and_what_was_recorded_counts(tmp_path: Path) -> None:
    events = [("begin", record("a", OURS)), ("record", record("a", OURS)), ("begin", record("b", OURS)), ("hang", None)]
    start = time.monotonic()
    outcome, found, log = follow(tmp_path, events, limit_s=2.0)
    assert time.monotonic() - start < 8 and "its time is up" in log
    assert outcome == supervise.Outcome(False, 1, 0)
    assert [each.identity.case_id for each in found] == ["a"], "what was cut off did not fail"


def test_a_worker_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    outcome, found, log = follow(tmp_path, [("die", None)])
    assert outcome == supervise.Outcome(False, 0, 0) and not found
    assert "exit code 7" in log and "an illegal memory access" in log


def test_a_job_survives_its_command_line() -> None:
    job = Job("rates", "norms", ("gelu",), "1.3B", (("a case", OURS),), "records.jsonl", quick=True, budget_s=9.5)
    assert Job.of(job.text()) == job
    assert not job.wants("a case", OURS) and job.wants("a case") and job.wants("b", OURS)


def test_families_are_the_modules_with_cases() -> None:
    assert "norms" in runner.families() and "case" not in runner.families()
