"""Append-only tensor store: safetensors shards, each with a JSON page of the index.

``shard-00007.safetensors`` holds tensors; ``shard-00007.json`` its size, sha256 and rows, and is what commits it: both
are written to a temporary name, fsynced and renamed, the page last. A shard without a page does not exist and is
written again; so a killed writer loses at most the shard it was filling. A row may be replaced: the latest page wins.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from reelforge.engine.core.errors import DataError, StorageError
from reelforge.engine.core.files import make_folder, replace_file

FORMAT = 1
HEADER = "header.json"
_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 1024  # bounds what a kill can lose when rows are small


@dataclass(frozen=True)
class Row:
    """One entry of the index.

    Attributes:
        shard: file name of the shard that holds its tensors.
        facts: the JSON object stored with them.
        tensors: names of its tensors.
    """

    shard: str
    facts: dict[str, Any]
    tensors: tuple[str, ...]


class ShardReader:
    """Random access by key through memory maps.

    Args:
        folder: written by :class:`ShardWriter`.

    Raises:
        DataError: not such a folder, of another format, or a shard is missing or of another size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = _read_json(folder / HEADER)
        if self.header.get("format") != FORMAT:
            raise DataError(f"{folder} has format {self.header.get('format')}, not {FORMAT}.", "Build it again.")
        self.rows: dict[str, Row] = {}
        self._pages: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Any] = {}
        for page in sorted(folder.glob("shard-*.json")):
            self._load_page(page)

    def _load_page(self, path: Path) -> None:
        page, shard = _read_page(path), path.with_suffix(".safetensors")
        self._pages[shard.name] = page
        for row in page["rows"]:
            self.rows[row["key"]] = Row(shard.name, row["facts"], tuple(row["tensors"]))

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of one row by name, on the CPU."""
        row = self.rows[key]
        if row.shard not in self._open:
            try:
                self._open[row.shard] = safe_open(self.folder / row.shard, "pt")
            except SafetensorError as error:
                raise _damaged(self.folder / row.shard) from error
        return {name: self._open[row.shard].get_tensor(f"{key}#{name}") for name in row.tensors}

    def verify(self) -> None:
        """Read every shard and compare its sha256.

        Raises:
            DataError: one differs.
        """
        for name, page in self._pages.items():
            _check_hash(self.folder / name, page)


class ShardWriter:
    """Appends rows to a folder, a shard at a time. One writer per folder.

    Leftovers of a killed writer and damaged shards are removed on opening, so their rows can be written again.

    Args:
        folder: created if missing.
        header: what the contents depend on; a folder with another header is refused.
        shard_bytes: a shard is committed when its tensors reach this size, or it holds 1024 rows.

    Raises:
        DataError: the folder was written under another header; names the first difference.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], shard_bytes: int = _SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        header = {"format": FORMAT, **header}
        make_folder(folder)
        if (folder / HEADER).exists():
            _check_header(folder, header)
        else:
            replace_file(folder / HEADER, json.dumps(header, indent=1).encode())
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink()
        _remove_damaged(folder)
        self.rows = ShardReader(folder).rows
        pages = [int(page.stem.removeprefix("shard-")) for page in folder.glob("shard-*.json")]
        self._number = max(pages, default=-1) + 1
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Append a row; it is safe on disk after the next :meth:`commit`."""
        tensors = tensors or {}
        self._tensors |= {f"{key}#{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._rows.append({"key": key, "facts": dict(facts), "tensors": list(tensors)})
        self.rows[key] = Row(f"shard-{self._number:05d}.safetensors", dict(facts), tuple(tensors))
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if size >= self.shard_bytes or len(self._rows) >= _SHARD_ROWS:
            self.commit()

    def commit(self) -> None:
        """Write what was added since the last commit.

        Raises:
            StorageError: the disk refused; committed shards are untouched.
        """
        if not self._rows:
            return
        path = self.folder / f"shard-{self._number:05d}.safetensors"
        payload = tensors_to_bytes(self._tensors)
        page = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest(), "rows": self._rows}
        replace_file(path, payload)
        replace_file(path.with_suffix(".json"), json.dumps(page, ensure_ascii=False).encode())
        self._number += 1
        self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None or not issubclass(kind, StorageError):  # interrupted: what was added is whole
            self.commit()


def _damaged(shard: Path) -> DataError:
    hint = "Run the stage that wrote it again: it makes this shard anew, and no other."
    return DataError(f"{shard} is damaged or missing.", hint)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        hint = "Run the stage that writes this folder; if it stops here too, delete the folder first."
        raise DataError(f"{path} is missing or damaged.", hint) from error


def _check_header(folder: Path, header: Mapping[str, Any]) -> None:
    known = _read_json(folder / HEADER)
    for name in sorted(known.keys() | header.keys()):
        if known.get(name) != header.get(name):
            raise DataError(
                f"{folder} was built with {name} = {known.get(name)!r}, not {header.get(name)!r}.",
                "Choose another folder, or delete this one to build it again.",
            )


def _remove_damaged(folder: Path) -> None:
    """Delete uncommitted shards, and committed ones whose bytes are not what their page says."""
    for shard in folder.glob("shard-*.safetensors"):
        if not shard.with_suffix(".json").exists():
            shard.unlink()
    for path in folder.glob("shard-*.json"):
        if not _is_sound(path):
            path.unlink()
            path.with_suffix(".safetensors").unlink(missing_ok=True)


def _read_page(path: Path) -> dict[str, Any]:
    """A page whose shard is there, with the size it tells."""
    page, shard = _read_json(path), path.with_suffix(".safetensors")
    complete = isinstance(page, dict) and {"bytes", "sha256", "rows"} <= page.keys()
    if not complete or not shard.is_file() or shard.stat().st_size != page["bytes"]:
        raise _damaged(shard)
    return page


def _check_hash(shard: Path, page: Mapping[str, Any]) -> None:
    with shard.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != page["sha256"]:
            raise _damaged(shard)


def _is_sound(page: Path) -> bool:
    try:
        _check_hash(page.with_suffix(".safetensors"), _read_page(page))
    except DataError:
        return False
    return True
