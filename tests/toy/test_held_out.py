"""Held-out measures against closed forms, and the calibration that licenses the rewards."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from reelforge.bench.toy.calibration import DAMAGES, known_clips, learn_basis
from reelforge.bench.toy.held_out import Basis, HeldOut, _flicker, _principal_axes, frechet
from reelforge.bench.toy.render import make_clip
from reelforge.bench.toy.verifiers import ToyVerifier
from reelforge.bench.toy.world import captions

Row = dict[str, float]


@pytest.fixture(scope="module")
def basis() -> Basis:
    return learn_basis(seed=0, count=512)


@pytest.fixture(scope="module")
def table(basis: Basis) -> dict[str, Row]:
    verifier, held_out = ToyVerifier(), HeldOut(basis)

    def row(videos: torch.Tensor, prompts: list[str]) -> Row:
        fit = verifier.fit(videos)
        scores = verifier.score_fit(fit, prompts) | held_out.measure(videos, prompts, fit)
        means = {name: score.mean() for name, score in scores.items()}
        return means | {"frechet": held_out.distance(held_out.features(videos))}

    return {name: row(videos, prompts) for name, videos, prompts in known_clips(96, seed=1)}


def _truth(count: int):
    clips = [make_clip(21, index, split="all") for index in range(count)]
    return torch.stack([torch.from_numpy(clip.frames) for clip in clips]), [captions(c.scene)[-1] for c in clips]


def test_frechet_equals_scipys_matrix_root() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(40, 6)), draw.normal(size=(40, 6)) @ draw.normal(size=(6, 6)) + 1
    moments = [(x.mean(0), np.cov(x.T)) for x in (a, b)]
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    tensors = [torch.from_numpy(part) for pair in moments for part in pair]
    assert frechet(*tensors) == pytest.approx(expected, rel=1e-8)
    assert frechet(*tensors[:2], *tensors[:2]) == pytest.approx(0, abs=1e-9)


def test_principal_axes_have_fixed_signs_and_order() -> None:
    draw = np.random.default_rng(1)
    samples = torch.from_numpy(draw.normal(size=(500, 5)) * np.array([1.0, 5.0, 2.0, 0.1, 3.0]))
    axes, values = _principal_axes(samples, 3)
    expected = np.linalg.eigvalsh(np.cov(samples.numpy().T))[::-1][:3]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    assert axes.abs().argmax(0).tolist() == [1, 4, 2]
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(_principal_axes(samples, 3)[0], axes)


def test_basis_travels_in_a_file(basis: Basis, tmp_path) -> None:
    basis.save(tmp_path / "basis.safetensors")
    videos, prompts = _truth(32)
    before, after = HeldOut(basis), HeldOut(Basis.load(tmp_path / "basis.safetensors"))
    distances = [measure.distance(measure.features(videos)) for measure in (before, after)]
    assert distances[0] == distances[1]
    for name, scores in before.measure(videos, prompts).items():
        assert torch.equal(scores.values, after.measure(videos, prompts)[name].values)


@pytest.mark.parametrize(
    "signal, ratio",
    [
        (lambda t: 0.1 + 0.01 * t, 0.0),
        (lambda t: 0.1 * (t % 2), 2.0),
        (lambda t: torch.sin(0.5 * t), 2 * math.sin(0.25)),
    ],
    ids=["ramp", "alternating", "sine"],
)
def test_flicker_closed_forms(signal, ratio: float) -> None:
    frames = signal(torch.arange(401, dtype=torch.float64)).view(1, -1, 1, 1, 1)
    assert _flicker(frames).item() == pytest.approx(ratio, abs=5e-3)
    assert _flicker(0.3 * frames).item() == pytest.approx(_flicker(frames).item(), abs=1e-9)


def test_flicker_of_a_still_clip_is_missing(basis: Basis) -> None:
    videos, prompts = _truth(2)
    measures = HeldOut(basis).measure(DAMAGES["frozen"](videos), prompts)
    assert not measures["flicker"].valid.any() and measures["manifold"].valid.all()


def test_background_reads_a_known_error(basis: Basis) -> None:
    videos, prompts = _truth(8)
    before = HeldOut(basis).measure(videos, prompts)["background"].values
    lifted = torch.where(videos < 128, videos + 8, videos - 8)
    after = HeldOut(basis).measure(lifted, prompts)["background"].values
    assert before.max() < 0.5
    torch.testing.assert_close(after, torch.full_like(after, 100 * 8 / 255), atol=0.35, rtol=0)


def test_features_of_truth_are_standard_normal(basis: Basis) -> None:
    features = HeldOut(basis).features(_truth(256)[0])
    assert features.mean(0).abs().max() < 0.4
    assert features.std(0).sub(1).abs().max() < 0.4


def test_accuracy_is_missing_where_nothing_is_named(basis: Basis) -> None:
    videos, _ = _truth(2)
    measures = HeldOut(basis).measure(videos, ["a circle", "something red"])
    assert measures["accuracy_shape"].valid.tolist() == [True, False]
    assert measures["accuracy_colour"].valid.tolist() == [False, True]
    assert not measures["accuracy_speed"].valid.any()


def test_truth_is_what_rewards_prefer(table: dict[str, Row]) -> None:
    truth = table["clean"]
    assert truth["vq"] > 3.4 and truth["mq"] > -0.1 and truth["ta"] > 0.98
    assert all(truth[name] == 1 for name in truth if name.startswith("accuracy_"))


@pytest.mark.parametrize("clips, loss", [("haze", 1.5), ("washed", 1.0), ("soft picture", 0.8), ("noise", 0.8)])
def test_bad_pictures_lose_visual_quality(table: dict[str, Row], clips: str, loss: float) -> None:
    assert table[clips]["vq"] < table["clean"]["vq"] - loss


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_checkerboards_lose_visual_quality_only(table: dict[str, Row], cell: int) -> None:
    row, truth = table[f"checkerboard {cell} px"], table["clean"]
    assert row["vq"] < truth["vq"] - 0.8
    assert row["mq"] > truth["mq"] - 0.1 and row["ta"] > truth["ta"] - 0.02
    assert row["manifold"] > 1.15 * truth["manifold"] and row["frechet"] > truth["frechet"] + 0.5
    assert row["background"] > truth["background"] + 4


@pytest.mark.parametrize("clips, loss", [("slow motion", 1.0), ("frozen", 2.0), ("jitter", 0.3)])
def test_bad_motion_loses_motion_quality_only(table: dict[str, Row], clips: str, loss: float) -> None:
    row, truth = table[clips], table["clean"]
    assert row["mq"] < truth["mq"] - loss
    assert row["vq"] == pytest.approx(truth["vq"], abs=0.05)


@pytest.mark.parametrize("clips", ["shuffled captions", "wrong words"])
def test_bad_captions_lose_text_alignment_only(table: dict[str, Row], clips: str) -> None:
    row, truth = table[clips], table["clean"]
    assert row["ta"] < truth["ta"] - 0.3
    for name in ("vq", "mq", "manifold", "flicker", "background", "rim", "frechet"):
        assert row[name] == truth[name]


def test_held_out_measures_react(table: dict[str, Row]) -> None:
    truth = table["clean"]
    for clips in ("noise", "pulsing", "jitter"):
        assert table[clips]["flicker"] > 2 * truth["flicker"]
    for clips in ("noise", "checkerboard 2 px"):
        assert table[clips]["manifold"] > 3 * truth["manifold"]
    assert table["soft picture"]["rim"] > 50 > 5 > truth["rim"]
    assert table["haze"]["background"] > 10 > 1 > truth["background"]
    for clips in ("haze", "washed", "soft picture", "web", "all flaws", "pulsing"):
        assert table[clips]["frechet"] > 3 * truth["frechet"]


def test_web_is_worse_than_curated_is_worse_than_truth(table: dict[str, Row]) -> None:
    ladder = [table[name] for name in ("all flaws", "web", "curated", "clean")]
    for axis in ("vq", "mq", "ta"):
        values = [row[axis] for row in ladder]
        assert values == sorted(values), axis
    distances = [row["frechet"] for row in ladder]
    assert distances == sorted(distances, reverse=True)
