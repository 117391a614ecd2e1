"""Fits the miniature's codec to clips: the analysis in closed form, the decoder by gradient descent."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.hardware import has_bf16_instructions
from reelforge.engine.core.progress import track
from reelforge.engine.model.codec import CodecConfig, ReelforgeCodec

_ANALYSIS_CLIPS = 512  # blocks enough for 16 components; more move the axes by noise
_SLICE = 64
_WARMUP_STEPS = 30
_BETAS = (0.9, 0.98)
_GRAD_CLIP = 1.0


def fit(config: CodecConfig, clips: np.ndarray, seed: int) -> ReelforgeCodec:
    """Make a codec for a kind of clip; equal arguments give equal bits on one machine and number of threads.

    Save it with what was trained on its latents: on another machine, or with other threads, components of nearly
    equal variance turn into each other and change sign.

    Args:
        config: shape and optimiser.
        clips: uint8 ``[N,F,H,W,3]``; the more motions and backgrounds, the better it carries over to unseen clips.
        seed: of the decoder's initialisation, the batches and the latent noise.

    Raises:
        DataError: too few values for the components, or a clip that the strides do not divide.
    """
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    codec = ReelforgeCodec(config)
    _fit_analysis(codec, videos[:: -(-len(videos) // _ANALYSIS_CLIPS)])
    _initialise(codec.decoder, seed)
    codec.decoder.to(memory_format=torch.channels_last_3d)
    _fit_linear(codec, videos[:: -(-len(videos) // _ANALYSIS_CLIPS)])
    _train_decoder(codec, videos, seed)
    codec.decoder.to(memory_format=torch.contiguous_format)
    return codec.eval().requires_grad_(False)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _fit_analysis(codec: ReelforgeCodec, videos: Tensor) -> None:
    """Principal components of the blocks, each with its largest weight positive, and the latents' statistics."""
    config = codec.config
    count, total = 0, torch.zeros(config.block_values, dtype=torch.float64)
    second = torch.zeros(config.block_values, config.block_values, dtype=torch.float64)
    for part in videos.split(_SLICE):
        rows = _unit(codec.to_blocks(part)).movedim(1, -1).flatten(0, -2)
        count, total, second = count + len(rows), total + rows.sum(0), second + rows.T @ rows
    mean = total / count
    variances, axes = torch.linalg.eigh(second / count - mean[:, None] * mean)
    variances, basis = variances.flip(0)[: config.latent_channels], axes.T.flip(0)[: config.latent_channels]
    if variances[-1] <= 1e-9 * variances[0]:
        what = f"The clips' blocks vary along fewer than {config.latent_channels} directions."
        raise DataError(what, "Fit on more varied clips, or lower latent_channels.")
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = basis * largest.sign()
    scale = variances ** (config.whitening / 2)
    scale = scale * (variances / scale**2).mean().sqrt()
    codec.basis.copy_(basis)
    codec.latents_mean.copy_((basis @ mean).view(-1, 1, 1, 1))
    codec.latents_std.copy_(scale.view(-1, 1, 1, 1))


def _initialise(decoder: nn.Module, seed: int) -> None:
    """Biases zero, weights normal with variance 1 / fan-in; the head zero, so that training starts at the linear fit."""
    for name, parameter in decoder.named_parameters():
        nn.init.zeros_(parameter)
        if parameter.dim() > 1:
            gain = 0.0 if "head" in name else 1.0
            noise = rng.normal([rng.key(f"codec.init.{name}", seed)], parameter.shape)[0]
            parameter.data.copy_(noise * gain / math.sqrt(parameter[0].numel()))


@torch.no_grad()
def _fit_linear(codec: ReelforgeCodec, videos: Tensor) -> None:
    """Ridge regression of blocks on the 2 x 3 x 3 latents around; the penalty is the variance of the latent noise."""
    conv, noise = codec.decoder.linear, codec.config.latent_noise
    size = codec.latent_channels * conv.kernel_size[0] * conv.kernel_size[1] * conv.kernel_size[2]
    gram, cross = torch.zeros(size + 1, size + 1), torch.zeros(size + 1, codec.config.block_values)
    count = 0
    for part in videos.split(_SLICE):
        blocks = _unit(codec.to_blocks(part))
        latents = codec.encode(_unit(part))
        padded = torch.nn.functional.pad(latents, (1, 1, 1, 1, 1, 0), mode="replicate")
        near = padded.unfold(2, 2, 1).unfold(3, 3, 1).unfold(4, 3, 1)
        rows = near.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, size)
        rows = torch.cat((rows, torch.ones(len(rows), 1)), 1)
        gram += rows.T @ rows
        cross += rows.T @ blocks.movedim(1, -1).flatten(0, -2)
        count += len(rows)
    penalty = torch.full((size + 1,), count * noise**2 / 3)
    penalty[-1] = 0
    weights = torch.linalg.solve(gram + penalty.diag(), cross)
    conv.weight.copy_(weights[:-1].T.reshape(conv.weight.shape))
    conv.bias.copy_(weights[-1])


def _train_decoder(codec: ReelforgeCodec, videos: Tensor, seed: int) -> None:
    """AdamW on the squared error of decoded pixels."""
    config = codec.config
    optimiser = torch.optim.AdamW(codec.decoder.parameters(), betas=_BETAS, weight_decay=1e-4)
    for step in track(range(config.steps), "fitting the codec", total=config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        optimiser.zero_grad()
        _loss(codec, videos, rng.generator("codec.batch", seed, step)).backward()
        nn.utils.clip_grad_norm_(codec.decoder.parameters(), _GRAD_CLIP)
        optimiser.step()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _loss(codec: ReelforgeCodec, videos: Tensor, draw: np.random.Generator) -> Tensor:
    config = codec.config
    video = _unit(videos[torch.from_numpy(draw.integers(len(videos), size=config.batch_size))])
    latents = codec.encode(video)
    level = config.latent_noise * draw.random((config.batch_size, 1, 1, 1, 1), dtype=np.float32)
    noisy = latents + torch.from_numpy(level * draw.standard_normal(latents.shape, dtype=np.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_instructions()):
        blocks = codec.decoder(noisy.contiguous(memory_format=torch.channels_last_3d))
    error = blocks.float() - codec.to_blocks(video)
    # Of the first latent frame only the last pixel frame is kept.
    error[:, : -config.spatial_stride**2 * 3, 0] = 0
    return error.square().mean()
