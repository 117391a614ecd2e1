"""Checkpoints: round trip, damage of every kind, full disks, purge."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.core.errors import CheckpointError, StorageError
from reelforge.engine.io import checkpoint


def groups_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"a.weight": torch.full((7, 5), float(step)), "a.bias": torch.arange(5.0) + step}
    return {"weights": weights, "adam": {"step/a.bias": torch.tensor(float(step))}, "empty": {}}


def save(folder: Path, step: int, keep_last: int = 10) -> Path:
    return checkpoint.save(folder, step, groups_of(step), {"note": step}, "cafe", keep_last)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    named: list[str] = []
    return checkpoint.latest(folder, lambda path, error: named.append(f"{path.name}: {error.what}")), named


def test_round_trip_keeps_bits_groups_and_state(tmp_path):
    groups = groups_of(3)
    groups["weights"]["half"] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups["weights"]["view"] = torch.arange(12.0).view(3, 4).T
    path = checkpoint.save(tmp_path, 3, groups, {"note": [1, "x", None]}, "cafe")
    loaded = checkpoint.load(path, "cafe")
    assert path.name == "step-00000003" and loaded.step == 3 and loaded.state == {"note": [1, "x", None]}
    assert loaded.groups.keys() == groups.keys()
    for name, tensors in groups.items():
        assert loaded.groups[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded.groups[name][key].dtype == tensor.dtype
            assert torch.equal(loaded.groups[name][key], tensor)


def test_shards_are_bounded_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(40)}
    path = checkpoint.save(tmp_path, 1, {"weights": tensors}, {}, "cafe")
    shards = json.loads((path / "manifest.json").read_text())["files"]
    assert len(shards) > 10
    loaded = checkpoint.load(path).groups["weights"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_another_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cafe, not beef"):
        checkpoint.load(save(tmp_path, 1), "beef")


def test_purge_keeps_the_newest_and_ignores_damaged_future_steps(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    assert newest(tmp_path)[0] == tmp_path / "step-00000002"
    # A stop between 2 and 3 must not be purged in favour of the damaged 3, and 3 is replaced when it comes again.
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000009")
    save(tmp_path, 4, keep_last=1)
    assert newest(tmp_path)[0] == tmp_path / "step-00000004"
    save(tmp_path, 9, keep_last=1)
    assert newest(tmp_path) == (tmp_path / "step-00000009", [])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000009"]


def test_a_sound_checkpoint_of_the_same_step_stays(tmp_path):
    before = (save(tmp_path, 1) / "manifest.json").stat().st_mtime_ns
    assert (save(tmp_path, 1) / "manifest.json").stat().st_mtime_ns == before


def test_missing_folder_is_no_checkpoint(tmp_path):
    assert newest(tmp_path / "absent") == (None, [])


DAMAGE = ("truncate", "flip", "swap", "stale", "extra", "missing", "empty_manifest", "no_manifest", "rename")


def damage(kind: str, path: Path, older: Path, at: float) -> None:
    files = sorted(path.iterdir())
    victim = files[int(at * len(files))]
    data = victim.read_bytes()
    place = int(at * 1e6) % len(data)
    if kind == "truncate":
        victim.write_bytes(data[:place])
    elif kind == "flip":
        victim.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
    elif kind == "swap":
        shards = [f for f in files if f.suffix == ".safetensors"]
        a, b = (f.read_bytes() for f in shards)
        shards[0].write_bytes(b)
        shards[1].write_bytes(a)
    elif kind == "stale":
        shutil.copy(older / "manifest.json", path / "manifest.json")
    elif kind == "extra":
        (path / "weights-00009.safetensors").write_bytes(data)
    elif kind == "missing":
        victim.unlink()
    elif kind == "empty_manifest":
        (path / "manifest.json").write_text(["", "[]", "null", "{", '{"sha256": 1}'][int(at * 5)])
    elif kind == "no_manifest":
        (path / "manifest.json").unlink()
    else:
        shutil.rmtree(path)
        shutil.copytree(older, path)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1)
    save(folder, 2)
    return folder


@given(kind=st.sampled_from(DAMAGE), at=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damage_is_detected_named_and_stepped_over(two_steps, kind, at):
    folder = two_steps.with_name("damaged")
    shutil.copytree(two_steps, folder)
    older, path = folder / "step-00000001", folder / "step-00000002"
    damage(kind, path, older, at)
    found, named = newest(folder)
    assert found == older, f"{kind} at {at} went unseen"
    assert len(named) == 1 and "step-00000002" in named[0]
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    shutil.rmtree(folder)


def test_every_single_bit_of_a_manifest_counts(tmp_path):
    path = save(tmp_path, 1)
    good = (path / "manifest.json").read_bytes()
    facts = json.loads(good)
    for place in range(len(good)):
        (path / "manifest.json").write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        try:
            seen = checkpoint.verify(path)
        except CheckpointError:
            continue
        assert seen == facts, f"a flipped bit at byte {place} changed the manifest unseen"


def test_full_disk_leaves_earlier_checkpoints_and_nothing_partial(tmp_path):
    save(tmp_path, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(StorageError, match="step-00000002 could not be written"):
            checkpoint.save(tmp_path, 2, {"weights": {"big": torch.zeros(100_000)}}, {}, "cafe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path) == (tmp_path / "step-00000001", [])
    assert save(tmp_path, 2).is_dir()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(("call", "count"), [*(("fsync", i) for i in range(4)), ("rename", 0)])
def test_a_failing_call_at_any_point_is_a_storage_error(tmp_path, monkeypatch, call, count, code):
    save(tmp_path, 1)
    real, calls = getattr(os, call), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == count + 1:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StorageError, match="earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    loaded = checkpoint.load(tmp_path / "step-00000001")
    assert torch.equal(loaded.groups["weights"]["a.bias"], torch.arange(5.0) + 1)


def test_an_unreadable_shard_is_stepped_over(tmp_path, monkeypatch):
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    real = Path.open

    def failing(self, *arguments, **names):
        if self.parent == path and self.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, *arguments, **names)

    monkeypatch.setattr(Path, "open", failing)
    found, named = newest(tmp_path)
    assert found == older and "Input/output error" in named[0]


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError):
        save(tmp_path / "checkpoints", 1)
