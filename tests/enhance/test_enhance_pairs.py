"""Pairs to start a rewriter from: read, made, filtered, refused."""

import json
from pathlib import Path

import pytest

from reelforge.engine.core.errors import DataError
from reelforge.engine.enhance.pairs import Pair, read_pairs, summary
from reelforge.engine.enhance.structure import Structure, StructureConfig

STRUCTURE = Structure(StructureConfig(same=(("circle", "ball"),)))


def write(folder: Path, *records: object) -> Path:
    """One line each; text is written as it is."""
    path = folder / "pairs.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, min_coverage: float = 0.0, identity: float = 0.0, seed: int = 0) -> list[Pair]:
    return read_pairs(path, STRUCTURE, min_coverage, identity, seed)


def test_records_are_read_in_order_with_what_is_optional(tmp_path) -> None:
    path = write(
        tmp_path,
        {"request": " a ball ", "caption": "a red ball rolls\n", "thought": " colour is open "},
        "",
        {"caption": "Two dogs run, tails up."},
        {"caption": "赤い球が転がる。カメラは動かない", "request": None, "thought": "", "source": "a survey"},
    )
    assert read(path) == [
        Pair("a ball", "a red ball rolls", "colour is open"),
        Pair("Two dogs run", "Two dogs run, tails up.", "Details are open."),
        Pair("赤い球が転がる", "赤い球が転がる。カメラは動かない", "Details are open."),
    ]


@pytest.mark.parametrize(
    "caption, request_",
    [
        ("A cat sleeps.", "A cat sleeps"),
        ("A cat sleeps", "A cat sleeps"),
        ("A cat: it sleeps; it wakes", "A cat"),
        ("...! A cat sleeps. It wakes.", "A cat sleeps"),
        ("A 3.5 m wave, slowly", "A 3.5 m wave"),
        ("1,000 birds at 10:30 rise. They land.", "1,000 birds at 10:30 rise"),
        ("猫が眠る、窓辺で。", "猫が眠る"),
        ("一只猫，在窗边", "一只猫"),
        (" ".join(f"w{place}" for place in range(30)), " ".join(f"w{place}" for place in range(12))),
        ("  a \n cat  ", "a cat"),
        ("?!", "?!"),
    ],
)
def test_a_summary_is_the_first_clause(caption: str, request_: str) -> None:
    """Numbers are not cut in two: what a request says, its caption says."""
    assert summary(caption) == request_
    assert STRUCTURE.coverage(caption, request_) == 1
    assert not STRUCTURE.contradicts(caption, request_)


def test_line_ends_inside_a_text_end_no_record(tmp_path) -> None:
    """JSON may hold Unicode's line separators as they are; files from Windows end lines with two characters."""
    path = write(tmp_path, {"caption": "a cat\u2028sleeps\x85long"}, '{"caption": "a dog runs"}\r')
    assert [pair.caption for pair in read(path)] == ["a cat\u2028sleeps\x85long", "a dog runs"]


def test_captions_that_do_not_cover_their_request_are_left_out(tmp_path) -> None:
    """Of the content words: all, 2 of 3, none; names of the same thing count."""
    path = write(
        tmp_path,
        {"request": "a red ball", "caption": "a red circle"},
        {"request": "a big red ball", "caption": "a red circle"},
        {"request": "a house", "caption": "a red circle"},
    )
    assert [pair.request for pair in read(path, 0.9)] == ["a red ball"]
    assert [pair.request for pair in read(path, 2 / 3)] == ["a red ball", "a big red ball"]
    assert len(read(path, 0.0)) == 3


def test_identity_pairs_leave_good_prompts_alone(tmp_path) -> None:
    """A share of those that were kept, each once, behind them; which ones is a function of the seed."""
    path = write(tmp_path, *({"request": "x", "caption": f"x{' y' * place} z"} for place in range(20)))
    found = read(path, identity=0.25, seed=1)
    same = found[20:]
    assert len(found) == 25 and all(pair.request == "x" for pair in found[:20])
    assert all(pair.request == pair.caption and pair.thought == "Nothing is open." for pair in same)
    assert len({pair.caption for pair in same}) == 5
    assert found == read(path, identity=0.25, seed=1) != read(path, identity=0.25, seed=2)
    assert len(read(path, identity=1.0)) == 40
    assert len(read(path, identity=0.01)) == 20


@pytest.mark.parametrize(
    "line",
    [
        "a red ball",
        '{"caption": "a red',
        "[1]",
        '"caption"',
        "null",
        "3",
        "{}",
        '{"request": "a ball"}',
        '{"caption": 3}',
        '{"caption": ["a"]}',
        '{"caption": null}',
        '{"caption": "a", "request": 3}',
        '{"caption": "a", "thought": {"a": 1}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line: str) -> None:
    path = write(tmp_path, {"caption": "a red ball"}, "", line)
    with pytest.raises(DataError, match=r"pairs.jsonl:3 is no pair\."):
        read(path)


@pytest.mark.parametrize("record", [{"caption": " "}, {"caption": ""}, {"caption": "a", "request": "\t"}])
def test_an_empty_side_is_named(tmp_path, record: dict) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:1 has an empty caption or request\."):
        read(write(tmp_path, record))


def test_nothing_to_learn_from_is_said(tmp_path) -> None:
    with pytest.raises(DataError, match="holds 0 pairs"):
        read(write(tmp_path))
    with pytest.raises(DataError, match="holds 1 pairs, and no caption covers its request to 90%"):
        read(write(tmp_path, {"request": "a house", "caption": "a ball"}), 0.9)


def test_a_file_that_cannot_be_read_is_said(tmp_path) -> None:
    (tmp_path / "bytes").write_bytes(b'{"caption": "\xff"}')
    for name in ("nothing", "bytes", "."):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / name)
