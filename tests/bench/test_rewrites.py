"""What rewriters are judged on and compared with: held-out requests, templates, and facts on words."""

import functools
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")

from reelforge.bench import enhance_study, rewrites
from reelforge.bench.enhance_study import Study
from reelforge.bench.evaluation import held_out_prompts
from reelforge.bench.rewrites import (
    TEMPLATES,
    Kept,
    best_template,
    held_out_requests,
    kept,
    template,
    training_requests,
)
from reelforge.bench.toy.requests import request
from reelforge.bench.toy.world import FACTORS, NAMES, Scene, parse_prompt, scenes
from reelforge.engine.core import rng

FACTOR_OF = {name: factor for factor, values in FACTORS.items() for value in values for name in NAMES[value]}


def phrasing(text: str) -> str:
    """Opening and core of a request: values and closing taken out."""
    blank = re.sub("[a-z]+", lambda word: f"<{FACTOR_OF[word[0]]}>" if word[0] in FACTOR_OF else word[0], text)
    return re.sub("( please|[?!])$", "", blank)


@functools.cache
def seen_in_training() -> frozenset[str]:
    """Every phrasing that some training request has."""
    drawn = rng.generator("phrasings")
    return frozenset(phrasing(request(scene, "train", drawn)) for scene in scenes("train") for _ in range(6))


# --- requests ---


def test_held_out_requests_name_their_scene_truly_and_all_differ():
    """In the captions' order, so that a request and a caption of one place ask for the same clip."""
    asked = held_out_requests(72)
    assert len(asked) == len(set(asked)) == 72
    for text, (scene, caption) in zip(asked, held_out_prompts(72), strict=True):
        named = parse_prompt(text)
        assert scene.held_out and {"shape", "colour", "motion"} <= named.keys(), text
        assert named.items() <= asdict(scene).items() and text != caption


def test_held_out_requests_are_phrased_as_none_in_training():
    """No opening with its core is shared; nor is any whole request."""
    known, asked = seen_in_training(), held_out_requests(72)
    assert len(known) == 6 * 14  # openings, of which none is one, and cores
    assert len({phrasing(text) for text in asked}) >= 12
    assert not known & {phrasing(text) for text in asked}
    assert not set(asked) & {text for seed in range(5) for text in training_requests(360, seed)}


def test_fewer_requests_are_the_first_of_more():
    assert held_out_requests(48) == held_out_requests(72)[:48]
    assert training_requests(10, 3) == training_requests(50, 3)[:10]


def test_training_requests_are_of_training_scenes_in_training_phrasings():
    asked = training_requests(360)
    assert len(set(asked)) == 360 and asked != training_requests(360, 1)
    named = [parse_prompt(text) for text in asked]
    triples = [tuple(each[name] for name in ("shape", "colour", "motion")) for each in named]
    assert not any(Scene(*triple, "slow", "black").held_out for triple in triples)
    assert len(set(triples)) == 60  # 360 scenes of six speeds and backgrounds each
    assert {phrasing(text) for text in asked} <= seen_in_training()


def test_two_scenes_never_share_a_request(monkeypatch):
    """The second draws again, until it has words of its own."""
    drawn = iter(["red ball", "red ball", "red ball", "red dot"])
    monkeypatch.setattr(rewrites, "request", lambda *_: next(drawn))
    assert training_requests(2) == ["red ball", "red dot"]


# --- templates ---


def test_a_template_puts_its_words_around_a_request():
    assert template(0)(["red ball", "{0} box"]) == [
        "red ball, high quality, sharp and clean",
        "{0} box, high quality, sharp and clean",
    ]
    assert all(text.count("{}") == 1 for text in TEMPLATES)


def plant_scores(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[list[float]]]) -> list[tuple]:
    """``table[reward][template]`` holds a score a request; returns what was asked for, and as what it was written."""
    asked: list[tuple] = []

    def evaluate(folder, judge, prompts, samples, seed, batch_size, label, settings=(), written=None):
        assert samples == 1
        number = len(asked)
        asked.append((list(prompts), list(written), seed))
        scores = {name: np.array(rows[number]) for name, rows in table.items()}
        return SimpleNamespace(measured=SimpleNamespace(scores=scores))

    monkeypatch.setattr(rewrites, "evaluate", evaluate)
    return asked


