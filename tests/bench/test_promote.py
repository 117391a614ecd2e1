"""What makes a kernel proven, and what takes the proof back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.bench import machine
from reelforge.bench.promote import PROVEN, Outcome, judge, promote, updated
from reelforge.bench.record_files import read
from reelforge.bench.records import Record
from reelforge.kernels import dispatch, norm_modulate

DATA = Path(__file__).parent / "data"
KERNEL, HASH = "norm_modulate/triton", dispatch.source_hash(norm_modulate)
SOURCES = {KERNEL: HASH}


@pytest.fixture(scope="module")
def record() -> Record:
    """A valid record of the present source, with times."""
    found = read(DATA / "new_pass.jsonl")[0].record
    return other(found, "identity", kernel_hash=HASH)


def other(record: Record, group: str, **values: object) -> Record:
    return replace(record, **{group: replace(getattr(record, group), **values)})


def case(record: Record, name: str, backward: bool = False) -> Record:
    return other(other(record, "identity", case_id=name), "workload", backward=backward)


def accuracy_only(record: Record) -> Record:
    return replace(other(record, "identity", kind="accuracy"), timing=None, stamps=None)


def inaccurate(record: Record) -> Record:
    return other(record, "quality", rel_l2=math.nan, gate="fail")


def throttled(record: Record) -> Record:
    return other(record, "stamps", valid=False, throttle_reasons=("sw_power_cap",))


def one(records: list[Record], with_backward: tuple[str, ...] = (), sources: dict = SOURCES) -> Outcome:
    (found,) = judge(records, sources, with_backward)
    return found


def test_all_cases_passed(record: Record) -> None:
    found = one([case(record, "a"), accuracy_only(case(record, "b")), case(record, "c", backward=True)])
    assert (found.kernel, found.hardware, found.state, found.reason) == (KERNEL, "9.0", "promoted", "3 cases passed")
    assert str(found) == f"promoted   {KERNEL} on 9.0: 3 cases passed"


REFUSED = {
    "on a CPU": (lambda r: [other(r, "hardware", gpu_capability=None)], "refused", "not run on a GPU"),
    "other source": (lambda r: [other(r, "identity", kernel_hash="old")], "refused", "its source is another one now"),
    "one case inaccurate": (lambda r: [case(r, "a"), inaccurate(case(r, "b"))], "disproved",
                            "1 cases failed, first b: rel-L2 is nan"),
    "inaccurate once, then accurate": (lambda r: [inaccurate(r), r], "disproved", "rel-L2 is nan"),
    "one case without accuracy": (lambda r: [case(r, "a"), replace(case(r, "b"), quality=None)], "disproved",
                                  "1 cases failed, first b: no accuracy"),
    "gate failed": (lambda r: [other(r, "quality", gate="fail")], "disproved", "the accuracy gate failed"),
    "one case throttled": (lambda r: [case(r, "a"), throttled(case(r, "b"))], "refused",
                           "1 cases failed, first b: throttled: sw_power_cap"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_proof(record: Record, name: str) -> None:
    records, state, reason = REFUSED[name]
    found = one(records(record))
    assert found.state == state and reason in found.reason


def test_a_throttled_time_does_not_void_the_accuracy_run_beside_it(record: Record) -> None:
    assert one([accuracy_only(record), throttled(record)]).state == "promoted"


def test_failures_of_an_older_source_are_forgotten(record: Record) -> None:
    assert one([inaccurate(other(record, "identity", kernel_hash="old")), record]).state == "promoted"


def test_an_op_with_backward_cases_needs_one(record: Record) -> None:
    forward = case(record, "a")
    assert one([forward], ("norm_modulate",)).reason == "its backward pass has no record"
    assert one([forward, case(record, "b", backward=True)], ("norm_modulate",)).state == "promoted"
    assert one([forward, inaccurate(case(record, "b", backward=True))], ("norm_modulate",)).state == "disproved"


def test_a_kernel_that_is_no_more(record: Record) -> None:
    assert one([record], sources={}).reason == "unknown"


def test_peers_and_libraries_need_no_proof(record: Record) -> None:
    eager = other(record, "identity", arm="eager", kernel_impl="torch", kernel_hash="")
    assert judge([eager, other(record, "identity", kernel_hash="")], SOURCES, ()) == []


def test_classes_of_hardware_are_judged_apart(record: Record) -> None:
    other_class = inaccurate(other(record, "hardware", gpu_capability="8.0"))
    assert [(found.hardware, found.state) for found in judge([record, other_class], SOURCES, ())] == [
        ("9.0", "promoted"),
        ("8.0", "disproved"),
    ]


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


def test_promoting_writes_the_table_that_dispatch_reads(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proven.json"
    proof = [case(record, "a"), case(record, "b", backward=True)]
    assert [found.state for found in promote(proof, path, check=True)] == ["promoted"]
    assert not path.exists()
    promote(proof, path)
    assert json.loads(path.read_text()) == {KERNEL: {"9.0": HASH}}
    monkeypatch.setattr(dispatch, "proven_path", lambda: path)
    dispatch.proven.cache_clear()
    try:
        assert dispatch.proven()[KERNEL]["9.0"] == machine.sources()[KERNEL]
        promote([inaccurate(record)], path)
        assert dispatch.proven() == {}
    finally:
        monkeypatch.undo()
        dispatch.proven.cache_clear()


def test_the_stored_table_is_the_one_that_dispatch_finds() -> None:
    assert dispatch.proven_path().samefile(PROVEN)
    assert all(isinstance(classes, dict) for classes in json.loads(PROVEN.read_text()).values())
