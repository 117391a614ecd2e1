"""Requests for toy-world clips: truthful, in users' words, and two sets of phrasings that share none."""

import json
import re
from collections import Counter
from dataclasses import asdict

import pytest

from reelforge.bench.toy.requests import pair, request
from reelforge.bench.toy.world import FACTORS, NAMES, captions, parse_prompt, scenes
from reelforge.engine.core import rng
from reelforge.engine.enhance.pairs import read_pairs
from reelforge.engine.enhance.structure import Structure, StructureConfig

EVERY = scenes("all")
FACTOR_OF = {name: factor for factor, values in FACTORS.items() for value in values for name in NAMES[value]}
KINDS = ("train", "held_out")


def asked(phrasings: str, rounds: int = 10) -> list[tuple[object, str]]:
    return [
        (scene, request(scene, phrasings, rng.generator("requests", place, turn)))
        for place, scene in enumerate(EVERY)
        for turn in range(rounds)
    ]


def phrasing(text: str) -> str:
    """A request with its values taken out: "a {colour} {shape}"."""
    return re.sub("[a-z]+", lambda word: f"{{{FACTOR_OF[word[0]]}}}" if word[0] in FACTOR_OF else word[0], text)


@pytest.fixture(scope="module")
def phrasings() -> dict[str, set[str]]:
    return {kind: {phrasing(text) for _, text in asked(kind, 20)} for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_name_the_scene_and_nothing_else(kind: str) -> None:
    """Always its shape, colour and motion; each value in every word for it, sooner or later."""
    seen: Counter[str] = Counter()
    for scene, text in asked(kind):
        named = parse_prompt(text)
        assert named.items() <= asdict(scene).items(), text
        assert {"shape", "colour", "motion"} <= named.keys(), text
        seen.update(word for word in re.findall("[a-z]+", text) if word in FACTOR_OF)
    assert all(seen[name] > 0 for name in FACTOR_OF)


@pytest.mark.parametrize("kind", KINDS)
def test_speed_and_background_are_left_open_now_and_then(kind: str) -> None:
    named = [parse_prompt(text).keys() for _, text in asked(kind)]
    for factor in ("speed", "background"):
        assert 0.1 < sum(factor in keys for keys in named) / len(named) < 0.7
    assert any({"speed", "background"}.isdisjoint(keys) for keys in named)


def test_requests_for_judging_are_phrased_as_none_in_training(phrasings) -> None:
    """Not with other openings or closings either: neither holds the other."""
    train, held_out = phrasings["train"], phrasings["held_out"]
    assert len(train) > 200 and len(held_out) > 20
    assert not any(one in other or other in one for one in held_out for other in train)


def test_requests_are_not_captions() -> None:
    """Neither phrasing is what the generator was trained on."""
    known = {phrasing(caption) for scene in EVERY for caption in captions(scene)}
    for kind in KINDS:
        assert not known & {phrasing(text) for _, text in asked(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_a_function_of_its_generator(kind: str) -> None:
    drawn = [request(EVERY[5], kind, rng.generator("requests", seed)) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 2


def test_pairs_say_in_full_what_was_asked() -> None:
    for place, scene in enumerate(EVERY):
        made = pair(scene, rng.generator("pairs", place))
        assert made.keys() == {"request", "thought", "caption"}
        assert made["caption"] in captions(scene) and parse_prompt(made["caption"]) == asdict(scene)
        assert parse_prompt(made["request"]).items() <= asdict(scene).items()
        assert made["thought"].split() == list(parse_prompt(made["request"]).values())


def test_pairs_are_what_a_rewriter_is_started_from(tmp_path) -> None:
    """The engine reads them, and finds no caption that changes a value which its request named."""
    made = [pair(scene, rng.generator("pairs", place)) for place, scene in enumerate(EVERY)]
    structure = Structure(StructureConfig(same=tuple(NAMES.values()), exclusive=tuple(FACTORS.values())))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    found = read_pairs(path, structure, 0.0, 0.0, 0)
    assert [vars(each) for each in found] == made
    assert not any(structure.contradicts(each.caption, each.request) for each in found)
    others = zip(found, found[1:], strict=False)
    assert any(structure.contradicts(each.caption, other.request) for each, other in others)
