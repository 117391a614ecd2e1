"""Which records count, what is said of those that do not, and files that were cut off."""

import copy
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.bench.record_files import RecordLog, read
from reelforge.bench.records import OURS, Quality, Record, fingerprint, parse, validate
from reelforge.engine.core.errors import DataError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def record() -> Record:
    return read(DATA / "new_pass.jsonl")[0].record


def test_the_stored_examples_are_what_their_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", DATA / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, records in {"run": module.run(), **module.comparison_files()}.items():
        assert [entry.record for entry in read(DATA / f"{name}.jsonl")] == records, name


def test_a_record_survives_json(record: Record) -> None:
    assert parse(json.loads(json.dumps(record.table()))) == record
    assert validate(record) == []


def change(table: dict, path: str, value: object) -> dict:
    """A copy with one key set, or deleted for None."""
    table = copy.deepcopy(table)
    *groups, leaf = path.split(".")
    inner = table
    for group in groups:
        inner = inner[group]
    inner[leaf] = value
    if value is DELETED:
        del inner[leaf]
    return table


DELETED = object()
SHAPE_FAULTS = {
    "unknown group": ("colour", "red", "unknown key record.colour"),
    "unknown key": ("timing.median_ms", 3.0, "unknown key record.timing.median_ms"),
    "missing group": ("hardware", DELETED, "record.hardware is missing"),
    "missing key": ("workload.seed", DELETED, "record.workload.seed is missing"),
    "text for a number": ("timing.median_us", "fast", "record.timing.median_us is 'fast', not float"),
    "bool for a number": ("timing.rounds", True, "record.timing.rounds is True, not int"),
    "null for a number": ("workload.bytes", None, "record.workload.bytes is None, not float"),
    "word outside a set": ("timing.l2", "tepid", "record.timing.l2 is 'tepid', not 'cold' or 'warm'"),
    "text for a group": ("stamps", "valid", "record.stamps is 'valid', not a table"),
    "inside a list": ("workload.inside_timer", ["a", 1], "record.workload.inside_timer[1] is 1, not str"),
    "text for a list": ("workload.inside_timer", "kernel", "record.workload.inside_timer is 'kernel', not tuple"),
    "inside a map": ("software.env_flags", {"x": 1}, "record.software.env_flags.x is 1, not str"),
    "list for a map": ("software.env_flags", [], "record.software.env_flags is [], not Mapping"),
    "inside a group in a map": ("derived.ratio_vs", {"eager": {"median": 2.0, "p20": 1.9}},
                                "record.derived.ratio_vs.eager.p80 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPE_FAULTS)
def test_a_table_that_is_no_record(record: Record, name: str) -> None:
    path, value, reason = SHAPE_FAULTS[name]
    assert reason in validate(change(record.table(), path, value))


def test_every_fault_is_named_at_once(record: Record) -> None:
    table = change(change(record.table(), "timing.median_us", "fast"), "workload.seed", DELETED)
    assert len(validate(change(table, "colour", "red"))) == 3
    assert validate([]) == ["record is [], not a table"]


def test_whole_numbers_serve_as_floats(record: Record) -> None:
    assert parse(change(record.table(), "quality.tolerance", 1)).quality.tolerance == 1.0


VALUE_FAULTS = {
    "no quality": ("quality", None, "no accuracy"),
    "no accuracy": ("quality.rel_l2", None, "no accuracy"),
    "NaN": ("quality.rel_l2", math.nan, "rel-L2 is nan"),
    "infinite": ("quality.rel_l2", math.inf, "rel-L2 is inf"),
    "inaccurate": ("quality.rel_l2", 0.00401, "rel-L2 0.00401 is above its tolerance 0.004"),
    "gate": ("quality.gate", "fail", "the accuracy gate failed"),
    "no timing": ("timing", None, "no timing"),
    "few rounds": ("timing.rounds", 4, "4 rounds, not at least 5"),
    "zero time": ("timing.min", 0.0, "are not in order"),
    "NaN time": ("timing.median_us", math.nan, "are not in order"),
    "endless time": ("timing.p80", math.inf, "are not in order"),
    "quantiles swapped": ("timing.p20", 1e6, "are not in order"),
    "timer unsaid": ("workload.inside_timer", [], "what is inside the timer is not said"),
    "no stamps": ("stamps", None, "no clock stamps"),
    "stamps without NVML": ("stamps", {"valid": False, "note": "NVML: gone"}, "clock stamps are not valid: NVML: gone"),
    "power cap": ("stamps.throttle_reasons", ["gpu_idle", "sw_power_cap"], "throttled: sw_power_cap"),
    "heat": ("stamps.throttle_reasons", ["hw_thermal_slowdown"], "throttled: hw_thermal_slowdown"),
    "a reason of the future": ("stamps.throttle_reasons", ["unknown"], "throttled: unknown"),
    "arms at other clocks": ("stamps.sm_clock_spread", 0.031, "the arms' SM clocks differ by 3.1%, more than 3%"),
    "NaN spread": ("stamps.sm_clock_spread", math.nan, "the arms' SM clocks differ by nan%"),
    "other schema": ("identity.schema_version", 2, "schema version 2 is not 1"),
    "arm that failed": ("verdict.status", "failed: out of memory", "failed: out of memory"),
}


@pytest.mark.parametrize("name", VALUE_FAULTS)
def test_a_record_that_must_not_be_quoted(record: Record, name: str) -> None:
    path, value, reason = VALUE_FAULTS[name]
    (found,) = validate(change(record.table(), path, value))
    assert reason in found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stamps.throttle_reasons", ["gpu_idle", "applications_clocks_setting", "display_clock_setting"]),
        ("stamps.sm_clock_spread", 0.03),
        ("quality.rel_l2", 0.004),
        ("quality.rel_l2", 0.0),
        ("timing.host_us", None),
        ("identity.git_sha", None),
    ],
)
def test_what_is_allowed(record: Record, path: str, value: object) -> None:
    assert validate(change(record.table(), path, value)) == []


