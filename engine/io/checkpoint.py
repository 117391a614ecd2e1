"""Checkpoints that survive being killed: safetensors shards and a manifest, committed by one rename.

A checkpoint ``step-%08d/`` holds groups of named tensors (``<group>-%05d.safetensors``) and ``manifest.json``: format
version, step, config hash, JSON state, and size and sha256 of every shard and of the manifest itself. It is written to
``.tmp-<step>-<pid>/``, every file fsynced, the manifest last, then the folder, then renamed, then the parent fsynced;
so a folder named ``step-*`` is complete unless the disk itself lied, and reading it checks that too.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from reelforge.engine.core.errors import CheckpointError, StorageError
from reelforge.engine.core.files import sync

FORMAT = 1
MANIFEST = "manifest.json"
_SHARD_BYTES = 1 << 30  # bounds the host copy made while saving
_HINT = "Delete this folder; the previous checkpoint is used instead, if there is one."
_STEP = re.compile(r"step-(\d{8,})")

Groups = Mapping[str, Mapping[str, Tensor]]
OnDamaged = Callable[[Path, CheckpointError], None]


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` returns.

    Attributes:
        step: finished steps.
        groups: named tensors by group, on the CPU.
        state: the JSON state given to :func:`save`.
    """

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path, step: int, groups: Groups, state: Mapping[str, Any], config_hash: str, keep_last: int = 2
) -> Path:
    """Commit a checkpoint, read it back, then purge all but the newest ``keep_last`` up to ``step``.

    A verified checkpoint of the same step is left as it is.

    Args:
        folder: the run's ``checkpoints/``; one writer at a time.
        groups: tensors by group and name, on any device; group names become file names.
        state: JSON values.
        config_hash: hash of the run's config; :func:`load` refuses another one.

    Raises:
        StorageError: the disk refused; earlier checkpoints are untouched and nothing partial is left.
    """
    assert keep_last >= 1
    target = folder / f"step-{step:08d}"
    partial = folder / f".tmp-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        if not _is_sound(target):
            partial.mkdir()
            _write_checkpoint(partial, step, groups, state, config_hash)
            _commit(partial, target)
        verify(target)
        _purge(folder, step, keep_last)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"Checkpoint {target} could not be written ({error.strerror}).",
            "Free space or repair the disk; earlier checkpoints are intact.",
        ) from error
    except CheckpointError as error:
        raise StorageError(f"Just written, but: {error.what}", "Check the disk; nothing was purged.") from error
    return target


def latest(folder: Path, on_damaged: OnDamaged) -> Path | None:
    """The newest checkpoint that verifies, or None.

    Args:
        on_damaged: told of every newer one that does not, with the reason.
    """
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step:08d}"
        try:
            verify(path)
        except CheckpointError as error:
            on_damaged(path, error)
        else:
            return path
    return None


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint and return its manifest.

    Raises:
        CheckpointError: a file is missing, extra, of another size or hash, or the manifest is not this folder's.
    """
    manifest = _read_manifest(path)
    with _reading(path):
        for name, facts in manifest["files"].items():
            with (path / name).open("rb") as file:
                _check_hash(path / name, hashlib.file_digest(file, "sha256").hexdigest(), facts)
    return manifest


def load(path: Path, config_hash: str | None = None) -> Checkpoint:
    """Read a checkpoint, checking every byte on the way.

    Args:
        config_hash: refuse a checkpoint of another config; None accepts any.

    Raises:
        CheckpointError: damaged, or written under another config.
    """
    manifest = _read_manifest(path)
    if config_hash is not None and manifest["config_hash"] != config_hash:
        raise CheckpointError(
            f"{path} was written under config {manifest['config_hash']}, not {config_hash}.",
            "Continue with the recipe it was started with, or choose another output folder.",
        )
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in manifest["groups"]}
    with _reading(path):
        for name, facts in manifest["files"].items():
            payload = (path / name).read_bytes()
            _check_hash(path / name, hashlib.sha256(payload).hexdigest(), facts)
            groups[facts["group"]].update(tensors_from_bytes(payload))
    return Checkpoint(manifest["step"], groups, manifest["state"])


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name))]


def _is_sound(path: Path) -> bool:
    try:
        return bool(verify(path))
    except CheckpointError:
        return False


# --- writing ---


def _write_checkpoint(partial: Path, step: int, groups: Groups, state: Mapping[str, Any], config_hash: str) -> None:
    files = {}
    for group, tensors in groups.items():
        for index, shard in enumerate(_shards(tensors)):
            name = f"{group}-{index:05d}.safetensors"
            payload = tensors_to_bytes({key: t.detach().cpu().contiguous() for key, t in shard.items()})
            files[name] = {
                "group": group,
                "bytes": len(payload),
                "sha256": hashlib.sha256(payload).hexdigest(),
            }
            _write(partial / name, payload)
    body = {
        "format": FORMAT,
        "step": step,
        "config_hash": config_hash,
        "groups": list(groups),
        "files": files,
        "state": dict(state),
    }
    _write(partial / MANIFEST, json.dumps({**body, "sha256": _body_hash(body)}, indent=1).encode())
    sync(partial)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, each shard at most ``_SHARD_BYTES`` unless one tensor alone is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write(path: Path, payload: bytes) -> None:
    with path.open("xb") as file:
        file.write(payload)
    sync(path)


def _commit(partial: Path, target: Path) -> None:
    if target.exists():  # damaged, else save() would have kept it
        _discard(target)
    os.rename(partial, target)
    sync(target.parent)


def _purge(folder: Path, step: int, keep_last: int) -> None:
    # Steps above `step` are damaged ones that a resume fell back from: they count for nothing here.
    for old in sorted(s for s in _steps(folder) if s <= step)[:-keep_last]:
        _discard(folder / f"step-{old:08d}")


def _discard(path: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its own name."""
    doomed = path.with_name(f".tmp-discarded-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.glob(".tmp-*"):
        shutil.rmtree(entry)


# --- reading ---


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a disk or a file's content can do wrong, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).", _HINT) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} holds a file that is not safetensors ({error}).", _HINT) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is not a manifest ({error!r}).", _HINT) from error


def _body_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, itself verified, whose files are exactly those of the folder, with the right sizes."""
    with _reading(path):
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        if manifest["sha256"] != _body_hash(body):
            raise CheckpointError(f"{path / MANIFEST} does not match its own sha256.", _HINT)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}.", f"This version reads {FORMAT}.")
        if path.name != f"step-{manifest['step']:08d}":
            raise CheckpointError(f"{path} holds the manifest of step {manifest['step']}.", _HINT)
        expected = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        found = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name != MANIFEST}
    if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
        raise CheckpointError(f"{path}: {wrong[0]} is missing, extra, or of another size.", _HINT)
    return manifest


def _check_hash(path: Path, digest: str, facts: Mapping[str, Any]) -> None:
    if digest != facts["sha256"]:
        raise CheckpointError(f"{path} does not match its sha256.", _HINT)
