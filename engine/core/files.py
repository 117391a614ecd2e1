"""Files and folders that appear whole or not at all: written aside, fsynced, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from reelforge.engine.core.errors import StorageError

_HINT = "Free space or choose another folder."


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, payload: bytes | str) -> None:
    """Write a file, text as UTF-8; a reader sees the old one or the new one, a crash leaves either.

    Raises:
        StorageError: the disk refused; the old file is untouched.
    """
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        partial.write_bytes(payload.encode() if isinstance(payload, str) else payload)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error.strerror}).", _HINT) from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        StorageError: something is in the way, or the disk refused.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Folder {path} cannot be made ({error.strerror}).", "Choose another one.") from error
    return path


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place when the block ends without an error.

    Raises:
        StorageError: the disk refused; the old folder is untouched.
    """
    staging, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    try:
        if replaced.exists() and not folder.exists():  # a crash came between the two renames below
            replaced.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        staging.rename(folder)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise StorageError(f"{folder} cannot be written ({error}).", _HINT) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