def test_an_accuracy_record_needs_no_timing_but_accuracy(record: Record) -> None:
    proof = replace(record, identity=replace(record.identity, kind="accuracy"), timing=None, stamps=None)
    assert validate(proof) == []
    assert validate(replace(proof, quality=Quality(None, 0.004, "fail"))) == ["no accuracy"]


def test_ours_and_peers(record: Record) -> None:
    arms = {arm: replace(record.identity, arm=arm).ours for arm in (OURS, "ours/cuda", "oursome", "cudnn")}
    assert arms == {OURS: True, "ours/cuda": True, "oursome": False, "cudnn": False}


def test_fingerprints_name_content(record: Record) -> None:
    assert fingerprint(record.workload, 1) == fingerprint(replace(record.workload), 1)
    assert fingerprint(record.workload) != fingerprint(replace(record.workload, seed=1))


def test_appended_lines_read_back(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new/records.jsonl"
    bad = replace(record, quality=replace(record.quality, rel_l2=math.nan))
    with RecordLog(path) as log:
        log.append(record)
        assert [entry.record for entry in read(path)] == [record]  # while the log is open
        log.append(bad)
    first, second = read(path)
    assert (first.origin, first.reasons) == (f"{path}:1", ())
    assert (second.origin, second.reasons) == (f"{path}:2", ("rel-L2 is nan",))


def test_a_cut_off_file_still_reads_and_goes_on(record: Record, tmp_path: Path, capsys) -> None:
    path = tmp_path / "cut.jsonl"
    with RecordLog(path) as log:
        log.append(record)
        log.append(record)
    path.write_bytes(path.read_bytes()[:-40])
    assert len(read(path)) == 1
    assert "cut.jsonl:2 was cut off; it is skipped" in " ".join(capsys.readouterr().err.split())
    with RecordLog(path) as log:
        log.append(record)
    assert [entry.reasons for entry in read(path)] == [(), ()]


def test_a_broken_line_in_the_middle_is_named(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    line = json.dumps(record.table())
    path.write_text(f"{line}\n{line[:50]}\n[1]\n{line}\n")
    entries = read(path)
    assert [entry.record is None for entry in entries] == [False, True, True, False]
    assert entries[1].origin == f"{path}:2" and entries[1].reasons[0].startswith("not JSON")
    assert entries[2].reasons == ("record is [1], not a table",)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl cannot be read \(No such file"):
        read(tmp_path / "none.jsonl")
