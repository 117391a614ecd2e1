"""The Wan VAE adapter against diffusers' own class."""

import sys

import pytest
import torch

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, ConfigError, DataError
from reelforge.engine.model.vae_diffusers import DiffusersWanVae

MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 2.0, 0.7, 1.1]


@pytest.fixture(scope="module")
def reference():
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=MEAN, latents_std=STD
        ).eval()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "vae"
    reference.save_pretrained(folder)
    return folder


def video(frames: int, batch: int = 2) -> torch.Tensor:
    return rng.normal([rng.key("video", i) for i in range(batch)], (3, frames, 16, 24)).clamp(-1, 1)


def channels(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_and_decode_equal_diffusers(reference, folder, frames: int) -> None:
    codec = DiffusersWanVae.load(folder)
    clip = video(frames)
    latents = codec.encode(clip)
    assert latents.shape == (2, 4, 1 + (frames - 1) // 4, 2, 3) and latents.dtype == torch.float32
    with torch.no_grad():
        z = reference.encode(clip).latent_dist.mode()
        torch.testing.assert_close(latents, (z - channels(MEAN)) / channels(STD), atol=1e-5, rtol=0)
        pixels = codec.decode(latents)
        torch.testing.assert_close(pixels, reference.decode(z).sample, atol=1e-5, rtol=0)
    assert pixels.shape == clip.shape and pixels.dtype == torch.float32


def test_decoded_pixels_stay_in_range(folder) -> None:
    codec = DiffusersWanVae.load(folder)
    codec._vae.decoder.conv_out.weight.data *= 100
    pixels = codec.decode(rng.normal([rng.key("latents")], (4, 2, 2, 2)))
    assert pixels.min() == -1 and pixels.max() == 1


def test_a_clip_does_not_depend_on_its_batch(folder) -> None:
    codec = DiffusersWanVae.load(folder)
    together = codec.encode(video(5, batch=3))
    assert torch.equal(together[1:2], codec.encode(video(5, batch=3)[1:2]))
    assert torch.equal(codec.decode(together)[2:], codec.decode(together[2:]))


def test_strides_and_frozen_weights(folder) -> None:
    codec = DiffusersWanVae.load(folder)
    assert (codec.latent_channels, codec.temporal_stride, codec.spatial_stride) == (4, 4, 8)
    assert not codec.encode(video(1)).requires_grad
    with pytest.raises(DataError, match=r"4 frames of 16 x 24 pixels.*1 \+ 4 k"):
        codec.encode(video(4))
    with pytest.raises(DataError, match="multiples of 8"):
        codec.encode(video(5)[..., :20])


def test_bfloat16_weights_keep_float32_statistics(folder) -> None:
    codec = DiffusersWanVae.load(folder, dtype=torch.bfloat16)
    exact = DiffusersWanVae.load(folder).encode(video(5))
    latents = codec.encode(video(5))
    assert latents.dtype == torch.float32
    assert (latents - exact).norm() / exact.norm() < 0.02


def test_fingerprint_follows_the_weights_and_survives_saving(folder, tmp_path) -> None:
    codec = DiffusersWanVae.load(folder)
    codec.save(tmp_path / "vae")
    assert DiffusersWanVae.load(tmp_path / "vae").fingerprint == DiffusersWanVae.load(folder).fingerprint
    codec._vae.post_quant_conv.bias.data += 1
    codec.save(tmp_path / "other")
    assert DiffusersWanVae.load(tmp_path / "other").fingerprint != codec.fingerprint


def test_missing_weights_and_missing_diffusers(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="does not load"):
        DiffusersWanVae.load(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"diffusers.*pip install 'reelforge\[wan\]'"):
        DiffusersWanVae.load(folder)
