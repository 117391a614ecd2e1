"""Takes: one noise a request, one video a text, each score against the request; and whatever has no score."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

pytest.importorskip("av")

from planted_scorers import Bright, Scorer
from tiny_model import TINY_VIDEO, make_model_folder

from reelforge.bench.toy.verifiers import ToyVerifier
from reelforge.engine.core import rng
from reelforge.engine.flow.sampler import initial_noise
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import Generator, Job, decode_uint8, resolve
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.filming import Filming, Take, rank_correlation

BALL, BOX = "a red ball going left", "blue box, right"
TAKES = [
    Take(BALL, "a red circle moving to the left", 3),
    Take(BALL, "a scarlet ball", 3),
    Take(BOX, "a blue square moving to the right", 3),
    Take(BALL, BALL, 3),
    Take(BOX, BOX, 4),
]
NAN = float("nan")
Film = Callable[..., Filming]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    root: Path = tmp_path_factory.mktemp("model") / "tiny"
    return ModelFolder.load(make_model_folder(root))


@pytest.fixture
def film(model: ModelFolder) -> Film:
    """Makes a crew: ``film(scorer, ..., batch_size=2)``."""

    def make(*scorers: object, batch_size: int = 2) -> Filming:
        generator = Generator(model, resolve(model.defaults, [f"batch_size={batch_size}", "precision=fp32"]), 11)
        scoring = Scoring(scorers, lambda x: torch.from_numpy(decode_uint8(model.codec, x)), ScoringConfig())
        return Filming(generator, scoring)

    return make


class Named(Scorer):
    """Brightness, and how long the text is that it was asked about."""

    axes = ("bright", "words")

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        words = torch.tensor([float(len(prompt.split())) for prompt in prompts])
        return {"bright": Scores.of(videos.float().mean((1, 2, 3, 4))), "words": Scores.of(words)}


class Broken(Bright):
    """Goes wrong over batches that hold the box."""

    axes = ("broken",)

    def __init__(self, how: str) -> None:
        self.how = how

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        levels = super().score(videos, prompts)["bright"]
        if BOX not in prompts:
            return {"broken": levels}
        if self.how == "raises":
            raise RuntimeError("no box, please")
        return {"broken": Scores(levels.values[:-1])}


def seen_by(filming: Filming) -> list[Job]:
    """Every job that the generator is given."""
    jobs, real = [], filming.generator.latents

    def latents(batch: Sequence[Job]) -> Tensor:
        jobs.extend(batch)
        return real(batch)

    filming.generator.latents = latents
    return jobs


def test_a_reward_is_the_scorers_of_the_video_against_the_request(film, model):
    filming, scorer = film(ToyVerifier(TINY_VIDEO), Named(TINY_VIDEO), batch_size=8), ToyVerifier(TINY_VIDEO)
    rewards = filming(TAKES)
    assert rewards.shape == (5, 5) and rewards.dtype == torch.float64
    for place, take in enumerate(TAKES):
        latents = filming.generator.latents([Job(take.prompt, take.noise, take.request)])
        video = torch.from_numpy(decode_uint8(model.codec, latents))
        alone = torch.cat([scorer.score(video, [take.request])[axis].values for axis in scorer.axes])
        torch.testing.assert_close(rewards[:3, place].float(), alone, rtol=1e-4, atol=1e-4)
        assert rewards[4, place] == len(take.request.split())


def test_the_same_words_are_filmed_once(film):
    """And get the same rewards to the last bit, wherever they stand; the request itself is words, too."""
    filming = film(ToyVerifier(TINY_VIDEO), Bright(TINY_VIDEO))
    jobs, order = seen_by(filming), [0, 3, 0, 1, 2, 3, 0, 4, 2]
    rewards = filming([TAKES[place] for place in order])
    assert filming.made == len(jobs) == len(set(jobs)) == 5
    for place in set(order):
        same = rewards[:, [n for n, other in enumerate(order) if other == place]]
        assert torch.equal(same, same[:, :1].expand_as(same))
    again = filming([Take(BOX, TAKES[0].prompt, 3), Take(BALL, TAKES[0].prompt, 4), TAKES[0]])
    assert filming.made == 8, "another request's, or another noise, is another video"
    assert again.shape == (4, 3) and filming.seconds > 0


def test_takes_of_a_request_share_its_noise(film, monkeypatch):
    """Whatever the words: the noise that ``generate`` gives the request itself; another request has another."""
    drawn = []

    def noise(seed: int, ids: Sequence[int], members: Sequence[int], *others: object, **named: object) -> Tensor:
        found = initial_noise(seed, ids, members, *others, **named)
        drawn.extend(zip(ids, members, found, strict=True))
        return found

    monkeypatch.setattr("reelforge.engine.model.generator.initial_noise", noise)
    filming = film(Bright(TINY_VIDEO))
    filming(TAKES)
    filming.generator.latents([Job(BALL, 3)])
    ids, members, noises = zip(*drawn, strict=True)
    ball, box = rng.key("prompt:" + BALL), rng.key("prompt:" + BOX)
    assert ids == (ball, ball, box, ball, box, ball) and members == (3, 3, 3, 3, 4, 3)
    assert all(torch.equal(noises[0], noises[place]) for place in (1, 3, 5))
    assert not torch.equal(noises[0], noises[2]) and not torch.equal(noises[2], noises[4])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_the_batch_split_is_rounding(film, batch_size):
    scorers = (ToyVerifier(TINY_VIDEO), Bright(TINY_VIDEO))
    ours, theirs = film(*scorers, batch_size=batch_size)(TAKES), film(*scorers)(TAKES)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[3].std() > 1e-3, "videos differ"


@pytest.mark.parametrize("rubbish", [NAN, float("inf")])
@pytest.mark.parametrize("broken", range(5))
def test_a_video_that_is_not_finite_has_no_rewards(film, broken, rubbish):
    """It alone; no scorer sees it."""
    clean = film(ToyVerifier(TINY_VIDEO), Bright(TINY_VIDEO))(TAKES)
    filming = film(ToyVerifier(TINY_VIDEO), Bright(TINY_VIDEO))
    real, decode, finite = filming.generator.latents, filming.scoring.decode, []

    def latents(jobs: Sequence[Job]) -> Tensor:
        found = real(jobs)
        for row, job in zip(found, jobs, strict=True):
            if job == Job(TAKES[broken].prompt, TAKES[broken].noise, TAKES[broken].request):
                row[1, 0, 2, 1] = rubbish
        return found

    filming.generator.latents = latents
    filming.scoring.decode = lambda x: finite.append(x.isfinite().all().item()) or decode(x)
    rewards, others = filming(TAKES), [place for place in range(5) if place != broken]
    assert rewards[:, broken].isnan().all() and torch.equal(rewards[:, others], clean[:, others])
    assert finite == [True] * 3


@pytest.mark.parametrize("how", ["raises", "is short"])
def test_a_scorer_that_fails_costs_its_scores_of_the_batch(film, how):
    """Of the two batches with a box; the other scorer's are all there."""
    filming = film(Bright(TINY_VIDEO), Broken(how))
    rewards = filming(TAKES)
    assert rewards[0].isfinite().all()
    assert rewards[1].isnan().tolist() == [False, False, True, True, True]
    words = {"raises": "Broken: RuntimeError: no box, please", "is short": "Broken: answered 0 scores of broken"}
    assert words[how] in filming.scoring.last_error


