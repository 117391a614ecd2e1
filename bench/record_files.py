"""Files of records: a line is on the disk when it is written, and a file that was cut off still reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from reelforge.bench.records import Record, parse, validate
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.files import sync
from reelforge.engine.core.metrics import JsonlLog
from reelforge.engine.core.progress import say


class RecordLog:
    """Appends records; each is on the disk when :meth:`append` returns. A line torn by a crash is cut off first."""

    def __init__(self, path: Path) -> None:
        self._path, self._log = path, JsonlLog(path)

    def append(self, record: Record) -> None:
        """Add one line.

        Raises:
            StorageError: the disk refused.
        """
        self._log.write(**record.table())
        sync(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


@dataclass(frozen=True)
class Entry:
    """One line of a file of records.

    Attributes:
        origin: ``file:line``.
        record: None where the line is none.
        reasons: why it must not be used; empty when valid.
        torn: it is not even JSON.
    """

    origin: str
    record: Record | None
    reasons: tuple[str, ...]
    torn: bool = False


def read(path: Path) -> list[Entry]:
    """The lines of a file. A last line that was cut off is skipped, and said.

    Raises:
        DataError: there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"Records {path} cannot be read ({error.strerror}).", "Check the path.") from error
    entries = [_entry(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    if entries and entries[-1].torn:
        say(f"{entries[-1].origin} was cut off; it is skipped.")
        return entries[:-1]
    return entries


def _entry(origin: str, line: str) -> Entry:
    try:
        table = json.loads(line)
    except json.JSONDecodeError as error:
        return Entry(origin, None, (f"not JSON ({error})",), torn=True)
    parsed = parse(table)
    if isinstance(parsed, list):
        return Entry(origin, None, tuple(parsed))
    return Entry(origin, parsed, tuple(validate(parsed)))
