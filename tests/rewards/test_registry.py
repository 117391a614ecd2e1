"""Scorers by name: the built-in ones, somebody's own, and every way to misspell them."""

import sys
from pathlib import Path

import pytest

from reelforge.bench.toy.render import TOY_SPEC
from reelforge.bench.toy.verifiers import ToyVerifier
from reelforge.engine.core.errors import ConfigError, ReelforgeError
from reelforge.engine.rewards.picture import PictureStatistics
from reelforge.engine.rewards.registry import build_scorer, build_scorers

OWN = """
import torch
from reelforge.engine.rewards.contract import Scores


class Redness:
    axes = ("red",)

    def __init__(self, video, channel="0"):
        self.video, self.channel = video, int(channel)

    def score(self, videos, prompts):
        return {"red": Scores.of(videos[..., self.channel].float().mean((1, 2, 3)))}


class OneName(Redness):
    axes = "red"


class NoAxes:
    def __init__(self, video):
        pass


class NoScore(NoAxes):
    axes = ("red",)


class Fussy(Redness):
    def __init__(self, video):
        raise ReelforgeWants("a licence file")


class ReelforgeWants(ValueError):
    pass


a_number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "my_scorers.py").write_text(OWN)
    (tmp_path / "half_done.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_scorers"
    sys.modules.pop("my_scorers", None)


def test_built_in_ones_by_name() -> None:
    scorers = build_scorers(["reelforge.bench.toy.verifiers:ToyVerifier", "picture"], TOY_SPEC)
    assert [type(scorer) for scorer in scorers] == [ToyVerifier, PictureStatistics]
    assert scorers[0].axes == ("vq", "mq", "ta")


def test_your_own_gets_the_video_and_what_follows_the_sign(own: str) -> None:
    plain, blue = build_scorers([f"{own}:Redness", f"{own}:Redness=2"], TOY_SPEC)
    assert (plain.video, plain.channel, blue.channel) == (TOY_SPEC, 0, 2)


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("clop", "no scorer 'clop'", "Did you mean 'clip'"),
        ("hpsv3", "no scorer 'hpsv3'", "package.module:Class"),
        ("", "no scorer ''", "package.module:Class"),
        ("picture=3", "too many positional arguments", "Write 'picture', without '='."),
        ("clip", "missing a required argument: 'folder'", "Write 'clip=FOLDER'."),
        ("pick", "missing a required argument: 'folder'", "Write 'pick=FOLDER'."),
        ("clip=/nowhere/clip", "no folder /nowhere/clip", "model.safetensors"),
        ("reelforge.bench.toy.scorer:ToyHeldOut=/nowhere", "/nowhere/vae/config.json", "model folder"),
        ("no_such_module:Thing", "cannot be imported", "PYTHONPATH"),
        (":Thing", "cannot be imported", "spelling"),
        ("half_done:Thing", "a_package_that_nobody_has", "install"),
        ("my_scorers:Blueness", "Blueness", "spelling"),
        ("my_scorers:a_number", "is of type int", "Name a class"),
        ("my_scorers:OneName", "axes = 'red'", "tuple of names"),
        ("my_scorers:NoAxes", "axes = None", "tuple of names"),
        ("my_scorers:NoScore", "no method score", "score(self, videos, prompts)"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(own: str, name: str, what: str, hint: str) -> None:
    with pytest.raises(ReelforgeError) as caught:
        build_scorer(name, TOY_SPEC)
    assert what in caught.value.what and hint in caught.value.hint, str(caught.value)


def test_an_error_inside_a_scorer_keeps_its_traceback(own: str) -> None:
    with pytest.raises(ValueError, match="a licence file") as caught:
        build_scorer(f"{own}:Fussy", TOY_SPEC)
    assert not isinstance(caught.value, ConfigError)
