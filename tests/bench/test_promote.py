"""What makes a kernel proven, and what takes the proof back."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reelforge.bench import machine, quick
from reelforge.bench.arms import Arm
from reelforge.bench.cases.case import Case, Draw
from reelforge.bench.cases.catalogue import all_cases
from reelforge.bench.promote import PROVEN, Outcome, judge, promote, served, updated
from reelforge.bench.record_files import read
from reelforge.bench.records import OURS, Record
from reelforge.bench.session import Session
from reelforge.kernels import dispatch, norm_modulate

DATA = Path(__file__).parent / "data"
KERNEL, HASH = "norm_modulate/triton", dispatch.source_hash(norm_modulate)
SOURCES = {KERNEL: HASH}
CASES = all_cases()
OWN = [case for case in CASES if case.op == "norm_modulate"]


@pytest.fixture(scope="module")
def record() -> Record:
    """A valid record of the present source, with times."""
    found = read(DATA / "new_pass.jsonl")[0].record
    return other(found, "identity", kernel_hash=HASH)


def other(record: Record, group: str, **values: object) -> Record:
    return replace(record, **{group: replace(getattr(record, group), **values)})


def of(record: Record, case: Case) -> Record:
    """The record as the case's own."""
    record = other(record, "identity", case_id=case.name)
    work = {"op": case.op, "backward": case.backward, "bytes": case.work.bytes, "flops": case.work.flops}
    return other(other(record, "workload", **work), "quality", tolerance=case.tolerance, rel_l2=case.tolerance / 2)


def proof(record: Record, cases: Sequence[Case] = OWN) -> list[Record]:
    return [of(record, case) for case in cases]


def accuracy_only(record: Record) -> Record:
    return replace(other(record, "identity", kind="accuracy"), timing=None, stamps=None)


def inaccurate(record: Record) -> Record:
    return other(record, "quality", rel_l2=math.nan, gate="fail")


def throttled(record: Record) -> Record:
    return other(record, "stamps", valid=False, throttle_reasons=("sw_power_cap",))


def one(records: list[Record], sources: dict = SOURCES, cases: Sequence[Case] = CASES) -> Outcome:
    (found,) = judge(records, sources, cases)
    return found


def test_all_cases_passed(record: Record) -> None:
    first, *rest = proof(record)
    found = one([accuracy_only(first), *rest])
    reason = f"{len(OWN)} cases passed"
    assert (found.kernel, found.hardware, found.state, found.reason) == (KERNEL, "9.0", "promoted", reason)
    assert str(found) == f"promoted   {KERNEL} on 9.0: {reason}"


@pytest.mark.parametrize("left_out", OWN, ids=lambda case: case.name)
def test_a_case_without_a_record_is_named_and_leaves_the_kernel_unproven(record: Record, left_out: Case) -> None:
    found = one(proof(record, [case for case in OWN if case is not left_out]))
    reason = f"1 of {len(OWN)} cases are not proven: {left_out.name} (no record)"
    assert (found.state, found.reason) == ("refused", reason)


def test_one_variant_does_not_prove_the_other(record: Record) -> None:
    """An implementation of several kernels, one of which a run reached before it was cut off."""
    frames = [case for case in CASES if case.op == "frames"]
    reached = [case for case in frames if "uint8" in case.name]
    found = one(proof(record, reached), {"frames/triton": HASH})
    assert found.state == "refused"
    assert all((f"{case.name} (no record)" in found.reason) == (case not in reached) for case in frames)


