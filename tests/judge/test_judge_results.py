"""results.json: round trip, strict reading, appended columns, scores from clips."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.bench.judge import results as record
from reelforge.bench.judge.bootstrap import Interval, mean_interval
from reelforge.bench.judge.gsb import Gsb, Verifier
from reelforge.bench.judge.results import Calibration, Results, Score, StageResult
from reelforge.engine.core.errors import DataError, StorageError

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**6)
names = st.text(min_size=1, max_size=8)
scalars = st.none() | st.booleans() | counts | numbers | names
tables = st.dictionaries(names, scalars | st.dictionaries(names, scalars, max_size=2), max_size=3)
intervals = st.builds(Interval, numbers, numbers, numbers)
score_tables = st.dictionaries(
    names,
    st.builds(
        Score, numbers, numbers, numbers, st.booleans(), names, st.sampled_from(("higher", "lower")), counts,
        st.none() | intervals,
    ),
    max_size=3,
)  # fmt: skip
votes = st.builds(
    Gsb, names, counts, counts, counts, *[numbers] * 8, st.lists(names, max_size=3).map(tuple), counts
)  # fmt: skip
stages = st.builds(
    StageResult, names, counts, numbers, st.none() | numbers, st.none() | counts,
    st.lists(votes, max_size=2).map(tuple), names, score_tables,
)  # fmt: skip
rows = st.builds(Calibration, names, score_tables, names)
whole = st.builds(
    Results, st.lists(stages, min_size=1, max_size=3).map(tuple), counts, counts, counts, st.none() | rows,
    st.lists(rows, max_size=2).map(tuple), st.none() | votes, names, st.dictionaries(names, names, max_size=2), tables,
    tables,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(whole)
def test_round_trip(results: Results) -> None:
    text = record.to_json(results)
    back = record.from_json(text)
    assert back == results
    assert record.to_json(back) == text


def small() -> Results:
    score = Score(1.5, 1.0, 2.0, False, "%", "lower")
    stages = tuple(StageResult(name, 20, 0.4, scores={"haze": score}) for name in ("base", "sft"))
    return Results(stages, seed=3, prompts=18, clips=216, truth=Calibration("truth", {"haze": score}))


def test_keys_keep_the_order_of_the_schema() -> None:
    table = json.loads(record.to_json(small()))
    assert list(table)[:4] == ["stages", "seed", "prompts", "clips"]
    assert list(table["stages"][0]["scores"]["haze"])[:6] == ["mean", "low", "high", "target", "unit", "better"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["stages"][1].update(nef=4), r"results.json: Unknown key 'stages\[1\].nef'. Did you mean 'nfe'"),
        (lambda t: t["stages"][0].pop("nfe"), r"'stages\[0\].nfe' is missing"),
        (lambda t: t.pop("seed"), "'seed' is missing"),
        (lambda t: t["truth"]["scores"]["haze"].update(better="lowr"), "scores.haze.better.*Did you mean 'lower'"),
        (lambda t: t["truth"]["scores"].update(haze=3), "'truth.scores.haze' is 3. It is a table"),
        (lambda t: t["stages"][0]["scores"]["haze"].update(mean="1"), "scores.haze.mean.*must be float"),
        (lambda t: t["truth"].update(scores=3), "'truth.scores' is 3. It must be a table"),
        (lambda t: t.update(stages=[4]), r"stages\[0\].* is 4"),
    ],
)
def test_reading_is_strict(change, message: str) -> None:
    table = json.loads(record.to_json(small()))
    change(table)
    with pytest.raises(DataError, match=message):
        record.from_json(json.dumps(table))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"'])
def test_what_is_no_results_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        record.from_json(text)


def test_a_file_is_read_back_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record.write(small(), path)
    assert record.read(path) == small()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_unwritable_and_unreadable_paths_say_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        record.write(small(), tmp_path / "missing" / "results.json")
    with pytest.raises(DataError, match="cannot be read"):
        record.read(tmp_path / "results.json")


def test_clip_scores_carry_direction_missing_and_the_paired_change() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(20), 5)
    base = {"haze": rng.normal(2, 1, 100), "reward": rng.normal(0, 1, 100)}
    stage = {"haze": base["haze"] - 0.5, "reward": base["reward"].copy()}
    stage["reward"][:7] = np.nan
    verifiers = [Verifier("haze", "lower", False, "%"), Verifier("reward", "higher", True)]
    found = record.score_clips(stage, prompts, verifiers, seed=4, reference=base)
    assert list(found) == ["haze", "reward"]
    haze, reward = found["haze"], found["reward"]
    expected = mean_interval(stage["haze"], prompts, seed=4)
    assert (haze.mean, haze.low, haze.high) == (expected.mean, expected.low, expected.high)
    assert (haze.unit, haze.better, haze.target, haze.missing) == ("%", "lower", False, 0)
    assert haze.change is not None and haze.change.low == pytest.approx(haze.change.high) == pytest.approx(-0.5)
    assert (reward.target, reward.missing) == (True, 7)


def test_set_scores_resample_prompts_and_pair_the_change() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(40), 3)
    features = rng.normal(size=120)
    found = record.score_set(
        lambda clips: float(features[clips].mean()), prompts, Verifier("mean", "lower", False), seed=0,
        reference=lambda clips: float(features[clips].mean() + 1),
    )  # fmt: skip
    direct = mean_interval(features, prompts, seed=0)
    width = direct.high - direct.low
    assert found.mean == pytest.approx(direct.mean)
    assert [found.low, found.high] == pytest.approx([direct.low, direct.high], abs=0.15 * width)
    assert found.change is not None
    assert [found.change.mean, found.change.low, found.change.high] == pytest.approx([-1, -1, -1])
