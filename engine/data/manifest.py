"""Which clips there are and what they show: a folder with caption twins, or a CSV or JSONL manifest.

A manifest that cannot be understood stops the run; a clip with a fault is set aside with its reason and the rest
go on. Nothing is opened here but the manifest and the captions.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelforge.engine.core.errors import DataError

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".gif"))
_SCORE_PREFIX = "score_"


@dataclass(frozen=True)
class Sample:
    """One clip.

    Attributes:
        id: unique; the path without its suffix unless the manifest says otherwise.
        path: the video file.
        captions: alternatives, at least one.
        scores: what other tools measured, by name; finite.
        split: e.g. ``train``; free text, as are the next two.
        source: where the clip comes from.
        licence: under which terms.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    split: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Reject:
    """A clip set aside: ``reason`` is one of few words that are counted, ``detail`` a sentence."""

    id: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Manifest:
    """Usable clips in a stable order, and those set aside."""

    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...]


def read_manifest(path: Path) -> Manifest:
    """Read a folder, a ``.csv`` or a ``.jsonl``.

    Folder: every video below it, its captions in ``<name>.txt``, one per line. CSV: columns ``path`` and ``caption``;
    JSONL: keys ``path`` and ``caption`` or ``captions``. Optional: ``id``, ``split``, ``source``, ``licence``, and
    scores (CSV columns ``score_<name>``, JSONL object ``scores``). Others are ignored. Paths are relative to the
    manifest.

    Raises:
        DataError: no such manifest, unreadable, a required column missing, or no clip in it.
    """
    if path.is_dir():
        rows = _folder_rows(path)
    elif not path.is_file():
        raise DataError(f"Data {path} does not exist.", "Give a folder of clips, or a .csv or .jsonl manifest.")
    elif path.suffix.lower() == ".csv":
        rows = _csv_rows(path)
    elif path.suffix.lower() == ".jsonl":
        rows = _jsonl_rows(path)
    else:
        raise DataError(f"Data {path} is neither a folder nor .csv nor .jsonl.", "Convert the manifest.")
    base = path if path.is_dir() else path.parent
    return _check(rows, base, path)


def _check(rows: Iterator[tuple[str, dict[str, Any]]], base: Path, origin: Path) -> Manifest:
    samples: dict[str, Sample] = {}
    rejects = []
    for where, row in rows:
        name = row.get("path")
        if not isinstance(name, str) or not name.strip("./\\ "):
            raise DataError(f"{origin} {where} has no path.", "Name the video file in 'path'.")
        sample_id = str(row.get("id") or Path(name).with_suffix("").as_posix())
        fault = _fault(row, base / name)
        if fault is None and sample_id in samples:
            fault = "duplicate_id", f"id {sample_id!r} is already that of {samples[sample_id].path}"
        if fault is None:
            samples[sample_id] = _sample(row, sample_id, base / name)
        else:
            rejects.append(Reject(sample_id, name, fault[0], f"{where}: {fault[1]}."))
    if not samples and not rejects:
        raise DataError(f"{origin} holds no clip.", f"Add videos ({', '.join(sorted(VIDEO_SUFFIXES))}).")
    return Manifest(tuple(samples.values()), tuple(rejects))


def _fault(row: Mapping[str, Any], path: Path) -> tuple[str, str] | None:
    """(reason, detail) of what is wrong with a row, or None."""
    if not os.path.isfile(path):  # unlike Path.is_file, False also for a name too long to exist
        return "missing_file", f"there is no file {path}"
    if not row["captions"]:
        return "missing_caption", "the caption is missing or empty"
    for name, score in row["scores"].items():
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            return "bad_score", f"score {name!r} is {score!r}, not a finite number"
    return None


def _sample(row: Mapping[str, Any], sample_id: str, path: Path) -> Sample:
    scores = {name: float(score) for name, score in row["scores"].items()}
    texts = {name: str(row.get(name) or "") for name in ("split", "source", "licence")}
    return Sample(sample_id, path, row["captions"], scores, **texts)


def _captions(texts: Any) -> tuple[str, ...]:
    """Non-empty strings, stripped; anything else counts as no caption."""
    if not isinstance(texts, list):
        return ()
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


# --- the three forms: each yields (where, row) with `path`, `captions` and `scores` filled ---


def _folder_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        twin = path.with_suffix(".txt")
        with _reading(twin):
            lines = twin.read_text(encoding="utf-8", errors="replace").splitlines() if twin.is_file() else []
        name = path.relative_to(folder).as_posix()
        yield name, {"path": name, "captions": _captions(lines), "scores": {}}


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        missing = {"path", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path} has no column {min(missing)!r}.", "It needs 'path' and 'caption'.")
        for row in reader:
            scores = {
                name.removeprefix(_SCORE_PREFIX): _number(text)
                for name, text in row.items()
                if name.startswith(_SCORE_PREFIX) and text
            }
            yield (
                f"line {reader.line_num}",
                {**row, "captions": _captions([row["caption"]]), "scores": scores},
            )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("scores", {}), dict):
                raise DataError(f"{path} line {number} is not an object with an object of scores.", "Fix that line.")
            if not {"caption", "captions"} & set(row):
                raise DataError(f"{path} line {number} has no key 'caption'.", "Add 'caption' or 'captions'.")
            captions = _captions(row["captions"] if "captions" in row else [row["caption"]])
            yield f"line {number}", {**row, "captions": captions, "scores": row.get("scores", {})}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}).", "Fix that line; the file is UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check its permissions.") from error
