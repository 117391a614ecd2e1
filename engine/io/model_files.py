"""Reading and writing the parts of a model folder: JSON objects, safetensors headers, fingerprints.

Such folders come from strangers: whatever is in them ends in a value or in a CheckpointError.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from reelforge.engine.core.errors import CheckpointError


@contextmanager
def open_weights(file: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors reader; a damaged or hostile header is a CheckpointError."""
    try:
        with safe_open(file, framework="pt", device=device) as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no sound safetensors file ({error}).", "Download it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that says which file is missing or damaged."""
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        hint = "Give a model folder in diffusers' layout."
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).", hint) from error


def parse_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """A JSON object that was found in ``path``."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}).", "Download it again.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds a {type(table).__name__}, not an object.", "Download it again.")
    return table


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """One JSON object, readable by people."""
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint_folders(*folders: Path) -> str:
    """sha256 over names and contents of all files, 16 hex digits (1 to 2 GB/s).

    JSON counts by its values, without the bookkeeping keys (leading underscore) that diffusers fills with paths.
    """
    total = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()):
        if file.suffix == ".json":
            table = {name: value for name, value in read_json(file).items() if not name.startswith("_")}
            digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
        else:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")
        total.update(file.name.encode() + digest.digest())
    return total.hexdigest()[:16]
