"""The toy world's rewards, which training optimises: visual quality, motion quality, text alignment.

All three read the same whole-frame fit, so one pass over the pixels serves three axes.
    vq = -log10(mse + 3e-4)                   mse to the ideal picture on its plain background; 1.0 is 10 dB;
                                              3.5 at most, 1.7 hazy; every pixel counts, so texture has no refuge
    mq = -gap / 0.15 - wobble                 gap: reference px/frame outside the world's speeds; wobble: rms
                                              distance from straight uniform motion + rms size change (px); >= -4
    ta = mean of p over the factors named     p in [0, 1]: softmax of fit errors for shape, colour, background;
                                              (1 + cos) / 2 for motion; a bell round the asked speed
``vq`` and ``mq`` never look at the prompt; ``ta`` is missing for a prompt that names no factor.
Reference pixels and frames are those of a 32-pixel, 17-frame clip.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reelforge.bench.toy.render import REFERENCE_SIDE, TOY_SPEC
from reelforge.bench.toy.template_fit import Fit, TemplateFit
from reelforge.bench.toy.world import FACTORS, MOTIONS, SPEEDS, parse_prompt
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scores

_MSE_FLOOR = 3e-4
_MQ_FLOOR = -4.0
_INTERVALS = TOY_SPEC.num_frames - 1
SPEED_PX = torch.tensor([SPEEDS[name] * REFERENCE_SIDE / _INTERVALS for name in FACTORS["speed"]])
_SPEED_SLACK, _GAP_UNIT, _SPEED_WIDTH = 0.05, 0.15, 0.2  # reference px/frame
_MOTION_FLOOR = 0.2  # a slower object has a direction only in part
# Errors that cost a factor e in odds. Colour and background are squared pixel errors, shape is per object pixel.
_TEMPERATURE = {"shape": 0.02, "colour": 0.002, "background": 0.004}
_DIRECTIONS = torch.tensor([MOTIONS[name] for name in FACTORS["motion"]], dtype=torch.float32)


def reference_velocity(fit: Fit, spec: VideoSpec) -> tuple[Tensor, Tensor]:
    """Velocity ``[B, 2]`` in reference px/frame and the path's rms unevenness ``[B]`` in reference px."""
    scale = min(spec.height, spec.width) / REFERENCE_SIDE
    velocity, unevenness = fit.velocity()
    return velocity / scale * ((spec.num_frames - 1) / _INTERVALS), unevenness / scale


def beliefs(fit: Fit, spec: VideoSpec) -> dict[str, Tensor]:
    """Per factor, ``[B, values]`` in [0, 1]: how well the clip fits each value of :data:`FACTORS`."""
    velocity, _ = reference_velocity(fit, spec)
    speed = velocity.norm(dim=-1)
    errors = {"shape": fit.shape_error, "colour": fit.colour_error, "background": fit.background_error}
    found = {name: torch.softmax(-error / _TEMPERATURE[name], -1) for name, error in errors.items()}
    heading = velocity / speed.clamp_min(_MOTION_FLOOR)[:, None]
    found["motion"] = (1 + heading @ _DIRECTIONS.T) / 2
    found["speed"] = torch.exp(-0.5 * ((speed[:, None] - SPEED_PX) / _SPEED_WIDTH) ** 2)
    return found


def asked(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Per factor, long ``[B]``: index of the value that each prompt names, -1 for none."""
    named = [parse_prompt(prompt) for prompt in prompts]
    return {
        factor: torch.tensor([values.index(found[factor]) if factor in found else -1 for found in named])
        for factor, values in FACTORS.items()
    }


class ToyVerifier:
    """A :class:`~reelforge.engine.rewards.contract.Scorer` on the axes ``vq``, ``mq`` and ``ta``."""

    axes: tuple[str, ...] = ("vq", "mq", "ta")

    def __init__(self, spec: VideoSpec = TOY_SPEC) -> None:
        self.spec = spec
        self.fit = TemplateFit(spec.height, spec.width)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """Score uint8 ``[B, F, H, W, 3]`` against B prompts."""
        return self.score_fit(self.fit(videos), prompts)

    def score_fit(self, fit: Fit, prompts: Sequence[str]) -> dict[str, Scores]:
        """The same from a fit that is already there."""
        vq = -torch.log10(fit.error + _MSE_FLOOR)
        return {"vq": Scores.of(vq), "mq": Scores.of(self._motion(fit)), "ta": self._text(fit, prompts)}

    def _motion(self, fit: Fit) -> Tensor:
        velocity, unevenness = reference_velocity(fit, self.spec)
        speed = velocity.norm(dim=-1)
        gap = torch.maximum(SPEED_PX[0] - speed, speed - SPEED_PX[-1]) - _SPEED_SLACK
        wobble = unevenness + fit.size_wobble / self.fit.scale
        return (-gap.clamp_min(0) / _GAP_UNIT - wobble).clamp_min(_MQ_FLOOR)

    def _text(self, fit: Fit, prompts: Sequence[str]) -> Scores:
        found, wanted = beliefs(fit, self.spec), asked(prompts)
        rows = torch.arange(len(prompts))
        kept = torch.stack([found[name][rows, wanted[name]] for name in FACTORS])
        named = torch.stack([wanted[name] >= 0 for name in FACTORS])
        return Scores.of((kept * named).sum(0) / named.sum(0))