CHANGES = {
    "on a CPU": (lambda r: other(r, "hardware", gpu_capability=None), "refused", "not run on a GPU"),
    "other source": (lambda r: other(r, "identity", kernel_hash="old"), "refused", "(no record)"),
    "inaccurate": (inaccurate, "disproved", f"1 cases failed, first {OWN[0].name}: rel-L2 is nan"),
    "without accuracy": (lambda r: replace(r, quality=None), "disproved", "no accuracy"),
    "gate failed": (lambda r: other(r, "quality", gate="fail"), "disproved", "the accuracy gate failed"),
    "throttled": (throttled, "refused", f"{OWN[0].name} (throttled: sw_power_cap)"),
    "miniature": (lambda r: other(r, "workload", bytes=r.workload.bytes / 100), "refused", "(of another size)"),
    "forward only": (lambda r: other(r, "workload", backward=not r.workload.backward), "refused", "another size"),
    "laxer": (lambda r: other(r, "quality", tolerance=0.1), "refused", "(its tolerance 0.1 is above the case's 0.004)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_proof(record: Record, name: str) -> None:
    change, state, reason = CHANGES[name]
    first, *rest = proof(record)
    found = judge([change(first), *rest], SOURCES, CASES)[0]
    assert found.state == state and reason in found.reason


def test_a_quick_run_is_no_proof_at_any_size(record: Record) -> None:
    hopper = replace(machine.hardware("none"), gpu_capability="9.0")
    session = quick.session(Session(torch.device("cpu"), "none", hopper, machine.software()))
    kernel = Arm(OURS, "triton", lambda: None)
    records = [
        session.record(case, (torch.ones(1),), kernel, "accuracy", quality=of(record, case).quality) for case in OWN
    ]
    found = one(records, machine.sources())
    assert found.state == "refused" and found.reason.count("(of a quick run)") == len(OWN)


def test_inaccurate_once_then_accurate_is_disproved(record: Record) -> None:
    assert one([inaccurate(of(record, OWN[0])), *proof(record)]).state == "disproved"


def test_an_older_source_alone(record: Record) -> None:
    assert one([other(record, "identity", kernel_hash="old")]).reason == "its source is another one now"


def test_a_throttled_time_does_not_void_the_accuracy_run_beside_it(record: Record) -> None:
    first, *rest = proof(record)
    assert one([accuracy_only(first), throttled(first), *rest]).state == "promoted"


def test_failures_of_an_older_source_are_forgotten(record: Record) -> None:
    older = inaccurate(other(of(record, OWN[0]), "identity", kernel_hash="old"))
    assert one([older, *proof(record)]).state == "promoted"


def test_a_kernel_or_a_catalogue_that_is_no_more(record: Record) -> None:
    assert one([record], sources={}).reason == "unknown"
    assert one(proof(record), cases=[]).state == "refused"


def test_peers_and_libraries_need_no_proof(record: Record) -> None:
    eager = other(record, "identity", arm="eager", kernel_impl="torch", kernel_hash="")
    assert judge([eager, other(record, "identity", kernel_hash="")], SOURCES, CASES) == []


def test_classes_of_hardware_are_judged_apart(record: Record) -> None:
    other_class = inaccurate(other(of(record, OWN[0]), "hardware", gpu_capability="8.0"))
    assert [(found.hardware, found.state) for found in judge([*proof(record), other_class], SOURCES, CASES)] == [
        ("9.0", "promoted"),
        ("8.0", "disproved"),
    ]


# -- which cases a kernel serves ---------------------------------------------------------------------------------------


def test_every_kernel_serves_cases_and_has_them_on_a_machine_that_cannot_run_it() -> None:
    for kernel in machine.sources():
        assert served(kernel, CASES) == [case for case in CASES if case.op == kernel.split("/")[0]] != []


def test_what_a_kernel_refuses_is_not_asked_of_it() -> None:
    forward = next(case for case in CASES if case.op == "attention")

    def with_grad(draw: Draw) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.requires_grad_() for tensor in forward.inputs(draw))

    backward = replace(forward, inputs=with_grad, backward=True)
    assert served("attention/triton", [forward, backward]) == [forward]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    before = {KERNEL: {"8.0": "old", "9.0": "old"}, "gelu/triton": {"9.0": "g"}, "sde_step/cuda": {"9.0": "s"}}
    outcomes = [
        Outcome(KERNEL, "9.0", "promoted", ""),
        Outcome("gelu/triton", "9.0", "disproved", ""),
        Outcome("sde_step/cuda", "9.0", "refused", ""),
        Outcome("ema_lerp/triton", "9.0", "disproved", ""),
    ]
    assert updated(before, outcomes, SOURCES) == {KERNEL: {"8.0": "old", "9.0": HASH}, "sde_step/cuda": {"9.0": "s"}}
    assert before[KERNEL]["9.0"] == "old"


def test_promoting_writes_the_table_that_dispatch_chooses_by(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proven.json"
    monkeypatch.setattr(dispatch, "proven_path", lambda: path if path.exists() else None)
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "9.0")
    dispatch.forget()

    def chosen() -> str:
        return dispatch.choose("norm_modulate", dispatch.Query("cuda", torch.bfloat16))

    try:
        assert [found.state for found in promote(proof(record), path, check=True)] == ["promoted"]
        assert not path.exists() and chosen() == "torch"
        promote(proof(record), path)
        assert json.loads(path.read_text()) == {KERNEL: {"9.0": HASH}} == {KERNEL: {"9.0": machine.sources()[KERNEL]}}
        assert chosen() == "triton", "what was chosen before is forgotten"
        promote([inaccurate(of(record, OWN[0]))], path)
        assert dispatch.proven() == {} and chosen() == "torch"
    finally:
        monkeypatch.undo()
        dispatch.forget()


def test_the_stored_table_is_the_one_that_dispatch_finds() -> None:
    assert dispatch.proven_path().samefile(PROVEN)
    assert all(isinstance(classes, dict) for classes in json.loads(PROVEN.read_text()).values())
