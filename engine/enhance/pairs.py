"""Pairs of a short request and the caption that says it in full: what a rewriter is started from.

The short side is made from the long one, which is the truthful direction: whatever it says, the caption says too.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from reelforge.engine.core import rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.enhance.structure import Structure

_CLAUSE = re.compile(r"[.;:,!?]+(?=\s|$)|[。，、；：！？]")  # "3.5 m" and "1,000 birds" go on
_MOST_WORDS = 12


@dataclass(frozen=True)
class Pair:
    """What a user might ask, the caption to answer with, and the thought before it."""

    request: str
    caption: str
    thought: str


def read_pairs(path: Path, structure: Structure, min_coverage: float, identity: float, seed: int) -> list[Pair]:
    """Read JSON lines ``{"caption": "...", "request": "...", "thought": "..."}``; request and thought are optional.

    A missing request is the caption's first clause, of at most 12 words.

    Args:
        min_coverage: pairs whose caption has less of the request's content words are left out.
        identity: share of further pairs whose request is the caption itself, so that good prompts are left alone.
        seed: names which.

    Raises:
        DataError: unreadable, a line that is no such record, or nothing is left.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Pairs {path} cannot be read ({error}).", "Give a file of JSON lines.") from error
    found = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    kept = [pair for pair in found if structure.coverage(pair.caption, pair.request) >= min_coverage]
    if not kept:
        raise DataError(
            f"{path} holds {len(found)} pairs, and no caption covers its request to {min_coverage:.0%}.",
            "Make requests from captions, or lower cold_start.min_coverage.",
        )
    chosen = rng.generator("identity_pairs", seed).permutation(len(kept))[: round(identity * len(kept))]
    same = [Pair(kept[place].caption, kept[place].caption, "Nothing is open.") for place in sorted(chosen.tolist())]
    return kept + same


def _record(line: str, where: str) -> Pair:
    try:
        record = json.loads(line)
        caption = record["caption"].strip()
        request, thought = record.get("request") or summary(caption), record.get("thought") or "Details are open."
        request, thought = request.strip(), thought.strip()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is no pair.", 'Write {"request": "...", "caption": "..."}.') from error
    if not caption or not request:
        raise DataError(f"{where} has an empty caption or request.", "Leave the line out.")
    return Pair(request, caption, thought)


def summary(caption: str) -> str:
    """A caption's first clause, of at most 12 words."""
    first = next((clause for clause in _CLAUSE.split(caption) if clause.strip()), caption)
    return " ".join(first.split()[:_MOST_WORDS])
