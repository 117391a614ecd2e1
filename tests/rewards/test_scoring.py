"""Every way in which somebody else's scorer can fail costs its own scores; the trainer's faults stay the trainer's."""

import gc
import math
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from reelforge.bench.toy.render import CURATED, make_clip
from reelforge.bench.toy.verifiers import ToyVerifier
from reelforge.bench.toy.world import captions
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.kernels.frames import to_uint8

PROMPTS = ["a", "bb", "ccc", "dddd"]
TURN = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])


def latents_of(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 2)


def decode(latents: Tensor) -> Tensor:
    """Every pixel of a clip is its latent's value."""
    assert not torch.is_grad_enabled()
    return latents.movedim(1, -1).expand(-1, -1, -1, -1, 3).byte()


def level(videos: Tensor) -> Tensor:
    return videos.float().mean((1, 2, 3, 4))


class Level:
    """A sound scorer: the clip's level and, so that prompts matter, the prompt's length."""

    axes = ("level",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        assert not torch.is_grad_enabled()
        return {"level": Scores.of(level(videos) + torch.tensor([len(prompt) / 10 for prompt in prompts]))}


class Planted:
    """Answers whatever it is given to answer."""

    axes = ("bad",)

    def __init__(self, answer: Callable[[Tensor, Sequence[str]], object]) -> None:
        self.answer = answer
        self.batches: list[int] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        self.batches.append(len(prompts))
        return self.answer(videos, prompts)


def bad(values: Tensor) -> dict[str, Scores]:
    return {"bad": Scores.of(values)}


def scoring_of(*scorers, overlap: bool = True, **settings) -> Scoring:
    return Scoring(scorers, decode, ScoringConfig(overlap=overlap, **settings))


def raise_error(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
    raise ValueError("no such luck")


# -- one fault at a time ---------------------------------------------------------------------------------------------

FAULTS = {
    "raises": (raise_error, r"Planted: ValueError: no such luck \(test_scoring\.py, line \d+\)"),
    "exits": (lambda v, p: sys.exit("I am leaving"), "SystemExit: I am leaving"),
    "one short": (lambda v, p: bad(level(v)[1:]), "answered 3 scores of bad for 4 clips"),
    "one for all": (lambda v, p: bad(level(v).mean().view(1)), "answered 1 scores of bad for 4 clips"),
    "another axis": (lambda v, p: {"good": Scores.of(level(v))}, "answered for good instead of bad"),
    "an axis too many": (lambda v, p: {**bad(level(v)), "good": Scores.of(level(v))}, "for bad, good instead of bad"),
    "nothing": (lambda v, p: {}, "answered for nothing instead of bad"),
    "None": (lambda v, p: None, "answered NoneType instead of a dict of Scores"),
    "a tensor": (lambda v, p: level(v), "answered Tensor instead of a dict of Scores"),
    "tensors": (lambda v, p: {"bad": level(v)}, "answered dict instead of a dict of Scores"),
    "infinity": (lambda v, p: {"bad": Scores(level(v) / 0)}, "AssertionError"),
}


@TURN
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_own_scores_alone(fault: str, overlap: bool) -> None:
    answer, words = FAULTS[fault]
    scoring = scoring_of(Planted(answer), Level(), overlap=overlap)
    for _ in range(2):
        scores = scoring.submit(latents_of([10, 20, 30, 40]), PROMPTS).result()
        assert list(scores) == ["bad", "level"]
        assert scores["bad"].values.isnan().all() and len(scores["bad"].values) == 4
        torch.testing.assert_close(scores["level"].values, torch.tensor([10.1, 20.2, 30.3, 40.4]))
    assert re.search(words, scoring.last_error), scoring.last_error


@TURN
def test_what_is_not_finite_is_missing_clip_by_clip(overlap: bool) -> None:
    def answer(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        values = level(videos)
        return bad(torch.where(values == 20, math.nan, torch.where(values == 30, math.inf, values)))

    scoring = scoring_of(Planted(answer), overlap=overlap)
    values = scoring.submit(latents_of([10, 20, 30, 40]), PROMPTS).result()["bad"].values
    assert values.isnan().tolist() == [False, True, True, False] and values[3] == 40
    assert scoring.last_error == ""


@TURN
def test_a_hanging_scorer_is_given_up_on_and_never_asked_twice_at_a_time(overlap: bool) -> None:
    hang, release = threading.Event(), threading.Event()
    hang.set()

    def answer(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        if hang.is_set():
            release.wait(20)
            return bad(level(videos) + 1000)  # late: must never be seen
        return bad(level(videos))

    scorer = Planted(answer)
    scoring = scoring_of(scorer, Level(), overlap=overlap, timeout_s=0.3)
    start = time.monotonic()
    late = scoring.submit(latents_of([1, 2]), PROMPTS[:2]).result()
    waited = time.monotonic() - start
    assert late["bad"].values.isnan().all() and late["level"].valid.all()
    assert "no answer within 0.3 s" in scoring.last_error and 0.25 < waited < 5
    for _ in range(20):  # would take 6 s if each waited
        following = scoring.submit(latents_of([3, 4]), PROMPTS[:2]).result()
        assert following["bad"].values.isnan().all()
        torch.testing.assert_close(following["level"].values, torch.tensor([3.1, 4.2]))
    assert time.monotonic() - start < waited + 2
    assert "still at work" in scoring.last_error and scorer.batches == [2]
    hang.clear()
    release.set()
    deadline = time.monotonic() + 10
    while not (back := scoring.submit(latents_of([5, 6]), PROMPTS[:2]).result()["bad"]).valid.all():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert back.values.tolist() == [5, 6]


@TURN
def test_an_endless_timeout_is_one(overlap: bool) -> None:
    scoring = scoring_of(Level(), overlap=overlap, timeout_s=math.inf)
    assert scoring.submit(latents_of([1, 2]), PROMPTS[:2]).result()["level"].valid.all()


# -- scores that belong to other clips -------------------------------------------------------------------------------


def drawn(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.rand(len(videos))


def middle_swapped(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    values = level(videos)
    if len(values) == 4:
        values[[1, 2]] = values[[2, 1]]
    return values


MISPLACED = {
    "reversed": lambda v, p: level(v).flip(0),
    "one further": lambda v, p: level(v).roll(1),
    "middle swapped": middle_swapped,
    "first prompt for all": lambda v, p: level(v) * 0 + len(p[0]),
    "last prompt for all": lambda v, p: level(v) * 0 + len(p[-1]),
    "normalised over the batch": lambda v, p: (level(v) - level(v).mean()) / level(v).std(correction=0),
    "centred on the batch": lambda v, p: level(v) - level(v).mean(),
    "a little of the neighbours": lambda v, p: level(v) + 0.01 * level(v).mean(),
    "by chance": drawn,
}


@TURN
@pytest.mark.parametrize("kind", MISPLACED)
def test_scores_of_other_clips_stop_the_run(kind: str, overlap: bool) -> None:
    scoring = scoring_of(Level(), Planted(lambda v, p: bad(MISPLACED[kind](v, p))), overlap=overlap)
    with pytest.raises(TrainingError, match=r"Planted scores a clip bad = .* in a batch of 4 and .* alone"):
        scoring.submit(latents_of([10, 20, 30, 45]), PROMPTS).result()


def test_rounding_is_no_neighbour() -> None:
    """float32 sums in another order, once where scores differ and once where all are equal."""

    def shaken(size: float) -> Callable:
        return lambda v, p: bad(level(v) * (1 + size * (len(p) > 1)))

    for values in ([10, 20, 30, 40], [20, 20, 20, 20]):
        scoring = scoring_of(Planted(shaken(3e-7)), overlap=False)
        assert scoring.submit(latents_of(values), PROMPTS).result()["bad"].valid.all()
        with pytest.raises(TrainingError, match="alone"):
            scoring_of(Planted(shaken(2e-3)), overlap=False).submit(latents_of(values), PROMPTS).result()


def test_the_check_waits_for_a_batch_that_tells_something() -> None:
    """A single clip, a failed batch and one without scores are no proof; a sound batch is, and the check is over."""
    answers = iter([raise_error, lambda v, p: bad(level(v) * math.nan)])
    scorer = Planted(lambda v, p: next(answers, lambda v, p: bad(level(v)))(v, p))
    scoring = scoring_of(scorer, overlap=False)
    for count, asked in ((2, [2]), (2, [2]), (1, [1]), (4, [4, 1, 1, 1]), (4, [4]), (2, [2])):
        scorer.batches.clear()
        scoring.submit(latents_of(range(count)), PROMPTS[:count]).result()
        assert scorer.batches == asked


def test_a_scorer_that_fails_alone_is_checked_again() -> None:
    failures = iter([True])

    def answer(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        if len(prompts) == 1 and next(failures, False):
            raise OSError("service unavailable")
        return bad(level(videos) if len(prompts) == 1 else level(videos).flip(0))

    scoring = scoring_of(Planted(answer), overlap=False)
    assert scoring.submit(latents_of([1, 2, 3]), PROMPTS[:3]).result()["bad"].valid.all()
    with pytest.raises(TrainingError, match="alone"):
        scoring.submit(latents_of([1, 2, 3]), PROMPTS[:3]).result()


# -- the queue -------------------------------------------------------------------------------------------------------


def test_many_batches_keep_their_order() -> None:
    seen: list[int] = []

    def answer(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        if len(prompts) > 1:
            seen.append(int(videos.max()))
            time.sleep(0.002 * (len(seen) % 3))
        return bad(level(videos))

    scoring = scoring_of(Level(), Planted(answer))
    pending = [scoring.submit(latents_of([i, i + 1]), PROMPTS[:2]) for i in range(60)]
    for i, scores in enumerate(pending):
        assert scores.result()["bad"].values.tolist() == [i, i + 1]
    assert seen == list(range(1, 61))


def test_sampling_goes_on_while_scores_are_made() -> None:
    release = threading.Event()
    scoring = scoring_of(Planted(lambda v, p: bad(level(v) * release.wait(20))))
    pending = [scoring.submit(latents_of([7, 9]), PROMPTS[:2]) for _ in range(3)]  # would not return
    assert not pending[0].future.done()
    release.set()
    assert [scores.result()["bad"].values.tolist() for scores in pending] == [[7, 9]] * 3


@TURN
def test_seconds_are_measured(overlap: bool) -> None:
    def slow_decode(latents: Tensor) -> Tensor:
        time.sleep(0.05)
        return decode(latents)

    def slow(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        time.sleep(0.3)
        return bad(level(videos))

    start = time.monotonic()
    pending = Scoring([Planted(slow)], slow_decode, ScoringConfig(overlap=overlap)).submit(latents_of([1]), ["a"])
    pending.result()
    assert 0.05 <= pending.decode_s < pending.score_s and pending.score_s >= 0.3
    assert pending.decode_s + pending.score_s <= time.monotonic() - start


@TURN
def test_a_decoders_failure_reaches_the_trainer_and_no_other_batch(overlap: bool) -> None:
    def broken(latents: Tensor) -> Tensor:
        if latents.max() == 13:
            raise torch.OutOfMemoryError("the decoder wants more")
        return decode(latents)

    scoring = Scoring([Level()], broken, ScoringConfig(overlap=overlap))
    pending = [scoring.submit(latents_of([value]), ["a"]) for value in (12, 13, 14)]
    assert pending[0].result()["level"].valid.all() and pending[2].result()["level"].valid.all()
    with pytest.raises(torch.OutOfMemoryError, match="wants more"):
        pending[1].result()


def test_overlap_changes_no_score() -> None:
    clips = [make_clip(5, index, CURATED, "all") for index in range(12)]
    videos = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    latents = (videos.float() / 127.5 - 1).movedim(-1, 1).contiguous()
    prompts = [captions(clip.described)[-1] for clip in clips]

    def run(overlap: bool) -> list[dict[str, Tensor]]:
        scoring = Scoring([ToyVerifier()], to_uint8, ScoringConfig(overlap=overlap))
        places = [slice(start, start + 4) for start in range(0, 12, 4)]
        pending = [scoring.submit(latents[place], prompts[place]) for place in places]
        return [{axis: scores.values for axis, scores in each.result().items()} for each in pending]

    direct = ToyVerifier().score(videos[4:8], prompts[4:8])
    for one, other in zip(run(True), run(False), strict=True):
        assert list(one) == ["vq", "mq", "ta"]
        assert all(torch.equal(one[axis], other[axis]) for axis in one)
    assert all(torch.equal(run(True)[1][axis], direct[axis].values) for axis in direct)


def test_nothing_is_kept_of_a_batch_or_of_a_run() -> None:
    """Frames of a failed batch would pile up, a dropped run would keep its decoder on the GPU."""
    frames: list[weakref.ref] = []

    def watch(videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        frames.append(weakref.ref(videos))
        raise ValueError("no")

    def decoder(latents: Tensor) -> Tensor:
        return decode(latents)

    scorer = Planted(watch)
    scoring = Scoring([scorer], decoder, ScoringConfig())
    held, ours = weakref.ref(decoder), [scoring._lane, *(each.lane for each in scoring._scorers)]
    gc.disable()
    try:
        for _ in range(3):
            scoring.submit(latents_of([1, 2]), PROMPTS[:2]).result()
        scoring._lane.submit(lambda: None, after := Future())  # the lane has let go of what came before
        after.result(10)
        assert len(frames) == 3 and all(each() is None for each in frames)
    finally:
        gc.enable()
    del scoring, decoder
    gc.collect()
    for lane in ours:
        lane.join(10)
        assert not lane.is_alive()
    assert held() is None


# -- settings and limits ---------------------------------------------------------------------------------------------


def test_too_many_missing_stop_the_run_with_the_last_error() -> None:
    scoring = scoring_of(Planted(raise_error), Level(), overlap=False)
    scoring.submit(latents_of([1, 2]), PROMPTS[:2]).result()
    rewards = torch.zeros(2, 5, 4)
    rewards[0, 1, :2] = math.nan
    scoring.check_missing(rewards)  # 2 of 20 samples are 10 %, which is allowed
    rewards[1, 1, 1] = math.nan  # the same sample again
    scoring.check_missing(rewards)
    rewards[1, 3, 3] = math.nan
    words = r"15% .* lack a score \(bad of 10%, level of 10%\), more than 10%; last error: Planted: ValueError: no such"
    with pytest.raises(TrainingError, match=words) as caught:
        scoring.check_missing(rewards)
    assert "missing_limit" in caught.value.hint


def test_what_a_prompt_is_not_for_is_not_missing() -> None:
    scoring = scoring_of(Planted(raise_error), Level(), overlap=False)
    rewards = torch.zeros(2, 2, 4)
    rewards[0, 0] = math.nan
    wanted = torch.tensor([[False, True], [True, True]])
    scoring.check_missing(rewards, wanted)
    with pytest.raises(TrainingError, match=r"50% .*\(bad of 50%\).* NaN is an answer too"):
        scoring.check_missing(rewards)


def test_settings_and_axes_are_checked() -> None:
    for settings, words in (({"timeout_s": 0.0}, "timeout_s is 0"), ({"missing_limit": 1.5}, "missing_limit is 1.5")):
        with pytest.raises(ConfigError, match=words):
            ScoringConfig(**settings)
    for scorers in ([], [Level(), Level()]):
        with pytest.raises(ConfigError, match="axes are"):
            Scoring(scorers, decode, ScoringConfig())