# --- do two generators rank alike ---


def test_rank_correlation_is_scipys_over_what_both_have():
    draw = torch.Generator().manual_seed(5)
    here = torch.randn(3, 20, generator=draw, dtype=torch.float64)
    there = here + torch.randn(3, 20, generator=draw, dtype=torch.float64)
    there[1] = there[1].round()  # ties
    here[0, 4] = there[0, 9] = here[2, 0] = there[2, 0] = NAN
    kept = [[n for n in range(20) if n not in gone] for gone in ((4, 9), (), (0,))]
    by_scipy = [spearmanr(here[r, k], there[r, k]).statistic for r, k in enumerate(kept)]
    assert rank_correlation(here, there) == pytest.approx(sum(by_scipy) / 3, abs=1e-12)
    assert 0.2 < rank_correlation(here, there) < 0.95


def test_rank_correlation_of_the_same_and_of_the_opposite():
    rewards = torch.tensor([[3.0, 1.0, NAN, 2.0], [0.1, 0.3, 0.2, NAN]])
    assert rank_correlation(rewards, rewards.exp()) == pytest.approx(1)
    assert rank_correlation(rewards, -rewards) == pytest.approx(-1)


@pytest.mark.parametrize(
    "row",
    [[0.5, 0.5, 0.5, 0.5], [NAN, NAN, NAN, NAN], [1.0, NAN, NAN, NAN], [NAN, 2.0, 2.0, 2.0], [NAN, NAN, NAN, 1.0]],
    ids=str,
)
def test_a_reward_without_ranks_counts_as_none(row):
    """Beside one that agrees: half a correlation, and never a NaN that no limit holds back."""
    varied = [1.0, 2.0, 3.0, NAN]
    here, there = torch.tensor([varied, row]), torch.tensor([varied, varied])
    assert rank_correlation(here, there) == rank_correlation(there, here) == pytest.approx(0.5)
