"""Fits the miniature's codec to clips, in closed form: principal components, then least squares."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reelforge.engine.core import rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.progress import track
from reelforge.engine.model.codec import PAST_FRAMES, CodecConfig, ReelforgeCodec, pad_causal

_SAMPLE = 512  # clips looked at: 160,000 blocks of the miniature
_SLICE = 32  # clips at a time, bounds memory
_RIDGE = 1e-6  # of the mean square; settles what plain clips and no noise leave open


def fit(config: CodecConfig, clips: np.ndarray, seed: int) -> ReelforgeCodec:
    """Make a codec for a kind of clip; equal arguments give equal bits on one machine and number of threads.

    Save it with what was trained on its latents: on another machine, or with other threads, components of nearly
    equal variance turn into each other and change sign.

    Args:
        config: shape, and what decoding has to bear.
        clips: uint8 ``[N,F,H,W,3]``; at most 512, evenly spaced, are looked at.
        seed: of the latent noise.

    Raises:
        DataError: too little variety for the components, or a clip that the strides do not divide.
    """
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    slices = videos[:: -(-len(videos) // _SAMPLE)].split(_SLICE)
    codec = ReelforgeCodec(config).requires_grad_(False).eval()
    _fit_analysis(codec, slices)
    _fit_synthesis(codec, slices, seed)
    return codec


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _moments(left: Tensor, right: Tensor) -> Tensor:
    """Sum of outer products over all but the last dimension, float64."""
    return (left.flatten(0, -2).T @ right.flatten(0, -2)).double()


def _rows(blocks: Tensor) -> Tensor:
    """``[B,P,T,H,W]`` to ``[B,H,W,T,P]``."""
    return blocks.permute(0, 3, 4, 2, 1)


def _fit_analysis(codec: ReelforgeCodec, slices: tuple[Tensor, ...]) -> None:
    """Principal components of the blocks, each with its largest weight positive, and the latents' statistics."""
    config = codec.config
    size = config.block_values + 1
    total = torch.zeros(size, size, dtype=torch.float64)
    for part in slices:
        rows = functional.pad(_rows(_unit(codec.to_blocks(part))), (0, 1), value=1.0)
        total += _moments(rows, rows)
    mean = total[:-1, -1] / total[-1, -1]
    variances, axes = torch.linalg.eigh(total[:-1, :-1] / total[-1, -1] - mean[:, None] * mean)
    variances, basis = variances.flip(0)[: config.latent_channels], axes.T.flip(0)[: config.latent_channels]
    if variances[-1] <= 1e-9 * variances[0]:
        what = f"The clips' blocks vary along fewer than {config.latent_channels} directions."
        raise DataError(what, "Fit on more varied clips, or lower latent_channels.")
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    scale = variances ** (config.whitening / 2)
    scale = scale * (variances / scale**2).mean().sqrt()
    codec.basis.copy_(basis)
    codec.latents_mean.copy_((basis @ mean).view(-1, 1, 1, 1))
    codec.latents_std.copy_(scale.view(-1, 1, 1, 1))


def _fit_synthesis(codec: ReelforgeCodec, slices: tuple[Tensor, ...], seed: int) -> None:
    """Weights W that minimise, over noisy latents, |error|^2 + pulse_weight |error(frame + 1) - error(frame)|^2.

    Pixels do not interact, the frames of a latent frame do: with n the latents around a block, the unknowns of a
    pixel are ``[temporal_stride, len(n)]``, and all pixels share one normal matrix.
    """
    config = codec.config
    stride, pixels = config.temporal_stride, config.block_values // config.temporal_stride
    size = 9 * (1 + PAST_FRAMES) * config.latent_channels + 1
    gram, cross = (torch.zeros(size, columns, dtype=torch.float64) for columns in (size, stride * pixels))
    jump_gram, jump_cross = (torch.zeros(2 * size, columns, dtype=torch.float64) for columns in (2 * size, pixels))
    for index, part in enumerate(track(slices, "fitting the codec", total=len(slices))):
        video = _unit(part)
        near = _neighbourhoods(_add_noise(codec.encode(video), config.latent_noise, seed, index))
        target = _rows(codec.to_blocks(video))
        gram += _moments(near, near)
        cross += _moments(near, target)
        # From the last frame of a latent frame to the first of the next.
        jump = torch.cat((near[..., 1:, :], -near[..., :-1, :]), -1)
        jump_gram += _moments(jump, jump)
        jump_cross += _moments(jump, target[..., 1:, :pixels] - target[..., :-1, -pixels:])
    weights = _solve(config, gram, cross, jump_gram, jump_cross)
    codec.synthesis.weight.copy_(weights[:, :-1].view_as(codec.synthesis.weight))
    codec.synthesis.bias.copy_(weights[:, -1])  # type: ignore[union-attr]


def _solve(config: CodecConfig, gram: Tensor, cross: Tensor, jump_gram: Tensor, jump_cross: Tensor) -> Tensor:
    """The normal equations' solution ``[block_values, len(n)]``."""
    stride, size, pixels = config.temporal_stride, len(gram), jump_cross.shape[1]
    steps = torch.eye(stride, dtype=torch.float64).diff(dim=0)
    within = torch.eye(stride, dtype=torch.float64) + config.pulse_weight * steps.T @ steps
    normal = torch.kron(within, gram).view(stride, size, stride, size)
    right = torch.einsum("ij,njp->inp", within, cross.view(size, stride, pixels))
    ends = (0, slice(None, size)), (stride - 1, slice(size, None))
    for row, half in ends:
        right[row] += config.pulse_weight * jump_cross[half]
        for column, other in ends:
            normal[row, :, column] += config.pulse_weight * jump_gram[half, other]
    normal = normal.reshape(stride * size, stride * size)
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean())
    weights = torch.linalg.solve(normal, right.reshape(stride * size, pixels)).view(stride, size, pixels)
    return weights.permute(0, 2, 1).reshape(config.block_values, size)


def _neighbourhoods(latents: Tensor) -> Tensor:
    """What the convolution sees at each position, and a one for its bias: ``[B,H,W,T,n]``."""
    near = pad_causal(latents).unfold(2, 1 + PAST_FRAMES, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    return functional.pad(near.permute(0, 3, 4, 2, 1, 5, 6, 7).flatten(4), (0, 1), value=1.0)


def _add_noise(latents: Tensor, peak: float, seed: int, index: int) -> Tensor:
    draw = rng.generator("codec.noise", seed, index)
    level = peak * draw.random((len(latents), 1, 1, 1, 1), dtype=np.float32)
    return latents + torch.from_numpy(level * draw.standard_normal(latents.shape, dtype=np.float32))
