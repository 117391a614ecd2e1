"""Run directories, metrics files and staged writes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from reelforge.engine.core.errors import ConfigError, StorageError
from reelforge.engine.core.files import replace_file, staged_folder
from reelforge.engine.core.metrics import JsonlLog, read_jsonl
from reelforge.engine.core.run_dir import RunDir


@dataclass(frozen=True)
class Config:
    steps: int = 1


def test_a_run_continues_under_the_same_config_only(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", Config())
    facts = json.loads((run.root / "run.json").read_text())
    assert {"config_hash", "git", "versions", "hardware"} <= facts.keys()
    RunDir.open(tmp_path / "run", Config())
    with pytest.raises(ConfigError, match="another config"):
        RunDir.open(tmp_path / "run", Config(2))


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/run cannot be made"):
        RunDir.open(tmp_path / "file" / "run", Config())


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", Config())
    (run.root / "run.json").write_text("")
    with pytest.raises(ConfigError, match="run.json is no run's header"):
        RunDir.open(tmp_path / "run", Config())


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.close()
    with Path("/dev/full").open("ab", buffering=0) as log._file, pytest.raises(StorageError, match="No space left"):
        log.write(step=1)


def test_every_torn_last_line_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3)]
    whole = "".join(lines)
    for cut in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_text(whole[:cut])
        with JsonlLog(path) as log:
            log.write(step=4)
        steps = [record["step"] for record in read_jsonl(path)]
        assert steps == ([1, 2, 3, 4] if cut == len(whole) - 1 else [1, 2, 4])


def test_a_resumed_log_has_no_doubled_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlLog(path) as log:
        for step in range(1, 6):
            log.write(step=step, run=1)
    with JsonlLog(path, from_step=3) as log:
        log.write(step=4, run=2)
    assert [(r["step"], r["run"]) for r in read_jsonl(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_staged_folder_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged_folder(target) as staging:
        (staging / "a").write_text("first")
    with pytest.raises(RuntimeError), staged_folder(target) as staging:
        (staging / "a").write_text("half")
        raise RuntimeError
    assert (target / "a").read_text() == "first"
    with staged_folder(target) as staging:
        (staging / "b").write_text("second")
    assert sorted(path.name for path in target.iterdir()) == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old/a").write_text("kept")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model/a").read_text() == "kept"


def test_replace_file_keeps_the_old_one_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, "old")

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        replace_file(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
