"""The template fit against brute force and the renderer's own paths, and what the rewards look at."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from reelforge.bench.toy.render import CLEAN, TOY_SPEC, FlawRates, make_clip, path
from reelforge.bench.toy.template_fit import TemplateFit, _vertex
from reelforge.bench.toy.verifiers import ToyVerifier, asked, beliefs, reference_velocity
from reelforge.bench.toy.world import BACKGROUNDS, COLOURS, FACTORS, captions
from reelforge.engine.core import rng
from reelforge.engine.core.types import VideoSpec

WIDE = VideoSpec(num_frames=9, height=40, width=56, fps=8.0)


def _clips(count: int, spec: VideoSpec = TOY_SPEC, rates: FlawRates = CLEAN, seed: int = 11):
    clips = [make_clip(seed, index, rates, "all", spec) for index in range(count)]
    return torch.stack([torch.from_numpy(clip.frames) for clip in clips]), [clip.scene for clip in clips]


@pytest.fixture(scope="module")
def verifier() -> ToyVerifier:
    return ToyVerifier()


@pytest.mark.parametrize("rates", [FlawRates(), FlawRates(haze=1.0, washed=1.0)], ids=["clean", "hazy"])
def test_errors_equal_brute_force(rates: FlawRates) -> None:
    videos, _ = _clips(6, rates=rates)
    fit = TemplateFit(32, 32)(videos)
    pixels = videos.double() / 255
    backgrounds = torch.tensor(list(BACKGROUNDS.values())).double()
    colours = torch.tensor(list(COLOURS.values())).double()

    def brute(background: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        background, colour = background[:, None, None, None], colour[:, None, None, None]
        ideal = background + fit.ideal.double()[..., None] * (colour - background)
        return (pixels - ideal).square().mean((1, 2, 3, 4)).float()

    torch.testing.assert_close(brute(backgrounds[fit.background], colours[fit.colour]), fit.error, atol=2e-6, rtol=1e-4)
    for index in range(len(COLOURS)):
        other = brute(backgrounds[fit.background], colours[index].expand(6, 3))
        torch.testing.assert_close(other, fit.colour_error[:, index], atol=2e-6, rtol=1e-4)
    for index in range(len(BACKGROUNDS)):
        other = brute(backgrounds[index].expand(6, 3), colours[fit.colour])
        torch.testing.assert_close(other, fit.background_error[:, index], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("spec", [TOY_SPEC, WIDE], ids=["toy", "wide"])
def test_fit_finds_the_rendered_path(spec: VideoSpec) -> None:
    videos, scenes = _clips(144, spec)
    verifier = ToyVerifier(spec)
    fit = verifier.fit(videos)
    found, wanted = beliefs(fit, spec), asked([captions(scene)[-1] for scene in scenes])
    for factor in FACTORS:
        assert torch.equal(found[factor].argmax(-1), wanted[factor]), factor
    for index, scene in enumerate(scenes):
        radius, centres = path(scene, spec, rng.generator("toy", 11, index))
        assert (fit.centres[index] - centres).norm(dim=-1).max() < 0.4 * verifier.fit.scale
        assert abs(fit.radius[index].item() - radius) < 0.25 * verifier.fit.scale
    velocity, unevenness = reference_velocity(fit, spec)
    assert unevenness.max() < 0.2
    speed = velocity.norm(dim=-1)
    assert speed[wanted["speed"] == 0].sub(0.4).abs().max() < 0.04
    assert speed[wanted["speed"] == 1].sub(0.8).abs().max() < 0.07


def test_vertex_is_the_parabolas() -> None:
    x = torch.arange(7).float()
    for peak in (1.2, 2.5, 3.0, 4.7):
        values = -((x - peak) ** 2)
        assert _vertex(values, values.argmax()) == pytest.approx(peak, abs=1e-5)
    assert _vertex(x, torch.tensor(6)) == 6.0


def test_a_clip_scores_the_same_alone(verifier: ToyVerifier) -> None:
    videos, scenes = _clips(24, rates=FlawRates(haze=0.5, blur=0.5))
    prompts = [captions(scene)[-1] for scene in scenes]
    together = verifier.score(videos, prompts)
    for index in (0, 7, 23):
        alone = verifier.score(videos[index : index + 1], prompts[index : index + 1])
        for axis in verifier.axes:
            spread = together[axis].values.std()
            assert (alone[axis].values[0] - together[axis].values[index]).abs() < 1e-3 * spread


def test_prompt_moves_text_alone(verifier: ToyVerifier) -> None:
    videos, scenes = _clips(32)
    prompts = [captions(scene)[-1] for scene in scenes]
    right, wrong = verifier.score(videos, prompts), verifier.score(videos, prompts[1:] + prompts[:1])
    assert torch.equal(right["vq"].values, wrong["vq"].values)
    assert torch.equal(right["mq"].values, wrong["mq"].values)
    assert right["ta"].values.min() > 0.95
    assert (right["ta"].values > wrong["ta"].values + 0.1).all()


@pytest.mark.parametrize("factor", FACTORS)
def test_one_wrong_word_costs_its_share(verifier: ToyVerifier, factor: str) -> None:
    videos, scenes = _clips(24)
    others = [replace(s, **{factor: next(v for v in FACTORS[factor] if v != getattr(s, factor))}) for s in scenes]
    right = verifier.score(videos, [captions(scene)[-1] for scene in scenes])["ta"].values
    wrong = verifier.score(videos, [captions(scene)[-1] for scene in others])["ta"].values
    loss = right - wrong
    assert loss.min() > 0.08 and loss.max() <= 0.2 + 1e-6


def test_a_short_prompt_promises_nothing_about_speed(verifier: ToyVerifier) -> None:
    videos, scenes = _clips(16)
    hurried = [replace(scene, speed={"slow": "fast", "fast": "slow"}[scene.speed]) for scene in scenes]
    for caption in (0, 1):
        same = [verifier.score(videos, [captions(s)[caption] for s in group])["ta"] for group in (scenes, hurried)]
        assert torch.equal(same[0].values, same[1].values)
    named = beliefs(verifier.fit(videos), TOY_SPEC)
    wanted = asked([captions(scene)[0] for scene in scenes])
    assert wanted["speed"].eq(-1).all() and wanted["background"].eq(-1).all()
    rows = torch.arange(16)
    mean = sum(named[name][rows, wanted[name]] for name in ("shape", "colour", "motion")) / 3
    short = verifier.score(videos, [captions(scene)[0] for scene in scenes])["ta"].values
    torch.testing.assert_close(short, mean)


def test_a_prompt_without_factors_has_no_text_score(verifier: ToyVerifier) -> None:
    videos, _ = _clips(2)
    scores = verifier.score(videos, ["a quiet afternoon", "a circle"])
    assert scores["ta"].valid.tolist() == [False, True]
    assert scores["vq"].valid.all() and scores["mq"].valid.all()


def test_degenerate_clips_score_low_and_finite(verifier: ToyVerifier) -> None:
    grid = np.random.default_rng(0).integers(0, 256, (1, 17, 32, 32, 3), dtype=np.uint8)
    videos = torch.cat([torch.zeros_like(torch.from_numpy(grid)), torch.from_numpy(grid), _clips(1)[0]])
    scores = verifier.score(videos, ["a red circle moving left"] * 3)
    assert all(scores[axis].valid.all() for axis in verifier.axes)
    assert scores["vq"].values.argmax() == 2 and scores["mq"].values.argmax() == 2
    assert scores["mq"].values.min() >= -4


def test_text_score_names_agree_with_scene() -> None:
    _, scenes = _clips(8)
    wanted = asked([captions(scene)[-1] for scene in scenes])
    for index, scene in enumerate(scenes):
        assert {f: FACTORS[f][wanted[f][index]] for f in FACTORS} == asdict(scene)
