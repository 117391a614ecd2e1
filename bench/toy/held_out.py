"""Measures of the toy world that no training optimises: they tell a better clip from a reward that was gamed.

Two need no explanation of the clip at all and are independent of the rewards: the Frechet distance of random
convolution features (a toy FVD; it also sees a loss of variety) and the patch manifold. Flicker and the rim's
slope look at what the rewards' residual hardly weighs. Background and the hard accuracies share the rewards'
fit: they translate the rewards into plain units and are not independent evidence.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from reelforge.bench.toy.render import TOY_SPEC
from reelforge.bench.toy.template_fit import Fit, TemplateFit
from reelforge.bench.toy.verifiers import asked, beliefs
from reelforge.bench.toy.world import BACKGROUNDS, FACTORS
from reelforge.engine.core import rng
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scores

_PATCH, _PATCH_STRIDE, _PATCH_AXES = 8, 6, 40  # the stride meets grids of 8 pixels in every phase
_CHANNELS, _FEATURE_AXES = (24, 48), 24
_KERNELS = ((3, 5, 5), (3, 3, 3))
_CHUNK = 64


def _principal_axes(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors ``[D, count]`` and eigenvalues ``[count]`` of the covariance of float64 ``[N, D]``.

    LAPACK leaves an eigenvector's sign open, and it changes with the number of threads: the largest entry is
    made positive.
    """
    values, vectors = torch.linalg.eigh(torch.cov(samples.T))
    vectors = vectors[:, -count:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign(), values[-count:].flip(0)


def _patches(videos: Tensor) -> Tensor:
    """8x8 tiles, 6 apart, of every fourth frame, each channel's mean removed: float32 ``[B, N, 192]``."""
    frames = videos[:, ::4].float().div(255).movedim(-1, 2)
    tiles = frames.unfold(-2, _PATCH, _PATCH_STRIDE).unfold(-2, _PATCH, _PATCH_STRIDE)
    tiles = tiles - tiles.mean((-2, -1), keepdim=True)
    return tiles.movedim(2, 4).flatten(4).flatten(1, 3)


@dataclass(frozen=True)
class Basis:
    """What the held-out measures learnt from true clips; can travel in a file.

    Attributes:
        patch_axes: ``[192, 40]``.
        kernel_0: ``[24, 3, 3, 5, 5]`` random filters.
        kernel_1: ``[48, 24, 3, 3, 3]``.
        feature_mean: ``[96]``.
        feature_axes: ``[96, 24]`` whitening projection, so that true clips have identity covariance.
        truth_mean: ``[24]`` of clips that did not fit the projection.
        truth_covariance: ``[24, 24]``.
    """

    patch_axes: Tensor
    kernel_0: Tensor
    kernel_1: Tensor
    feature_mean: Tensor
    feature_axes: Tensor
    truth_mean: Tensor
    truth_covariance: Tensor

    @classmethod
    def of(cls, clips: Tensor, seed: int = 0) -> "Basis":
        """Learn from true clips, uint8 ``[N, F, H, W, 3]``; half fit the axes, half are the reference.

        N = 1024 leaves distances of 3.3, 1.5, 0.7 and 0.3 between 64, 128, 256 and 512 true clips and it.
        """
        half = len(clips) // 2
        shapes = zip(_CHANNELS, (3, _CHANNELS[0]), _KERNELS, strict=True)
        kernels = [
            rng.normal([rng.key("toy-features", seed, layer)], (width, fan_in, *kernel))[0]
            for layer, (width, fan_in, kernel) in enumerate(shapes)
        ]
        kernels = [k / k[0].numel() ** 0.5 for k in kernels]
        features = _features(clips, *kernels).double()
        mean = features[:half].mean(0)
        axes, values = _principal_axes(features[:half], _FEATURE_AXES)
        axes = axes / values.sqrt()
        projected = (features[half:] - mean) @ axes
        patch_axes, _ = _principal_axes(_patches(clips[:half]).flatten(0, 1).double(), _PATCH_AXES)
        tensors = (mean, axes, projected.mean(0), torch.cov(projected.T))
        return cls(patch_axes.float(), *kernels, *(t.float() for t in tensors))

    def save(self, path: Path) -> None:
        """Write safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in asdict(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> "Basis":
        """Read what :meth:`save` wrote."""
        return cls(**load_file(path))


def _features(clips: Tensor, kernel_0: Tensor, kernel_1: Tensor) -> Tensor:
    """Random two-layer video features ``[N, 96]``: mean and standard deviation of each channel over the clip."""
    rows = []
    for part in clips.split(_CHUNK):
        video = part.movedim(-1, 1).float() / 127.5 - 1
        hidden = functional.conv3d(video, kernel_0, stride=2).relu()
        hidden = functional.conv3d(hidden, kernel_1, stride=(1, 2, 2)).relu().flatten(2)
        rows.append(torch.cat((hidden.mean(-1), hidden.std(-1)), dim=1))
    return torch.cat(rows)


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017): |da|^2 + tr(A + B - 2 (A B)^1/2).

    In float64; tr (A B)^1/2 is the sum of root eigenvalues of A^1/2 B A^1/2.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return ((mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross).item()


class HeldOut:
    """The held-out measures for one clip size.

    Args:
        basis: learnt from true clips of that size.
        spec: the clip size.
    """

    def __init__(self, basis: Basis, spec: VideoSpec = TOY_SPEC) -> None:
        self.basis, self.spec = basis, spec
        self.fit = TemplateFit(spec.height, spec.width)

    def features(self, videos: Tensor) -> Tensor:
        """Whitened features of uint8 ``[N, F, H, W, 3]``, float64 ``[N, 24]``; true clips are standard normal."""
        basis = self.basis
        features = _features(videos, basis.kernel_0, basis.kernel_1).double()
        return (features - basis.feature_mean) @ basis.feature_axes.double()

    def distance(self, features: Tensor) -> float:
        """Frechet distance of a set's :meth:`features` to true clips; 0 is truth.

        Compare equal N only, and beside a truth row: the finite sample alone adds 1.5 at N = 128.
        """
        covariance = torch.cov(features.T)
        return frechet(features.mean(0), covariance, self.basis.truth_mean, self.basis.truth_covariance)

    def measure(self, videos: Tensor, prompts: Sequence[str], fit: Fit | None = None) -> dict[str, Scores]:
        """Per clip; uint8 ``[B, F, H, W, 3]`` and B prompts.

        Args:
            fit: the clips' explanation if the caller has it.

        Returns:
            ``manifold``: % of the tiles' texture outside the 40 axes of true clips (lower is better);
            ``flicker``: rms second over rms first temporal difference, missing for a still clip (lower);
            ``background``: rms error of pixels clear of the object, % of full scale (lower);
            ``rim``: difference of the slope at the object's rim from the ideal picture's, % of it (lower);
            ``accuracy_*``: 1 where the best fitting value is the named one, missing where none is named.
        """
        fit = self.fit(videos) if fit is None else fit
        pixels = videos.float() / 255
        measures = {
            "manifold": self._manifold(videos),
            "flicker": _flicker(pixels),
            "background": _background(pixels, fit),
            "rim": _rim(fit),
        }
        return {name: Scores.of(values) for name, values in measures.items()} | self._accuracy(fit, prompts)

    def _manifold(self, videos: Tensor) -> Tensor:
        patches = _patches(videos)
        kept = patches @ self.basis.patch_axes
        total = patches.square().sum((1, 2))
        return 100 * (total - kept.square().sum((1, 2))) / total

    def _accuracy(self, fit: Fit, prompts: Sequence[str]) -> dict[str, Scores]:
        found, wanted = beliefs(fit, self.spec), asked(prompts)
        return {
            f"accuracy_{name}": Scores.of((found[name].argmax(-1) == wanted[name]).float(), wanted[name] >= 0)
            for name in FACTORS
        }


def _flicker(pixels: Tensor) -> Tensor:
    """Scale free, so that contrast and speed cancel; 1.73 for independent frames (sqrt 6 / sqrt 2)."""
    first = pixels.diff(dim=1)
    return (first.diff(dim=1).square().mean((1, 2, 3, 4)) / first.square().mean((1, 2, 3, 4))).sqrt()


def _background(pixels: Tensor, fit: Fit) -> Tensor:
    near = functional.max_pool2d(fit.ideal, 5, stride=1, padding=2) > 0
    palette = torch.tensor(list(BACKGROUNDS.values()))[fit.background]
    error = (pixels - palette[:, None, None, None]).square().mean(-1).masked_fill(near, 0)
    return 100 * (error.sum((1, 2, 3)) / (~near).sum((1, 2, 3))).sqrt()


def _slope(cover: Tensor) -> Tensor:
    """Length of the central-difference gradient, without the outermost pixels."""
    y = (cover[..., 2:, 1:-1] - cover[..., :-2, 1:-1]) / 2
    x = (cover[..., 1:-1, 2:] - cover[..., 1:-1, :-2]) / 2
    return (x.square() + y.square()).sqrt()


def _rim(fit: Fit) -> Tensor:
    """Mean slopes where the ideal rim is half covered: too soft and too hard both count."""
    ideal = fit.ideal[..., 1:-1, 1:-1]
    rim = (ideal > 0.25) & (ideal < 0.75)
    seen, meant = ((_slope(cover) * rim).sum((1, 2, 3)) for cover in (fit.seen, fit.ideal))
    return 100 * (seen - meant).abs() / meant
