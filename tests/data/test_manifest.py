"""Folders, CSV and JSONL: what is accepted, what is set aside, what stops."""

import json
from pathlib import Path

import pytest

from reelforge.engine.core.errors import DataError
from reelforge.engine.data.manifest import read_manifest


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def reasons(path: Path) -> dict[str, str]:
    return {reject.id: reject.reason for reject in read_manifest(path).rejects}


def test_folder_with_caption_twins(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MOV", "deep/видео 1.webm", "notes.txt", ".hidden/c.mp4", ".tmp-1-d.mp4", "image.png")
    (tmp_path / "b.txt").write_text("a cat\n\n  a cat sits on a wall \n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("caffè\r\nlong caffè\r\n".encode())
    (tmp_path / "deep/видео 1.txt").write_text("夜\n", encoding="utf-8")
    manifest = read_manifest(tmp_path)
    assert [(s.id, s.captions) for s in manifest.samples] == [
        ("a", ("caffè", "long caffè")),
        ("b", ("a cat", "a cat sits on a wall")),
        ("deep/видео 1", ("夜",)),
    ]
    assert all(sample.path.is_file() for sample in manifest.samples) and not manifest.rejects


def test_folder_faults(tmp_path: Path) -> None:
    touch(tmp_path, "a.mkv", "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_text("two files share this twin")
    (tmp_path / "c.txt").write_text(" \n\n")
    manifest = read_manifest(tmp_path)
    assert [sample.path.name for sample in manifest.samples] == ["a.mkv"]
    assert reasons(tmp_path) == {"a": "duplicate_id", "b": "missing_caption", "c": "missing_caption"}
    assert "a.mp4" in manifest.rejects[0].detail and "a.mkv" in manifest.rejects[0].detail


def test_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4")
    table = tmp_path / "list.csv"
    table.write_text(
        "\ufeffpath,caption,score_aesthetic,split,licence,width\n"
        'a b.mp4,"a cat, asleep",5.5,train,CC0,10\n'
        f"{tmp_path / 'c.mp4'},absolute path,,val\n"
        "d.mp4,broken score,nan,,,\n"
        "e.mp4,worse score,high,,,\n"
        "f.mp4,,1,,,\n"
        "gone.mp4,missing,1,,,\n"
        "c.mp4,one,1,,,\n"
        "c.mp4,two,1,,,\n",
        encoding="utf-8",
    )
    manifest = read_manifest(table)
    first, second, third = manifest.samples
    assert (first.id, first.captions, first.scores) == ("a b", ("a cat, asleep",), {"aesthetic": 5.5})
    assert (first.split, first.licence, first.source) == ("train", "CC0", "")
    assert (second.path, second.scores, second.split) == (tmp_path / "c.mp4", {}, "val")
    assert third.captions == ("one",)
    assert [(reject.id, reject.reason) for reject in manifest.rejects] == [
        ("d", "bad_score"),
        ("e", "bad_score"),
        ("f", "missing_caption"),
        ("gone", "missing_file"),
        ("c", "duplicate_id"),
    ]
    assert manifest.rejects[0].detail.startswith("line 4:") and manifest.rejects[-1].detail.startswith("line 9:")


def test_jsonl(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = [
        {"id": "x", "path": "a.mp4", "captions": ["long", "", "short"], "scores": {"dover": 0.1}, "source": "web"},
        {"id": "x", "path": "a.mp4", "caption": "again"},
        {"id": "y", "path": "a.mp4", "caption": None},
        {"id": "z", "path": "a.mp4", "captions": "not a list"},
        {"id": "n", "path": "a.mp4", "caption": "c", "scores": {"dover": float("nan")}},
        {"id": "b", "path": "a.mp4", "caption": "c", "scores": {"dover": True}},
        {"path": "x" * 5000 + ".mp4", "caption": "a name too long for any disk"},
        {"path": "nul\0.mp4", "caption": "c"},
        {"path": "sub", "caption": "c"},
    ]
    (tmp_path / "sub").mkdir()
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    manifest = read_manifest(listing)
    assert [(s.id, s.captions, dict(s.scores), s.source) for s in manifest.samples] == [
        ("x", ("long", "short"), {"dover": 0.1}, "web")
    ]
    assert [reject.reason for reject in manifest.rejects] == [
        "duplicate_id",
        "missing_caption",
        "missing_caption",
        "bad_score",
        "bad_score",
        "missing_file",
        "missing_file",
        "missing_file",
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "file,caption\na.mp4,c\n", "no column 'path'"),
        ("a.csv", "path,text\na.mp4,c\n", "no column 'caption'"),
        ("a.csv", "", "no column"),
        ("a.csv", "path,caption\n,c\n", "line 2 has no path"),
        ("a.csv", "path,caption\n", "holds no clip"),
        ("a.jsonl", '{"path": "a.mp4", "caption": "c"}\n{"path": "b.m', "cannot be read"),
        ("a.jsonl", "[1, 2]\n", "line 1"),
        ("a.jsonl", '{"path": "a.mp4"}\n', "no key 'caption'"),
        ("a.jsonl", '{"caption": "c"}\n', "line 1 has no path"),
        ("a.jsonl", '{"path": 3, "caption": "c"}\n', "line 1 has no path"),
        ("a.jsonl", '{"path": "a.mp4", "caption": "c", "scores": 4}\n', "scores"),
        ("a.jsonl", "\n", "holds no clip"),
        ("a.parquet", "PAR1", "neither a folder nor"),
        ("a.csv", b"path,caption\n\xff\xfe.mp4,c\n", "cannot be read"),
    ],
)
def test_structural_errors_stop(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path / name)


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no clip"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
