"""The structure reward: every part against values counted by hand, and what it must not be fooled by."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.enhance.structure import Field, Structure, StructureConfig, mean_parts, script, split_words

PLAIN = Structure(StructureConfig(words=(4, 8), words_limit=(2, 12)))
RICH = Structure(
    StructureConfig(
        words=(4, 8),
        words_limit=(2, 12),
        fields=(
            Field("motion", ("rolls", "drift")),
            Field("camera", ("camera", "close-up", "Wide shot")),
            Field("light", ("light", "sunset")),
        ),
        same=(("Circle", "ball", "disc"), ("left", "west")),
        exclusive=(("red", "green", "blue"), ("ball", "square"), ("two", "three")),
    )
)


def words(count: int) -> str:
    """Distinct and of no meaning."""
    return " ".join(f"w{place}x" for place in range(count))


# --- the whole ---


def test_parts_and_their_mean_by_hand() -> None:
    """7 words; 2 of 3 fields; of {red, ball, house} the house is missing, and nothing is changed."""
    found = RICH.parts("A red disc rolls by the camera", "a red ball and a house")
    assert found == {
        "tags": 1.0,
        "fields": pytest.approx(2 * 2 / 3 - 1),
        "length": 1.0,
        "coverage": pytest.approx(2 * 2 / 3 - 1),
        "consistency": 1.0,
        "variety": 1.0,
        "language": 1.0,
    }
    assert RICH("A red disc rolls by the camera", "a red ball and a house") == pytest.approx((5 + 2 / 3) / 7)
    assert RICH("A red disc rolls by the camera", "a red ball and a house", False) == pytest.approx((3 + 2 / 3) / 7)


def test_without_fields_there_is_no_such_part() -> None:
    assert "fields" not in PLAIN.parts("a red ball", "a red ball")
    assert len(PLAIN.parts("a", "a")) == 6


def test_the_worst_rewrite_is_minus_one() -> None:
    """Out of form, too long, nothing covered, a colour changed, the same over and over, in another script."""
    assert PLAIN("синий шар red " * 9, "blue 球", False) == pytest.approx(-1.0)


TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["a", "red", "blue", "ball", "two", "three", "33", '"say', 'cats"', "赤い", "गेंद", ",", "👩\u200d🚀"]
        )
    ).map(" ".join),
)


@settings(deadline=None, max_examples=150)
@given(TEXT, TEXT, st.booleans())
def test_every_part_is_in_range_for_any_text(rewrite: str, request: str, well_formed: bool) -> None:
    for structure in (PLAIN, RICH):
        parts = structure.parts(rewrite, request, well_formed)
        assert all(-1 <= value <= 1 for value in parts.values())
        assert -1 <= structure(rewrite, request, well_formed) <= 1


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_a_request_says_all_of_itself(text: str) -> None:
    parts = RICH.parts(text, text)
    assert parts["coverage"] == parts["consistency"] == parts["language"] == 1


@settings(deadline=None, max_examples=100)
@given(st.permutations(["red", "dragon", "castle", "storm", "violin", "42"]), st.data())
def test_saying_more_of_the_request_is_worth_more(wanted: list[str], data) -> None:
    """The length is kept by filler."""
    request, count = " ".join(wanted), data.draw(st.integers(0, 5))
    rewrites = [" ".join([*wanted[:kept], *words(6 - kept).split()]) for kept in (count, count + 1)]
    less, more = (PLAIN.parts(rewrite, request) for rewrite in rewrites)
    assert less["coverage"] == pytest.approx(2 * count / 6 - 1)
    assert more["coverage"] - less["coverage"] == pytest.approx(1 / 3)
    assert PLAIN(rewrites[1], request) > PLAIN(rewrites[0], request)


# --- length ---


def test_length_falls_linearly_from_the_window_to_the_limits() -> None:
    found = [PLAIN.parts(words(count), "")["length"] for count in range(15)]
    assert found == [-1, -1, -1, 0, 1, 1, 1, 1, 1, 0.5, 0, -0.5, -1, -1, -1]


def test_the_usual_window() -> None:
    usual = Structure(StructureConfig())
    lengths = {20: -1, 40: 0, 60: 1, 120: 1, 160: 0, 200: -1, 10_000: -1}
    assert {count: usual.parts(words(count), "")["length"] for count in lengths} == lengths


@pytest.mark.parametrize("words, limit", [((8, 4), (2, 12)), ((4, 8), (4, 12)), ((4, 8), (2, 8)), ((4, 8), (9, 2))])
def test_a_window_that_does_not_grow_is_refused(words: tuple[int, int], limit: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="They must grow"):
        StructureConfig(words=words, words_limit=limit)


# --- coverage ---


@pytest.mark.parametrize(
    "rewrite, request_, share",
    [
        ("", "", 1),
        ("anything", "", 1),
        ("anything", "show me a video of something, please", 1),
        ("", "a red ball", 0),
        ("the ball is red", "A RED ball!", 1),
        ("a ball", "a red, red ball", 1 / 2),
        ("it runs", "running", 1),
        ("a runner", "runs", 0),
        ("gliding boxes, cities, slowly, stopped, a fly", "glides box city slow stop flies", 1),
        ("moving", "moves", 1),
        ("a gliding ball, a stormy day", "glide storm", 1 / 2),
        (
            "a plant, a trail, a greeting, a planet, a career, cold water flowing",
            "plane train green plan car flower",
            0,
        ),
        ("cat", "cats", 1),
        ("the dog's ball", "a dog's ball", 1),
        ("the ball of the dog", "the dog's ball", 1),
        ("2 dogs", "two dogs", 1),
        ("two dogs", "2 dogs", 1),
        ("12 dogs", "2 dogs", 1 / 2),
        ("a gray cat", "a grey cat", 1),
        ("a house", "ａ　ｈｏｕｓｅ", 1),
        ("赤い球", "赤い球", 1),
        ("赤い犬が", "赤い球", 2 / 3),
        ("красная машина едет", "красную машину", 1),
        ("गेंद", "लाल गेंद", 1 / 2),
        ("میرود", "می\u200cرود", 1),
    ],
)
def test_coverage_counts_content_words(rewrite: str, request_: str, share: float) -> None:
    assert PLAIN.coverage(rewrite, request_) == pytest.approx(share)


@pytest.mark.parametrize("marks", ['""', "“”", "„“", "«»", "「」", "『』"])
def test_quoted_text_counts_once_more_and_to_the_letter(marks: str) -> None:
    """Wanted: sign, open, late, and the quotation."""
    assert PLAIN.coverage('a sign that says "Open Late"', f"sign {marks[0]}Open Late{marks[1]}") == 1
    assert PLAIN.coverage("a sign, open until late", f"sign {marks[0]}Open Late{marks[1]}") == pytest.approx(3 / 4)
    assert PLAIN.coverage('a sign that says "open late"', f"sign {marks[0]}Open Late{marks[1]}") == pytest.approx(3 / 4)


def test_words_that_say_the_same_cover_each_other() -> None:
    assert RICH.coverage("a disc to the west", "a CIRCLE going left") == pytest.approx(2 / 3)
    assert RICH.coverage("a circle", "discs") == 0, "endings are looked at after; a group names every form it wants"


# --- fields ---


@pytest.mark.parametrize(
    "rewrite, fields",
    [
        ("", -1),
        ("nothing of it", -1),
        ("it rolls", -1 / 3),
        ("it is rolling and drifts", -1 / 3),
        ("a close-up, drifting", 1 / 3),
        ("close, drifting, and then up", 1 / 3),
        ("a wide, drifting shot at SUNSET", 1),
        ("close the door, drifting", -1 / 3),
    ],
)
def test_fields_are_announced_by_a_cue(rewrite: str, fields: float) -> None:
    assert RICH.parts(rewrite, "")["fields"] == pytest.approx(fields)


def test_cues_of_a_group_are_found_under_its_name() -> None:
    structure = Structure(StructureConfig(fields=(Field("motion", ("west",)),), same=(("left", "west"),)))
    assert structure.parts("to the left", "")["fields"] == structure.parts("westward, west", "")["fields"] == 1


# --- contradictions ---


@pytest.mark.parametrize(
    "rewrite, request_, contradicts",
    [
        ("a blue ball", "a red ball", True),
        ("a blue ball on a red floor", "a red ball", False),  # which of them is blue is not known
        ("a red ball on a blue floor", "a red ball", False),
        ("a red ball", "a ball", False),
        ("a ball", "a red ball", False),
        ("a red ball", "a red and a blue ball", False),
        ("a red ball, a green box", "a red ball, a blue box", True),
        ("a gray cat", "a grey cat", False),
        ("a black cat", "a gray cat", True),
        ("three dogs", "two dogs", True),
        ("3 dogs", "2 dogs", True),
        ("three dogs", "2 dogs", True),
        ("3 dogs", "two dogs", True),
        ("two dogs", "2 dogs", False),
        ("2 dogs", "two dogs", False),
        ("dogs", "two dogs", False),
        ("two dogs and 3 cats", "2 dogs", False),
        ("12 dogs", "2 dogs", True),
        ("٢ dogs, 02", "٢ dogs, 02", False),
        ("2 dogs", "٢ dogs", False),
        ("a house of 1999", "a house of 1998", True),
        ("4" * 6000, "5" * 6000, True),
    ],
)
def test_contradictions_are_values_that_gave_way(rewrite: str, request_: str, contradicts: bool) -> None:
    assert PLAIN.contradicts(rewrite, request_) is contradicts
    assert PLAIN.parts(rewrite, request_)["consistency"] == (-1 if contradicts else 1)


def test_values_that_exclude_each_other_go_by_their_groups_name() -> None:
    assert RICH.contradicts("a square", "a disc")
    assert not RICH.contradicts("a circle", "a disc")
    assert RICH.contradicts("THREE balls", "two balls")


# --- variety ---


@pytest.mark.parametrize(
    "rewrite, variety",
    [
        ("", 1),
        ("8k", 1),
        ("very very very", 1),
        ("masterpiece " * 4, -1),  # 1 of 2 triples
        (f"{words(6)} {words(2)}", 1),  # 6 triples, all of them different
        (f"{words(10)} {words(4)}", 1),  # 10 of 12
        (f"{words(8)} {words(4)}", 1),  # 8 of 10: just enough
        (f"{words(7)} {words(4)}", -1),  # 7 of 9
        ("a cat. A cat, a CAT! a cat", -1),
    ],
)
def test_variety_asks_for_distinct_triples(rewrite: str, variety: float) -> None:
    assert PLAIN.parts(rewrite, "")["variety"] == variety


# --- scripts and words ---


@pytest.mark.parametrize(
    "text, name",
    [
        ("", ""),
        ("12, 👩\u200d🚀!", ""),
        ("a red ball", "LATIN"),
        ("ｒｅｄ", "LATIN"),
        ("красный мяч, HD", "CYRILLIC"),
        ("红色的球", "CJK"),
        ("赤いボールがころがる", "CJK"),
        ("iPhone 手机广告", "CJK"),
        ("ーー々", "CJK"),
        ("빨간 공", "HANGUL"),
        ("كرة حمراء", "ARABIC"),
        ("लाल गेंद", "DEVANAGARI"),
        ("ลูกบอลสีแดง", "THAI"),
    ],
)
def test_script_of_most_words(text: str, name: str) -> None:
    assert script(text) == name


@pytest.mark.parametrize(
    "rewrite, request_, language",
    [
        ("a red ball", "красный мяч", -1),
        ("красный мяч катится", "красный мяч", 1),
        ("赤いボールがゆっくりころがる", "赤球", 1),
        ("a red ball", "👩\u200d🚀 2", 1),
        ("", "a ball", -1),
    ],
)
def test_the_rewrite_stays_in_the_requests_script(rewrite: str, request_: str, language: float) -> None:
    assert PLAIN.parts(rewrite, request_)["language"] == language


@pytest.mark.parametrize(
    "text, found",
    [
        ("A red_ball, 2 don't-care.", ["a", "red", "ball", "2", "don", "t", "care"]),
        ("लाल गेंद", ["लाल", "गेंद"]),  # vowel signs are no letters to Python
        ("ลูกบอล", ["ลูกบอล"]),
        ("می\u200cرود", ["میرود"]),
        ("cafe\u0301", ["café"]),
        ("球 red球", ["球", "red", "球"]),
        ("٣ x²", ["3", "x2"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text: str, found: list[str]) -> None:
    assert split_words(text) == found


def test_mean_of_parts() -> None:
    assert mean_parts([]) == {}
    assert mean_parts([{"tags": 1.0, "length": 0.5}, {"tags": -1.0, "length": 0.0}]) == {"tags": 0.0, "length": 0.25}
