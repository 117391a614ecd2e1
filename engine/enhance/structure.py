"""The structure reward S(y, x) in [-1, 1]: is the rewrite y in form, and is it still about the request x?

    S = mean of   tags          1 well formed, -1 not
                  fields        2 f - 1, f: share of the fields that some cue word announces
                  length        1 inside the window of words, linear to -1 at the limits
                  coverage      2 c - 1, c: share of x's content words, numbers and quoted strings that y has
                  consistency   -1 if y changes a value of an exclusive group (a colour, a number), else 1
                  variety       -1 if fewer than 80 % of y's word triples are distinct, else 1
                  language      -1 if y is mostly in another script than x, else 1

It says nothing about pictures; alone it would train perfect formatting.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from reelforge.engine.core.errors import ConfigError

_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")  # written without spaces: every character is a word
_CJK_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC")  # Japanese mixes them
_QUOTED = re.compile(r'"([^"]+)"|„([^“”]+)[“”]|“([^”]+)”|«([^»]+)»|「([^」]+)」|『([^』]+)』')
_MIN_DISTINCT = 0.8
_FEW = frozenset(
    re.findall(
        r"\w+",
        "a an the and or of in on at to for with by from as is are be it its this that these those there i me my we you"
        " your he she they his her their want show make give do does did can could would will please video clip film"
        " scene shot some something so very just s t d m ll re ve",
    )
)
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey", "cyan")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SAME = {"gray": "grey", **{word: str(number) for number, word in enumerate(_NUMBERS, 1)}}  # in every config
# Endings that one stem of so many letters or more takes: walk-, glid-, fl-.
_ENDINGS = (
    (3, ("", "s", "es", "ed", "ing", "ings", "ly")),
    (3, ("e", "es", "ed", "ing", "ings")),
    (2, ("y", "ies", "ied", "ily")),
)


@dataclass(frozen=True)
class Field:
    """A part that every caption has.

    Attributes:
        name: e.g. camera.
        cues: words, or a few words each, of which one announces it.
    """

    name: str
    cues: tuple[str, ...]


@dataclass(frozen=True)
class StructureConfig:
    """What form is asked for.

    Attributes:
        words: a good length, in words.
        words_limit: where the length counts as -1.
        fields: what must be there; none asks for nothing.
        same: words that say the same, in every form that shall count, e.g. ["ball", "balls", "circle"].
        exclusive: words that exclude each other, as numbers always do; a rewrite that swaps one for another contradicts
            the request.
    """

    words: tuple[int, int] = (60, 120)
    words_limit: tuple[int, int] = (20, 200)
    fields: tuple[Field, ...] = ()
    same: tuple[tuple[str, ...], ...] = ()
    exclusive: tuple[tuple[str, ...], ...] = (_COLOURS,)

    def __post_init__(self) -> None:
        low, high = self.words_limit
        if not low < self.words[0] <= self.words[1] < high:
            raise ConfigError(
                f"structure.words is {list(self.words)} and words_limit {list(self.words_limit)}.",
                "They must grow: words_limit[0] < words[0] <= words[1] < words_limit[1].",
            )


class Structure:
    """The reward, with the config's words looked up once."""

    def __init__(self, config: StructureConfig) -> None:
        self.config = config
        self._same = {word.lower(): group[0].lower() for group in config.same for word in group}
        self._exclusive = [set(self.words(" ".join(group))) for group in config.exclusive]
        self._cues = [[self.words(cue) for cue in field.cues] for field in config.fields]

    def __call__(self, rewrite: str, request: str, well_formed: bool = True) -> float:
        """S of a rewrite, or of the request itself where there is none."""
        parts = self.parts(rewrite, request, well_formed)
        return sum(parts.values()) / len(parts)

    def parts(self, rewrite: str, request: str, well_formed: bool = True) -> dict[str, float]:
        """Every term, each in [-1, 1]."""
        words = self.words(rewrite)
        triples = list(zip(words, words[1:], words[2:], strict=False))
        fields = self._cues
        there = sum(any(cue and all(_has(words, part) for part in cue) for cue in cues) for cues in fields)
        return {
            "tags": 1.0 if well_formed else -1.0,
            **({"fields": 2 * there / len(fields) - 1} if fields else {}),
            "length": self._length(len(words)),
            "coverage": 2 * self.coverage(rewrite, request) - 1,
            "consistency": -1.0 if self.contradicts(rewrite, request) else 1.0,
            "variety": 1.0 if len(set(triples)) >= _MIN_DISTINCT * len(triples) else -1.0,
            "language": 1.0 if script(rewrite) == script(request) or not script(request) else -1.0,
        }

    def coverage(self, rewrite: str, request: str) -> float:
        """Share of the request's content words, numbers and quoted strings that the rewrite has; 1 if it has none."""
        said = self.words(rewrite)
        wanted = [word for word in dict.fromkeys(self.words(request)) if word not in _FEW]
        quoted = ["".join(groups) for groups in _QUOTED.findall(request)]
        kept = sum(_has(said, word) for word in wanted) + sum(quote in rewrite for quote in quoted)
        return kept / (len(wanted) + len(quoted)) if wanted or quoted else 1.0

    def contradicts(self, rewrite: str, request: str) -> bool:
        """Whether a value of an exclusive group, or a number, gave way to another one."""
        said, asked = set(self.words(rewrite)), set(self.words(request))
        numbers = {word for word in said | asked if word.isdecimal()}
        return any((asked & group) - said and (said & group) - asked for group in (*self._exclusive, numbers))

    def words(self, text: str) -> list[str]:
        """Lower-case words in order, those that say the same as one; numbers in digits."""
        found = (self._same.get(word, word) for word in split_words(text))
        return [_SAME.get(word, word) for word in found]

    def _length(self, count: int) -> float:
        (low, high), (least, most) = self.config.words, self.config.words_limit
        outside = max((low - count) / (low - least), (count - high) / (most - high), 0.0)
        return 1 - 2 * min(outside, 1.0)


