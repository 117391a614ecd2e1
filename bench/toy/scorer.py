"""The toy world's held-out measures as a scorer: watched while training optimises something else, never trained on."""

import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from reelforge.bench.toy import calibration
from reelforge.bench.toy.held_out import HeldOut
from reelforge.engine.core import rng
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.model.folder import load_codec
from reelforge.engine.model.generator import through_codec
from reelforge.engine.rewards.contract import Scores

_SEED = rng.key("toy_held_out")  # other true clips than a report's: what stops a run does not judge it
_TRUE_CLIPS = 128


class ToyHeldOut:
    """A :class:`~reelforge.engine.rewards.contract.Scorer` whose axes are higher for better clips, 0 at most.

        texture      -|manifold - truth|     % of the tiles' texture that no true clip has
        steadiness   -|flicker - truth|      second over first temporal difference; missing for a still clip
        typicality   -strangeness            mean square of the whitened random features; -1 for a typical true clip
        background   -background             rms error clear of the object, % of full scale
        rim          -rim                    error of the slope at the object's rim, %

    Too little texture or flicker counts as too much does: a blurred clip has less of both than the truth. The first
    three know nothing of the rewards; background and rim share the rewards' fit, so that they fall when a clip got
    worse in a way that the rewards should have seen.

    Args:
        video: the clip size.
        model: model folder through whose codec the truth is seen, so that what the codec cannot show counts for
            nothing; empty compares with the truth as it was rendered.
    """

    axes = ("texture", "steadiness", "typicality", "background", "rim")

    def __init__(self, video: VideoSpec, model: str = "") -> None:
        self.held_out, self.texture, self.flicker = _calibrated(video, model)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """Score uint8 ``[B, F, H, W, 3]``; the prompts do not count."""
        measured = self.held_out.measure(videos, prompts)
        return {
            "texture": Scores.of(-(measured["manifold"].values - self.texture).abs()),
            "steadiness": Scores.of(-(measured["flicker"].values - self.flicker).abs()),
            "typicality": Scores.of(-self.held_out.features(videos).square().mean(1)),
            "background": Scores.of(-measured["background"].values),
            "rim": Scores.of(-measured["rim"].values),
        }


@functools.cache
def _calibrated(video: VideoSpec, model: str) -> tuple[HeldOut, float, float]:
    """The measures, and the truth's mean manifold and flicker; takes seconds, so once a process."""
    codec = load_codec(Path(model).expanduser()) if model else None
    held_out = HeldOut(calibration.learn_basis(_SEED, spec=video), video)
    _, truth, prompts = next(calibration.known_clips(_TRUE_CLIPS, rng.key("truth", _SEED), video))
    if codec is not None:
        truth = through_codec(codec, truth)
    measured = held_out.measure(truth, prompts)
    return held_out, measured["manifold"].mean(), measured["flicker"].mean()
