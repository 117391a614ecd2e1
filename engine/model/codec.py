"""The miniature's video codec: principal components of small pixel blocks, decoded by one overlapping convolution.

A block is ``temporal_stride`` frames x ``spatial_stride``^2 pixels x 3 colours. As in Wan's VAE the first latent frame
holds the first pixel frame alone: the clip is led in by copies of it, so a still picture is a clip of one frame.
Encoding looks at nothing outside the block, so latents are as smooth as the video is. Decoding sees the neighbours in
space and the past two latent frames, which is what removes the blocks; it never looks at later latent frames.
Both are linear and fitted in closed form; a small conv net on top, trained for 300 steps, gained 0.2 dB at most.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import CheckpointError, ConfigError, DataError
from reelforge.engine.io.model_files import open_weights, read_json, write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
_COLOURS = 3


PAST_FRAMES = 2  # latent frames before its own that a block is decoded from


@dataclass(frozen=True)
class CodecConfig:
    """Shape of the codec, and how it is fitted.

    Attributes:
        latent_channels: principal components kept.
        temporal_stride: pixel frames per latent frame.
        spatial_stride: pixels per latent position, along height and width.
        whitening: a component of standard deviation s gets the latent deviation s^(1 - whitening), up to a common
            factor that makes the mean variance 1. At 1 faint detail weighs as much as the colour of the background;
            at 0 an error in either is equally visible.
        latent_noise: deviation of the noise that decoding is fitted to bear, drawn per clip from 0 to this: a
            generator's latents are never exact. More makes plain areas calmer and edges softer.
        pulse_weight: weight of the squared change of the error from frame to frame: without it motion is damped
            within a latent frame and jumps to the next.
    """

    latent_channels: int = 16
    temporal_stride: int = 4
    spatial_stride: int = 4
    whitening: float = 0.65
    latent_noise: float = 0.15
    pulse_weight: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.latent_channels <= self.block_values:
            what = f"latent_channels is {self.latent_channels}; a block has {self.block_values} values."
            raise ConfigError(what, "Use fewer channels or larger strides.")

    @property
    def block_values(self) -> int:
        """Colour values in one block."""
        return self.temporal_stride * self.spatial_stride**2 * _COLOURS


def pad_causal(latents: Tensor) -> Tensor:
    """Repeat the edges of ``[B,C,T,H,W]``: past frames in front, none behind, one position on each side."""
    return functional.pad(latents, (1, 1, 1, 1, PAST_FRAMES, 0), mode="replicate")


class ReelforgeCodec(nn.Module):
    """A :class:`~reelforge.engine.core.types.VideoCodec`; :func:`~reelforge.bench.toy.codec_fit.fit` makes one.

    latents = (basis block - latents_mean) / latents_std, where the rows of ``basis`` are orthonormal.
    """

    basis: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.temporal_stride, self.spatial_stride = config.temporal_stride, config.spatial_stride
        self.register_buffer("basis", torch.zeros(config.latent_channels, config.block_values))
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels, 1, 1, 1))
        self.register_buffer("latents_std", torch.ones(config.latent_channels, 1, 1, 1))
        self.synthesis = nn.Conv3d(config.latent_channels, config.block_values, (1 + PAST_FRAMES, 3, 3))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over configuration and weights, 16 hex digits; of the codec as it is when first asked."""
        total = hashlib.sha256(configuration.fingerprint(self.config).encode())
        for name, tensor in sorted(self.state_dict().items()):
            total.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"reelforge-codec-1-{total.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """float32 ``[B,3,F,height,width]`` in [-1, 1] to float32 latents ``[B,C,T,H,W]``, F = 1 + stride (T - 1).

        Raises:
            DataError: frames or size do not fit the strides.
        """
        blocks = self.to_blocks(video.to(self.basis))
        return (torch.einsum("cp,bpthw->bcthw", self.basis, blocks) - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B,C,T,H,W]`` to float32 ``[B,3,F,height,width]``, clamped to [-1, 1]."""
        return self.to_video(self.synthesis(pad_causal(latents.to(self.basis)))).clamp(-1, 1)

    def to_blocks(self, video: Tensor) -> Tensor:
        """``[B,3,F,height,width]`` of any type to blocks ``[B,block_values,T,H,W]``, the first frame repeated in front.

        Values are ordered by frame, row, column, colour.
        """
        stride, side = self.temporal_stride, self.spatial_stride
        self._check(*video.shape[2:])
        lead = video[:, :, :1].expand(-1, -1, stride - 1, -1, -1)
        batch, colours, frames, height, width = (led := torch.cat((lead, video), 2)).shape
        grid = led.view(batch, colours, frames // stride, stride, height // side, side, width // side, side)
        return grid.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)

    def to_video(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`to_blocks`."""
        stride, side = self.temporal_stride, self.spatial_stride
        batch, _, frames, height, width = blocks.shape
        grid = blocks.view(batch, stride, side, side, _COLOURS, frames, height, width).permute(0, 4, 5, 1, 6, 2, 7, 3)
        video = grid.reshape(batch, _COLOURS, frames * stride, height * side, width * side)
        return video[:, :, stride - 1 :]

    def _check(self, frames: int, height: int, width: int) -> None:
        stride, side = self.temporal_stride, self.spatial_stride
        if frames < 1 or (frames - 1) % stride:
            below = max(frames - 1, 0) // stride * stride + 1
            raise DataError(f"A clip has {frames} frames; the codec needs 1 + {stride} k.", f"Cut it to {below}.")
        if height % side or width % side or not height * width:
            what = f"A clip is {height} x {width} pixels (height x width)."
            raise DataError(what, f"The codec needs multiples of {side}: crop or scale it.")

    def save(self, folder: Path) -> None:
        """Write a ``vae/`` folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)})
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ReelforgeCodec":
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the configuration.
        """
        table = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
        codec = cls(configuration.build(CodecConfig, table, f"{folder / 'config.json'}: "))
        with open_weights(folder / WEIGHTS) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        shapes = {name: tensor.shape for name, tensor in codec.state_dict().items()}
        if wrong := sorted({*shapes.items()} ^ {(name, tensor.shape) for name, tensor in state.items()}):
            raise CheckpointError(f"{folder / WEIGHTS}: {wrong[0][0]} does not fit the config.", "Copy it again.")
        codec.load_state_dict(state)
        return codec.to(device).eval().requires_grad_(False)