def split_words(text: str) -> list[str]:
    """Lower-case words in order, each with its vowel signs."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return _CJK.sub(r" \1 ", "".join(map(_letter, folded))).split()


def _letter(character: str) -> str:
    """A character as a part of a word: itself, nothing (joiners), or the space between two."""
    category = unicodedata.category(character)
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return character if character.isalnum() or category.startswith("M") else "" if category == "Cf" else " "


def script(text: str) -> str:
    """The script of most words, e.g. ``LATIN``; ``CJK`` is Chinese or Japanese; empty without letters."""
    first = [unicodedata.name(word[0], "?").split()[0] for word in split_words(text) if word[0].isalpha()]
    names = Counter("CJK" if name in _CJK_SCRIPTS else name for name in first)
    return names.most_common(1)[0][0] if names else ""


def _has(words: Sequence[str], wanted: str) -> bool:
    return any(_alike(word, wanted) for word in words)


def _alike(word: str, other: str) -> bool:
    """Equal but for an English ending (runs, running; glides), or outside ASCII the last two letters or three."""
    if word == other:
        return True
    if word.isascii() or other.isascii():
        return not _stems(word).isdisjoint(_stems(other))
    common = max(4, min(len(word), len(other)) - 2)
    return max(len(word), len(other)) <= common + 3 and word[:common] == other[:common]


@lru_cache(65536)
def _stems(word: str) -> frozenset[tuple[str, int]]:
    """What is left without an ending, and which kind of ending it was; no -er, which would make a flower flow."""
    found = set()
    for kind, (shortest, endings) in enumerate(_ENDINGS):
        for ending in endings:
            stem = word.removesuffix(ending)
            if word.endswith(ending) and len(stem) >= shortest:
                found.add((stem, kind))
                if ending in ("ed", "ing") and stem[-1] == stem[-2]:  # running, stopped
                    found.add((stem[:-1], kind))
    return frozenset(found)


def mean_parts(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each term over rewrites."""
    return {name: sum(each[name] for each in parts) / len(parts) for name in parts[0]} if parts else {}