def best_by_hand(table: dict[str, list[list[float]]]) -> int:
    """Mean over rewards of each template's mean, in standard deviations over all clips; what is missing counts not."""

    def there(values: Sequence[float]) -> list[float]:
        return [value for value in values if value == value]

    spread = {name: statistics.pstdev(there(sum(rows, []))) for name, rows in table.items()}
    means = [
        statistics.fmean(statistics.fmean(there(rows[number])) / spread[name] for name, rows in table.items())
        for number in range(len(TEMPLATES))
    ]
    return means.index(max(means))


def test_the_best_template_earns_most_in_deviations(monkeypatch):
    """Whatever a reward's scale: on plain sums the third would win by its vq alone."""
    missing = float("nan")
    table = {
        "vq": [[100.0, 140.0], [130.0, 120.0], [190.0, 210.0], [90.0, 100.0], [100.0, 80.0]],
        "mq": [[-1.0, -1.1], [-0.1, -0.2], [-3.0, -2.9], [-1.0, -0.9], [-1.2, -1.1]],
        "ta": [[0.5, 0.4], [0.9, missing], [0.1, 0.2], [0.5, 0.6], [missing, 0.4]],
    }
    asked = plant_scores(monkeypatch, table)
    requests = ["red ball", "blue box"]
    plain = [sum(np.nanmean(table[name][number]) for name in table) for number in range(5)]
    assert np.argmax(plain) == 2
    assert best_template(None, None, requests, 4, 7) == best_by_hand(table) == 1
    assert asked == [(requests, template(number)(requests), 7) for number in range(5)]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_random_scores(monkeypatch, seed):
    drawn = np.random.default_rng(seed)
    table = {name: (scale * drawn.normal(size=(5, 6))).tolist() for name, scale in (("vq", 3), ("mq", 50), ("ta", 0.1))}
    plant_scores(monkeypatch, table)
    assert best_template(None, None, ["a"] * 6, 4, 0) == best_by_hand(table)


def test_templates_are_chosen_on_training_requests_only(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(enhance_study, "best_template", lambda folder, judge, requests, *_: asked.extend(requests) or 3)
    study = object.__new__(Study)
    study.folder, study.exam, study.config = None, SimpleNamespace(judge=None), SimpleNamespace(batch_size=4)
    assert study.best() == 3 and len(asked) >= 48
    assert not set(asked) & set(held_out_requests(72))
    named = [parse_prompt(text) for text in asked]
    assert not any(Scene(each["shape"], each["colour"], each["motion"], "slow", "black").held_out for each in named)
    assert {phrasing(text) for text in asked} <= seen_in_training()


# --- facts on words ---


def test_what_rewrites_keep_by_hand():
    pairs = {
        "red ball west": "a red circle moving slowly to the left on a black background",  # all three, in other words
        "blue box up, fast": "a blue square moving slowly upwards",  # another speed
        "green dot right": "green dot right",  # copied
        "a lilac wedge going down": "a purple triangle",  # the motion is lost
        "teal tile north": "a cyan square or circle moving up",  # two shapes promise none
    }
    found = kept(list(pairs), list(pairs.values()))
    assert found == Kept(preserved=2 / 5, copied=1 / 5, distinct=1.0, words=(12 + 6 + 3 + 3 + 7) / 5)


def test_rewrites_that_are_all_one():
    found = kept(["red ball west", "red dot left", "red ball west"], ["a red circle moving left"] * 3)
    assert found == Kept(preserved=1.0, copied=0.0, distinct=1 / 2, words=5.0)
    nothing = kept(["something nice"], ["a red circle"])  # names nothing that could be lost
    assert nothing.preserved == 1


def test_a_rewriter_that_has_learnt_nothing_keeps_every_request(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tiny_enhance import WORDS, make_language_model

    from reelforge.engine.enhance.dialogue import DialogueConfig
    from reelforge.engine.enhance.language_model import LanguageModel
    from reelforge.engine.enhance.rewriter import save_rewriter

    language = LanguageModel.load(make_language_model(tmp_path / "language"))
    save_rewriter(language, DialogueConfig(**WORDS), tmp_path / "rewriter")
    asked = held_out_requests(4)
    written = rewrites.trained(tmp_path / "rewriter")(asked)
    assert written == asked and kept(asked, written) == kept(asked, asked)
    assert kept(asked, asked).copied == kept(asked, asked).preserved == 1
