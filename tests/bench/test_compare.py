"""Both gates of ``bench compare`` and every status, on stored records."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.bench.compare import (
    LIMITS,
    Limit,
    Row,
    Status,
    compare,
    compare_files,
    hardware_profile,
    read_limits,
    recipe,
)
from reelforge.bench.record_files import Entry, read
from reelforge.bench.records import Record
from reelforge.engine.core.errors import DataError

DATA = Path(__file__).parent / "data"
NO_LIMITS: dict = {}


@pytest.fixture(scope="module")
def record() -> Record:
    """One case at some time; the tests write the time themselves."""
    return read(DATA / "new_regression.jsonl")[1].record


def taking(record: Record, median_us: float, day: int = 1, memory_mb: float | None = None) -> Record:
    timing = replace(record.timing, median_us=median_us, min=0.1, p20=0.2, p80=1e9)
    memory = replace(record.memory, peak_alloc_mb=memory_mb)
    identity = replace(record.identity, timestamp=f"2026-01-{day:02d}T00:00:00.000+00:00")
    return replace(record, timing=timing, memory=memory, identity=identity)


def entries(records: Iterable[Record]) -> list[Entry]:
    return [Entry(f"x:{i}", record, ()) for i, record in enumerate(records, start=1)]


def row(record: Record, baselines: Sequence[float], new: float, limits: dict = NO_LIMITS) -> Row:
    """The one row of a new time against baselines on successive days."""
    base = [taking(record, median_us, day) for day, median_us in enumerate(baselines, start=1)]
    (found,) = compare(entries(base), entries([taking(record, new, 28)]), limits)[0].rows
    return found


@pytest.mark.parametrize("status", Status, ids=lambda status: status.name)
def test_stored_records_for_every_status(status: Status) -> None:
    comparison = compare_files(DATA / "base.jsonl", DATA / f"new_{status.name.lower()}.jsonl")
    assert comparison.status is status
    assert len(comparison.rows) >= 2 and min(found.status for found in comparison.rows) is Status.PASS


def test_exit_codes_are_distinct_and_not_those_of_a_crash() -> None:
    codes = {status.name: int(status) for status in Status}
    assert codes == {"PASS": 0, "CALIBRATION_NEEDED": 10, "RECIPE_MISMATCH": 11, "INFRA_ERROR": 12, "REGRESSION": 13}


# -- the rolling gate -------------------------------------------------------------------------------------------------

ROLLING = [
    ("equal", 100.0, 100.0, Status.PASS, ""),
    ("exactly 8 %", 100.0, 108.0, Status.PASS, ""),
    ("above 8 %", 100.0, 108.01, Status.REGRESSION, "slower by 8.01 us"),
    ("much in percent, little in time", 5.0, 5.9, Status.PASS, ""),
    ("exactly the floor", 5.0, 6.0, Status.PASS, ""),
    ("both", 5.0, 6.01, Status.REGRESSION, "slower by 1.01 us"),
    ("much in time, little in percent", 40_000.0, 42_000.0, Status.PASS, ""),
    ("faster", 100.0, 80.0, Status.PASS, "faster by 20.00 us"),
    ("faster within the noise", 100.0, 95.0, Status.PASS, ""),
]


@pytest.mark.parametrize(("name", "usual", "new", "status", "reason"), ROLLING, ids=[case[0] for case in ROLLING])
def test_slower_by_a_share_and_by_an_amount(
    record: Record, name: str, usual: float, new: float, status: Status, reason: str
) -> None:
    found = row(record, [usual] * 3, new)
    assert (found.status, found.reason) == (status, reason)
    assert found.verdict.delta_abs == pytest.approx(new - usual)
    assert found.verdict.delta_pct == pytest.approx(100 * (new - usual) / usual)


def test_the_baseline_is_the_median_of_the_last_five(record: Record) -> None:
    found = row(record, [1.0, 1.0, 100.0, 90.0, 500.0, 110.0, 105.0], 105.0)
    assert (found.baseline_us, found.baselines, found.status) == (105.0, 5, Status.PASS)
    assert row(record, [100.0, 104.0, 90.0, 500.0], 105.0).baseline_us == 102.0


def test_the_last_five_are_so_by_time_not_by_place(record: Record) -> None:
    days = [(9, 100.0), (8, 100.0), (1, 10.0), (7, 100.0), (2, 10.0), (6, 100.0), (5, 100.0)]
    base = [taking(record, median_us, day) for day, median_us in days]
    (found,) = compare(entries(base), entries([taking(record, 100.0, 28)]), NO_LIMITS)[0].rows
    assert found.baseline_us == 100.0


@pytest.mark.parametrize(("count", "status"), [(0, 10), (1, 10), (2, 10), (3, 0), (4, 0)])
def test_three_baselines_are_needed(record: Record, count: int, status: int) -> None:
    found = row(record, [100.0] * count, 101.0)
    assert found.status == status
    assert found.reason == ("" if status == 0 else f"{count} baselines, not 3")


def test_too_few_baselines_are_no_regression(record: Record) -> None:
    assert row(record, [100.0, 100.0], 300.0).status is Status.CALIBRATION_NEEDED


@pytest.mark.parametrize(
    ("usual", "new", "status"),
    [
        (10_000.0, 10_400.0, Status.PASS),  # 400 MB, but 4 %
        (1_000.0, 1_200.0, Status.PASS),  # 20 %, but 200 MB
        (1_000.0, 1_256.0, Status.PASS),  # exactly 256 MB
        (1_000.0, 1_257.0, Status.REGRESSION),
        (10_000.0, 10_501.0, Status.REGRESSION),
        (10_000.0, 1.0, Status.PASS),
        (None, 10_000.0, Status.PASS),
        (10_000.0, None, Status.PASS),
    ],
)
def test_memory(record: Record, usual: float | None, new: float | None, status: Status) -> None:
    base = [taking(record, 100.0, day, usual) for day in (1, 2, 3)]
    (found,) = compare(entries(base), entries([taking(record, 100.0, 28, new)]), NO_LIMITS)[0].rows
    assert found.status is status
    assert found.reason == (f"{new:.0f} MB instead of {usual:.0f}" if status else "")


# -- cohorts ----------------------------------------------------------------------------------------------------------


def other(record: Record, group: str, **values: object) -> Record:
    return replace(record, **{group: replace(getattr(record, group), **values)})


RECIPES = [
    ("software", {"torch": "2.12.0"}),
    ("software", {"triton": "3.9.0"}),
    ("software", {"cudnn": "92000"}),
    ("software", {"env_flags": {"cudnn_benchmark": "True"}}),
    ("hardware", {"driver": "101.0"}),
    ("workload", {"seed": 1}),
    ("workload", {"inside_timer": ("quantise", "kernel")}),
    ("timing", {"method": "graph"}),
    ("identity", {"config_hash": "other"}),
]


@pytest.mark.parametrize(("group", "values"), RECIPES)
def test_another_recipe_is_not_compared(record: Record, group: str, values: dict) -> None:
    base = [taking(record, 100.0, day) for day in (1, 2, 3)]
    (found,) = compare(entries(base), entries([other(taking(record, 500.0), group, **values)]), NO_LIMITS)[0].rows
    assert (found.status, found.reason) == (Status.RECIPE_MISMATCH, "3 baselines, all of another recipe")


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("identity", {"git_sha": "other", "dirty": True, "kernel_hash": "other", "timestamp": "2026-02-01"}),
        ("hardware", {"uuid_hash": "other", "host_cpu": "other", "mem_gb": 139.9}),
        ("software", {"flash_attn": "3.0", "diffusers": "0.99", "python": "3.13.0"}),
        ("timing", {"warmup": 3, "iters": 99, "host_us": 1.0}),
    ],
)
def test_what_a_cohort_does_not_depend_on(record: Record, group: str, values: dict) -> None:
    assert recipe(other(record, group, **values)) == recipe(record)
    assert hardware_profile(other(record, group, **values)) == hardware_profile(record)


@pytest.mark.parametrize(
    "values", [{"gpu_name": "Other GPU"}, {"sm_count": 114}, {"power_limit_w": 350.0}, {"mig": True}, {"ecc": False}]
)
def test_another_machine_has_no_baselines(record: Record, values: dict) -> None:
    base = [other(taking(record, 100.0, day), "hardware", **values) for day in (1, 2, 3)]
    (found,) = compare(entries(base), entries([taking(record, 500.0)]), NO_LIMITS)[0].rows
    assert (found.status, found.reason) == (Status.CALIBRATION_NEEDED, "0 baselines, not 3")


def test_old_recipes_do_not_hide_the_present_one(record: Record) -> None:
    old = [other(taking(record, 10.0, day), "software", torch="2.10.0") for day in (20, 21, 22)]
    base = old + [taking(record, 100.0, day) for day in (1, 2, 3)]
    (found,) = compare(entries(base), entries([taking(record, 101.0, 28)]), NO_LIMITS)[0].rows
    assert (found.status, found.baselines, found.baseline_us) == (Status.PASS, 3, 100.0)


def test_cold_and_warm_and_arms_are_told_apart(record: Record) -> None:
    new = taking(record, 100.0, 28)
    base = [other(taking(record, 10.0, day), "timing", l2="warm") for day in (1, 2, 3)]
    base += [other(taking(record, 10.0, day), "identity", arm="ours/cuda") for day in (1, 2, 3)]
    rows = compare(entries(base), entries([new]), NO_LIMITS)[0].rows
    assert {found.name: found.status for found in rows} == {
        f"{record.identity.case_id} cold": Status.CALIBRATION_NEEDED,
        f"{record.identity.case_id} warm": Status.INFRA_ERROR,
        f"{record.identity.case_id} ours/cuda cold": Status.INFRA_ERROR,
    }


# -- the static gate --------------------------------------------------------------------------------------------------


def limits(record: Record, **values: float) -> dict:
    return {record.hardware.gpu_name: {record.identity.case_id: Limit(**values)}}


def test_the_static_gate_alone(record: Record) -> None:
    worst = limits(record, median_us=120.0)
    assert row(record, [119.0] * 5, 120.0, worst).status is Status.PASS
    creeping = row(record, [119.0] * 5, 121.0, worst)  # within 8 % of its baselines
    assert (creeping.status, creeping.reason) == (Status.REGRESSION, "121.00 us are above the limit of 120")
    assert row(record, [], 121.0, worst).status is Status.REGRESSION  # no baseline is needed
    assert row(record, [], 119.0, worst).status is Status.CALIBRATION_NEEDED


def test_the_rolling_gate_alone(record: Record) -> None:
    found = row(record, [50.0] * 5, 100.0, limits(record, median_us=120.0))
    assert (found.status, found.reason) == (Status.REGRESSION, "slower by 50.00 us")


def test_the_static_gate_outranks_another_recipe(record: Record) -> None:
    base = [other(taking(record, 100.0, day), "software", torch="2.10.0") for day in (1, 2, 3)]
    worst = limits(record, median_us=120.0)
    (found,) = compare(entries(base), entries([taking(record, 121.0)]), worst)[0].rows
    assert found.status is Status.REGRESSION


def test_the_static_gate_on_memory(record: Record) -> None:
    worst = limits(record, peak_alloc_mb=3000.0)
    for memory_mb, status in ((3000.0, 10), (3001.0, 13), (None, 10)):
        (found,) = compare([], entries([taking(record, 1.0, 1, memory_mb)]), worst)[0].rows
        assert found.status == status


def test_limits_are_of_one_gpu_and_of_the_arm_that_users_get(record: Record) -> None:
    worst = limits(record, median_us=1.0)
    elsewhere = other(taking(record, 100.0), "hardware", gpu_name="Other GPU")
    alternative = other(taking(record, 100.0), "identity", arm="ours/cuda")
    rows = compare([], entries([elsewhere, alternative]), worst)[0].rows
    assert {found.status for found in rows} == {Status.CALIBRATION_NEEDED}


def test_the_limits_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text('{"Example GPU": {"norm_modulate 1.3B 4680": {"median_us": 5}}}')
    assert read_limits(path) == {"Example GPU": {"norm_modulate 1.3B 4680": Limit(median_us=5.0)}}
    assert compare_files(DATA / "base.jsonl", DATA / "new_pass.jsonl", path).status is Status.REGRESSION
    for text in ('{"Example GPU": {"case": {"median_ms": 5}}}', '{"Example GPU": 3}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(DataError, match="limits.json cannot be read"):
            read_limits(path)
        assert compare_files(DATA / "base.jsonl", DATA / "new_pass.jsonl", path).status is Status.INFRA_ERROR
    assert read_limits(LIMITS) is not None


# -- what cannot be judged --------------------------------------------------------------------------------------------


def test_invalid_baselines_do_not_count(record: Record) -> None:
    good = entries([taking(record, 100.0, day) for day in (1, 2, 3)])
    bad = [Entry("x:9", taking(record, 1.0, day), ("throttled",)) for day in (4, 5, 6, 7, 8)]
    unreadable = [Entry("x:10", None, ("not JSON",))]
    (found,) = compare(good + bad + unreadable, entries([taking(record, 100.0, 28)]), NO_LIMITS)[0].rows
    assert (found.status, found.baselines) == (Status.PASS, 3)


def test_an_invalid_new_record_is_an_infra_error_whatever_its_time(record: Record) -> None:
    bad = [Entry("x:1", taking(record, 1.0), ("throttled: sw_power_cap", "no accuracy"))]
    (found,) = compare([], bad, NO_LIMITS)[0].rows
    assert (found.status, found.reason) == (Status.INFRA_ERROR, "throttled: sw_power_cap; no accuracy")


def test_a_regression_outranks_a_throttled_case() -> None:
    new = read(DATA / "new_regression.jsonl") + [Entry("x:1", None, ("not JSON",))]
    assert compare(read(DATA / "base.jsonl"), new, NO_LIMITS)[0].status is Status.REGRESSION


def test_a_case_that_vanished_is_said(record: Record) -> None:
    new = read(DATA / "new_pass.jsonl")[:1]
    comparison, _ = compare(read(DATA / "base.jsonl"), new, NO_LIMITS)
    lost = comparison.rows[-1]
    assert (lost.name, lost.status) == ("norm_modulate 1.3B 4680 cold", Status.INFRA_ERROR)
    other_op = [replace(entry, record=other(entry.record, "workload", op="gelu")) for entry in new]
    assert len(compare(read(DATA / "base.jsonl"), other_op, NO_LIMITS)[0].rows) == 1  # that op was not run


def test_peers_are_not_judged(record: Record) -> None:
    peer = other(taking(record, 900.0), "identity", arm="eager")
    broken = Entry("x:2", peer, ("no accuracy",))
    base = entries([other(taking(record, 100.0, day), "identity", arm="eager") for day in (1, 2, 3)])
    comparison, judged = compare(base, [*entries([peer]), broken], NO_LIMITS)
    assert [found.reason for found in comparison.rows] == ["there is no new record of ours"]
    assert comparison.status is Status.INFRA_ERROR and judged == []


def test_accuracy_records_are_not_judged_but_must_pass(record: Record) -> None:
    proof = replace(other(record, "identity", kind="accuracy"), timing=None, stamps=None)
    new = entries([taking(record, 100.0), proof])
    assert len(compare([], new, NO_LIMITS)[0].rows) == 1
    failed = Entry("x:3", proof, ("rel-L2 is nan",))
    assert compare([], [*new, failed], NO_LIMITS)[0].status is Status.INFRA_ERROR


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for base, new in ((DATA / "base.jsonl", tmp_path / "none"), (tmp_path / "none", DATA / "new_pass.jsonl")):
        comparison = compare_files(base, new)
        assert comparison.status is Status.INFRA_ERROR and "cannot be read" in comparison.rows[0].reason
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not a record\n" + (DATA / "new_pass.jsonl").read_text())
    comparison = compare_files(DATA / "base.jsonl", broken)
    assert comparison.status is Status.INFRA_ERROR
    assert f"{broken}:1" in {found.name for found in comparison.rows}


def test_a_cut_off_new_file_is_judged_as_far_as_it_goes(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text((DATA / "new_pass.jsonl").read_text()[:-30])
    rows = compare_files(DATA / "base.jsonl", cut).rows
    assert [found.status for found in rows] == [Status.PASS, Status.INFRA_ERROR]
    assert rows[1].reason == "it has baselines but no new record"


# -- output and renewal -----------------------------------------------------------------------------------------------


def test_renewed_baselines_hold_the_judged_records(record: Record, tmp_path: Path) -> None:
    base = tmp_path / "base.jsonl"
    base.write_text("")
    for _ in range(3):
        assert compare_files(base, DATA / "new_pass.jsonl", renew=True).status is Status.CALIBRATION_NEEDED
    assert compare_files(base, DATA / "new_pass.jsonl", renew=True).status is Status.PASS
    assert compare_files(base, DATA / "new_infra_error.jsonl", renew=True).status is Status.INFRA_ERROR
    stored = [entry.record for entry in read(base)]
    assert len(stored) == 4 * 2 + 1
    statuses = [found.verdict.status for found in stored]
    assert statuses == ["CALIBRATION_NEEDED"] * 6 + ["PASS"] * 3
    assert stored[-1].verdict.baseline_id.endswith("/4") and stored[-1].verdict.delta_pct is not None


def test_the_table_and_the_json_say_the_same(tmp_path: Path) -> None:
    comparison = compare_files(DATA / "base.jsonl", DATA / "new_regression.jsonl")
    table = comparison.table().splitlines()
    assert table[-1] == "REGRESSION (exit code 13)"
    assert table[-2].startswith("REGRESSION") and "+20.0 %" in table[-2] and "slower by" in table[-2]
    found = json.loads(comparison.json())
    assert (found["status"], found["exit_code"]) == ("REGRESSION", 13)
    assert {each["name"]: each["status"] for each in found["rows"]} == {
        "norm_modulate 1.3B 32760 cold": "REGRESSION",
        "norm_modulate 1.3B 4680 cold": "PASS",
    }
