"""metrics.jsonl: one JSON object a line, the source of truth for every curve."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reelforge.engine.core.errors import StorageError
from reelforge.engine.core.files import make_folder, replace_file


class JsonlLog:
    """Append-only JSON lines; a line torn by a crash is dropped on reopening.

    Args:
        path: the file; created with its folder.
        from_step: lines whose ``step`` is larger are cut, so that a resumed run leaves no doubled steps.
    """

    def __init__(self, path: Path, from_step: int | None = None) -> None:
        make_folder(path.parent)
        kept = [r for r in read_jsonl(path) if from_step is None or r.get("step", 0) <= from_step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if path.exists() and path.stat().st_size != len(text.encode()):
            replace_file(path, text)
        try:
            # Unbuffered: what the disk refuses is reported where it was written, and closing cannot fail.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}).", "Choose another folder.") from error

    def write(self, **record: Any) -> None:
        """Append one record.

        Raises:
            StorageError: the disk refused.
        """
        try:
            self._file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise StorageError(
                f"{self._file.name} cannot be written ({error.strerror}).", "Free some space."
            ) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The complete records of a file; a missing file is empty, a torn last line is skipped."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record


def training_time(path: Path) -> tuple[int, float]:
    """Steps of a run and the seconds they took, by its own log: steps times seconds a step, line by line."""
    last, seconds = 0, 0.0
    for line in read_jsonl(path):
        if "step_s" in line:
            seconds += line["step_s"] * (line["step"] - last)
            last = line["step"]
    return last, seconds


def last_metrics(path: Path) -> dict[str, Any]:
    """Every fact's latest value."""
    merged: dict[str, Any] = {}
    for line in read_jsonl(path):
        merged |= line
    return merged


def phase_facts(root: Path, phases: Iterable[str]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Seconds of training and latest metrics of a run's phases, each with a folder in ``root``."""
    logs = {name: root / name / "metrics.jsonl" for name in phases}
    seconds = {name: training_time(log)[1] for name, log in logs.items()}
    return seconds, {name: last_metrics(log) for name, log in logs.items()}
