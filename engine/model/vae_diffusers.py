"""Wan's VAE, run by diffusers; the one file of the engine that imports diffusers."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core.errors import CheckpointError, ConfigError, DataError
from reelforge.engine.io.model_files import fingerprint_folders


class DiffusersWanVae:
    """diffusers' ``AutoencoderKLWan`` behind :class:`~reelforge.engine.core.types.VideoCodec`.

    Latents are (z - mean) / std with the config's per-channel statistics, z the mode of the posterior.
    A batch is coded one clip at a time, which bounds memory.
    """

    def __init__(self, vae: Any, folder: Path) -> None:
        self._vae, self._folder = vae, folder
        vae.enable_slicing()
        config = vae.config
        self.latent_channels: int = config.z_dim
        self.temporal_stride: int = 2 ** sum(config.temperal_downsample)
        self.spatial_stride: int = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        statistics = torch.tensor([config.latents_mean, config.latents_std], device=vae.device)
        self._mean, self._std = statistics.view(2, 1, -1, 1, 1, 1)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "DiffusersWanVae":
        """Read a ``vae/`` folder.

        Args:
            folder: the ``vae/`` folder.
            dtype: of the weights; float32 is what diffusers advises for this VAE.
            device: where to run.

        Raises:
            ConfigError: diffusers is not installed.
            CheckpointError: the folder does not load.
        """
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise ConfigError(f"The Wan VAE needs {error.name}.", "Run: pip install 'reelforge[wan]'.") from error
        try:
            vae = AutoencoderKLWan.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} does not load ({error}).", "Download the VAE again.") from error
        return cls(vae.to(device).eval().requires_grad_(False), folder)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all files of the folder; read when a cache first asks."""
        return "wan-vae-" + fingerprint_folders(self._folder)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """float32 ``[B,3,F,height,width]`` in [-1, 1] to float32 latents ``[B,C,T,H,W]`` on the VAE's device.

        Raises:
            DataError: frames or size do not fit the strides (diffusers would drop what is left over).
        """
        frames, *size = video.shape[2:]
        time, space = self.temporal_stride, self.spatial_stride
        if (frames - 1) % time or any(pixels % space for pixels in size):
            what = f"A clip has {frames} frames of {size[0]} x {size[1]} pixels (height x width)."
            raise DataError(what, f"The VAE needs 1 + {time} k frames and multiples of {space} pixels.")
        posterior = self._vae.encode(video.to(self._vae.device, self._vae.dtype)).latent_dist
        return (posterior.mode().float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B,C,T,H,W]`` to float32 ``[B,3,F,height,width]``, which diffusers clamps to [-1, 1]."""
        z = latents.to(self._vae.device, torch.float32) * self._std + self._mean
        return self._vae.decode(z.to(self._vae.dtype)).sample.float()

    def save(self, folder: Path) -> None:
        """Write a ``vae/`` folder that diffusers reads."""
        self._vae.save_pretrained(folder)
