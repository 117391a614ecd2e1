"""The held-out scorer: truth is where it belongs, damage costs its axes, and blur wins nothing by lacking texture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from reelforge.bench.toy import calibration, codec_fit
from reelforge.bench.toy.calibration import DAMAGES
from reelforge.bench.toy.render import CLEAN, TOY_SPEC, make_clip
from reelforge.bench.toy.scorer import ToyHeldOut
from reelforge.bench.toy.world import captions
from reelforge.engine.model.codec import CodecConfig
from reelforge.engine.model.generator import decode_uint8
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig

AXES = ("texture", "steadiness", "typicality", "background", "rim")


@pytest.fixture(scope="module")
def clips() -> tuple[Tensor, list[str]]:
    made = [make_clip(77, index, CLEAN, "all") for index in range(48)]
    return torch.stack([torch.from_numpy(clip.frames) for clip in made]), [captions(clip.scene)[-1] for clip in made]


@pytest.fixture(scope="module")
def scorer() -> ToyHeldOut:
    return ToyHeldOut(TOY_SPEC)


def means(scorer: ToyHeldOut, videos: Tensor, prompts: list[str]) -> dict[str, float]:
    return {axis: scores.mean() for axis, scores in scorer.score(videos, prompts).items()}


def blurred(videos: Tensor) -> Tensor:
    planes = videos.flatten(0, 1).movedim(-1, 1).float()
    soft = functional.avg_pool2d(functional.pad(planes, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return soft.round().byte().movedim(1, -1).reshape(videos.shape)


def tinted(videos: Tensor) -> Tensor:
    return (videos.float() * 0.8 + torch.linspace(0, 50, 32)[:, None]).round().byte()


def test_truth_is_where_it_was_calibrated(scorer: ToyHeldOut, clips: tuple[Tensor, list[str]]) -> None:
    """Other true clips than those of the basis and of the truth's means."""
    truth = means(scorer, *clips)
    assert scorer.axes == AXES == tuple(truth)
    assert truth["typicality"] == pytest.approx(-1, abs=0.15)
    assert truth["texture"] > -1.5 and truth["steadiness"] > -0.25
    assert truth["background"] > -0.3 and truth["rim"] > -1


@pytest.mark.parametrize(
    ("damage", "axes"),
    [
        (DAMAGES["noise"], ("texture", "steadiness", "background")),
        (DAMAGES["pulsing"], ("steadiness", "typicality", "background")),
        (DAMAGES["jitter"], ("steadiness",)),
        (DAMAGES["checkerboard 2 px"], ("texture", "typicality", "background", "rim")),
        (DAMAGES["checkerboard 8 px"], ("texture", "background")),
        (blurred, ("texture", "steadiness", "rim")),  # less texture and flicker than the truth: no gain
        (tinted, ("background", "rim")),
    ],
    ids=["noise", "pulsing", "jitter", "fine grid", "coarse grid", "blur", "tint"],
)
def test_each_damage_costs_its_axes(
    scorer: ToyHeldOut, clips: tuple[Tensor, list[str]], damage: Callable[[Tensor], Tensor], axes: tuple[str, ...]
) -> None:
    truth, found = scorer.score(*clips), scorer.score(damage(clips[0]), clips[1])
    for axis in axes:
        loss = (truth[axis].values - found[axis].values).double()
        assert loss.mean() > 5 * loss.std() / len(loss) ** 0.5, axis


def test_a_still_clip_has_no_steadiness(scorer: ToyHeldOut, clips: tuple[Tensor, list[str]]) -> None:
    found = scorer.score(DAMAGES["frozen"](clips[0][:3]), clips[1][:3])
    assert not found["steadiness"].valid.any() and found["typicality"].valid.all()


def test_truth_can_be_seen_through_a_codec(tmp_path: Path, clips: tuple[Tensor, list[str]], scorer: ToyHeldOut) -> None:
    """What the codec takes away is nobody's fault: its best is then the best there is."""
    codec = codec_fit.fit(CodecConfig(), np.stack([make_clip(3, i, CLEAN, "all").frames for i in range(64)]), 0)
    codec.save(tmp_path / "vae")
    videos, prompts = clips
    shown = torch.from_numpy(decode_uint8(codec, codec.encode(videos.movedim(-1, 1).float() / 127.5 - 1)))
    seen = ToyHeldOut(TOY_SPEC, str(tmp_path))
    best, rendered = means(seen, shown, prompts), means(seen, videos, prompts)
    for axis in ("texture", "steadiness"):
        assert best[axis] > rendered[axis] and best[axis] > means(scorer, shown, prompts)[axis]
    assert scorer.texture > 2 * seen.texture > 0  # measured: 3.7 against 1.2


def test_the_basis_is_learnt_once_a_process(scorer: ToyHeldOut, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "learn_basis", None)
    assert ToyHeldOut(TOY_SPEC).held_out is scorer.held_out


def test_it_keeps_the_contract_under_scoring(scorer: ToyHeldOut, clips: tuple[Tensor, list[str]]) -> None:
    """Alone and in a batch alike, or the run would stop."""
    videos, prompts = clips[0][:6], clips[1][:6]
    scoring = Scoring([scorer], lambda latents: videos, ScoringConfig())
    scores = scoring.submit(torch.zeros(6), prompts).result()
    assert all(scores[axis].valid.all() for axis in AXES) and scoring.last_error == ""
