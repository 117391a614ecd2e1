"""The shard store under kills, truncation and bit flips, against a plain dictionary."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reelforge.engine.core import files
from reelforge.engine.core.errors import DataError, StorageError
from reelforge.engine.io.shards import ShardReader, ShardWriter

HEADER = {"codec": "abc", "precision": "float32"}


def tensor_of(key: str) -> Tensor:
    return torch.arange(64, dtype=torch.float32) + len(key) * 1000 + sum(map(ord, key))


def fill(folder: Path, keys: list[str], shard_bytes: int = 600) -> None:
    """Two 256-byte rows and a third make a shard of ``shard_bytes``; rows already there are skipped."""
    with ShardWriter(folder, HEADER, shard_bytes) as writer:
        for key in keys:
            if key not in writer.rows:
                writer.add(key, {"name": key}, {"x": tensor_of(key)})


def check(folder: Path, keys: list[str]) -> None:
    reader = ShardReader(folder)
    reader.verify()
    assert set(reader.rows) == set(keys)
    for key in keys:
        assert reader.rows[key].facts == {"name": key}
        assert torch.equal(reader.tensors(key)["x"], tensor_of(key))


KEYS = [f"clip {n} ü#/видео" for n in range(10)]


def test_round_trip_in_several_shards(tmp_path: Path) -> None:
    fill(tmp_path, KEYS)
    check(tmp_path, KEYS)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_dtypes_shapes_and_rows_without_tensors(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(2, 3).bfloat16(), "scalar": torch.tensor(3), "none": torch.zeros(0, 4)}
    with ShardWriter(tmp_path, HEADER) as writer:
        writer.add("a", {"fault": None})
    with ShardWriter(tmp_path, HEADER) as writer:
        writer.add("b", {}, tensors)
    reader = ShardReader(tmp_path)
    assert reader.tensors("a") == {} and reader.rows["a"].facts == {"fault": None}
    for name, tensor in tensors.items():
        back = reader.tensors("b")[name]
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_the_latest_row_wins(tmp_path: Path) -> None:
    for value in range(3):
        with ShardWriter(tmp_path, HEADER) as writer:
            writer.add("a", {"value": value}, {"x": torch.full((2,), float(value))})
    reader = ShardReader(tmp_path)
    assert reader.rows["a"].facts == {"value": 2} and reader.tensors("a")["x"].tolist() == [2.0, 2.0]


def test_another_header_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, KEYS)
    with pytest.raises(DataError, match="codec = 'abc', not 'xyz'"):
        ShardWriter(tmp_path, HEADER | {"codec": "xyz"})
    check(tmp_path, KEYS)


def test_an_unknown_format_or_no_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="header.json"):
        ShardReader(tmp_path)
    (tmp_path / "header.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        ShardReader(tmp_path)


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("moment", range(30))
def test_killed_at_any_system_call_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die before the n-th fsync or rename; committed shards stay, a second run completes."""
    calls = 0

    def dying(function: object) -> object:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(files.os, name, dying(getattr(files.os, name)))
        try:
            fill(tmp_path, KEYS)
        except Killed:
            committed = list(tmp_path.glob("shard-*.json"))
            if (tmp_path / "header.json").exists():
                assert len(ShardReader(tmp_path).rows) == 3 * len(committed) - 2 * (len(committed) == 4)
        else:
            assert moment >= 27  # header and four shards of two files, three calls each
    fill(tmp_path, KEYS)
    check(tmp_path, KEYS)
    assert not list(tmp_path.glob(".tmp-*"))


def test_resume_keeps_committed_shards(tmp_path: Path) -> None:
    fill(tmp_path, KEYS[:6])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    fill(tmp_path, KEYS)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}.items()
    check(tmp_path, KEYS)


def test_an_interruption_loses_nothing_that_was_added(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, HEADER) as writer:
        writer.add(KEYS[0], {"name": KEYS[0]}, {"x": tensor_of(KEYS[0])})
        raise KeyboardInterrupt
    check(tmp_path, KEYS[:1])


def test_disk_full_leaves_the_store_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, KEYS[:6])

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        with pytest.raises(StorageError, match="No space left"):
            fill(tmp_path, KEYS)
    check(tmp_path, KEYS[:6])


@pytest.mark.parametrize("victim", ["shard-00001.safetensors", "shard-00001.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files(tmp_path: Path, victim: str, share: float) -> None:
    fill(tmp_path, KEYS)
    payload = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(payload[: int(share * len(payload))])
    with pytest.raises(DataError, match="shard-00001"):
        ShardReader(tmp_path)
    with ShardWriter(tmp_path, HEADER) as writer:
        assert set(KEYS) - set(writer.rows) == set(KEYS[3:6])
    fill(tmp_path, KEYS)
    check(tmp_path, KEYS)


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found(place: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, KEYS)
        shard = folder / "shard-00002.safetensors"
        payload = bytearray(shard.read_bytes())
        payload[int(place * len(payload))] ^= 1 << bit
        shard.write_bytes(payload)
        with pytest.raises(DataError, match="shard-00002"):
            ShardReader(folder).verify()
        fill(folder, KEYS)
        check(folder, KEYS)


def test_a_damaged_shard_header_is_a_data_error(tmp_path: Path) -> None:
    fill(tmp_path, KEYS)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(DataError, match="shard-00000"):
        ShardReader(tmp_path).tensors(KEYS[0])
