import json

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("av")

from reelforge.bench.toy.codec_fit import fit
from reelforge.bench.toy.render import CLEAN, WEB, FlawRates, make_clip
from reelforge.bench.toy.world import Split
from reelforge.engine.core.errors import CheckpointError, ConfigError, DataError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.model.codec import WEIGHTS, CodecConfig, ReelforgeCodec, pad_causal

DEFAULT = CodecConfig()


def clips(
    count: int, seed: int, rates: FlawRates, side: int = 32, frames: int = 17, split: Split = "train"
) -> np.ndarray:
    spec = VideoSpec(frames, side, side, 16.0)
    return np.stack([make_clip(seed, index, rates, split, spec).frames for index in range(count)])


def unit(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(decoded: Tensor, video: Tensor) -> float:
    """Mean over clips, dB, of colours in [0, 1]."""
    error = ((decoded - video) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@pytest.fixture(scope="module")
def web() -> np.ndarray:
    return clips(256, 0, WEB)


@pytest.fixture(scope="module")
def codec(web: np.ndarray) -> ReelforgeCodec:
    return fit(DEFAULT, web, seed=0)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return unit(clips(32, 1, WEB, split="held_out"))


def test_held_out_clips_survive(codec: ReelforgeCodec, held_out: Tensor) -> None:
    latents = codec.encode(held_out)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32))
    assert psnr(codec.decode(latents), held_out) > 38
    assert psnr(codec.decode(latents + 0.2 * noise), held_out) > 31
    clean = unit(clips(32, 2, CLEAN, split="held_out"))
    assert psnr(codec.decode(codec.encode(clean)), clean) > 32


@pytest.mark.parametrize(("stride", "pulse_weight"), [(1, 2.0), (4, 0.0), (4, 3.0)])
def test_synthesis_is_the_least_squares_solution(web: np.ndarray, stride: int, pulse_weight: float) -> None:
    """The gradient of the written-out objective, by autograd through the convolution, vanishes."""
    config = CodecConfig(4, stride, 8, latent_noise=0.0, pulse_weight=pulse_weight)
    codec = fit(config, web[:24], seed=0).double()
    blocks = codec.to_blocks(unit(web[:24]).double())
    padded = pad_causal(codec.encode(unit(web[:24])))

    def gradient(weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_(True)
        error = torch.nn.functional.conv3d(padded, weight, codec.synthesis.bias) - blocks
        frames = error.unflatten(1, (stride, -1)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
        loss = frames.square().sum() + pulse_weight * frames.diff(dim=1).square().sum()
        return torch.autograd.grad(loss, weight)[0]

    weight = codec.synthesis.weight
    assert gradient(weight).norm() < 1e-3 * gradient(torch.zeros_like(weight)).norm()


def test_another_size_and_length(codec: ReelforgeCodec) -> None:
    video = unit(clips(4, 3, WEB, side=64, frames=33))
    latents = codec.encode(video)
    assert latents.shape == (4, 16, 9, 16, 16)
    assert psnr(codec.decode(latents), video) > 36


def test_basis_spans_the_leading_principal_components(web: np.ndarray) -> None:
    """Against numpy's SVD of the same blocks, cut by loops."""
    config = CodecConfig(latent_channels=5, temporal_stride=2)
    few = web[:12, :9]
    codec = fit(config, few, seed=0)
    led = np.concatenate([few[:, :1], few], 1) / 127.5 - 1
    rows = np.stack(
        [
            clip[t : t + 2, y : y + 4, x : x + 4].ravel()
            for clip in led
            for t in range(0, 10, 2)
            for y in range(0, 32, 4)
            for x in range(0, 32, 4)
        ]
    )
    singular = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[1][:5]
    basis = codec.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-5)
    projected = (rows - rows.mean(0)) @ basis.T
    np.testing.assert_allclose(np.sqrt((projected**2).sum(0)), singular, rtol=1e-4)
    latents = codec.encode(unit(few)).movedim(1, -1).reshape(-1, 5).double().numpy()
    deviations = singular / np.sqrt(len(rows))
    expected = deviations ** (1 - config.whitening)
    np.testing.assert_allclose(latents.std(0), expected / np.sqrt((expected**2).mean()), rtol=1e-3)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)


def test_first_frame_is_coded_alone(codec: ReelforgeCodec, held_out: Tensor) -> None:
    latents = codec.encode(held_out)
    torch.testing.assert_close(codec.encode(held_out[:, :, :1]), latents[:, :, :1])
    torch.testing.assert_close(codec.decode(latents[:, :, :1]), codec.decode(latents)[:, :, :1])


def test_causal_both_ways(codec: ReelforgeCodec, held_out: Tensor) -> None:
    """What comes after latent frame 2 (pixel frame 8) has no part in what comes before."""
    video = held_out[:2]
    changed = video.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    latents, altered = codec.encode(video), codec.encode(changed)
    assert torch.equal(latents[:, :, :3], altered[:, :, :3]) and not torch.equal(latents[:, :, 3], altered[:, :, 3])
    decoded, other = codec.decode(latents), codec.decode(altered)
    assert torch.equal(decoded[:, :, :9], other[:, :, :9]) and not torch.equal(decoded[:, :, 9], other[:, :, 9])


def test_moving_the_picture_by_a_stride_moves_the_latents(codec: ReelforgeCodec, held_out: Tensor) -> None:
    moved = held_out.roll((4, -8), (3, 4))
    torch.testing.assert_close(codec.encode(moved), codec.encode(held_out).roll((1, -2), (3, 4)))


def border_energy(video: Tensor, axis: int, first: int) -> float:
    """Squared change at every fourth step along ``axis``, from step ``first``, over that at the other steps."""
    energy = video.diff(dim=axis).square().movedim(axis, 0).flatten(1).mean(1)
    inside = torch.ones(len(energy), dtype=torch.bool)
    inside[first::4] = False
    return float(energy[~inside].mean() / energy[inside].mean())


@pytest.mark.parametrize("axis", [3, 4], ids=["height", "width"])
@pytest.mark.parametrize("rates", [CLEAN, FlawRates(haze=1.0, blur=1.0)], ids=["sharp", "smooth"])
def test_no_blocks(codec: ReelforgeCodec, axis: int, rates: FlawRates) -> None:
    """Decoded gradients are as large at the borders of blocks as inside them, where truth's are."""
    video = unit(clips(48, 4, rates))
    decoded = codec.decode(codec.encode(video))
    assert border_energy(decoded, axis, 3) / border_energy(video, axis, 3) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rates", [CLEAN, FlawRates(haze=1.0, blur=1.0)], ids=["sharp", "smooth"])
def test_no_pulse(codec: ReelforgeCodec, rates: FlawRates) -> None:
    """The error changes no more from one latent frame to the next (after pixel frames 0, 4, 8, 12) than inside."""
    video = unit(clips(48, 4, rates))
    assert border_energy(codec.decode(codec.encode(video)) - video, 2, 0) < 1.1


def test_still_picture_stays_still(codec: ReelforgeCodec, held_out: Tensor) -> None:
    still = held_out[:, :, 8:9].expand(-1, -1, 17, -1, -1)
    decoded = codec.decode(codec.encode(still))
    assert decoded.diff(dim=2).square().mean().sqrt() < 0.5 * (decoded - still).square().mean().sqrt()


@pytest.mark.parametrize(
    ("stride", "side", "size"), [(4, 4, (16, 24)), (1, 2, (10, 6)), (2, 8, (16, 8)), (8, 4, (4, 4))]
)
def test_shapes_follow_the_strides(stride: int, side: int, size: tuple[int, int]) -> None:
    codec = ReelforgeCodec(CodecConfig(latent_channels=7, temporal_stride=stride, spatial_stride=side))
    video = torch.rand(2, 3, 1 + 2 * stride, *size)
    latents = codec.encode(video)
    assert latents.shape == (2, 7, 3, size[0] // side, size[1] // side)
    assert codec.decode(latents).shape == video.shape
    assert torch.equal(codec.to_video(codec.to_blocks(video)), video)


def test_save_and_load_bit_for_bit(codec: ReelforgeCodec, held_out: Tensor, tmp_path) -> None:
    codec.save(tmp_path / "vae")
    loaded = ReelforgeCodec.load(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "ReelforgeCodec"
    assert loaded.fingerprint == codec.fingerprint and loaded.config == codec.config
    latents = codec.encode(held_out)
    assert torch.equal(loaded.encode(held_out), latents)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))


def test_fit_repeats_and_depends_on_the_seed(web: np.ndarray) -> None:
    config = CodecConfig(latent_channels=4)
    one, same, other = (fit(config, web[:32], seed).fingerprint for seed in (5, 5, 6))
    assert one == same != other


def test_what_does_not_fit_is_named(codec: ReelforgeCodec, tmp_path) -> None:
    with pytest.raises(DataError, match=r"16 frames; the codec needs 1 \+ 4 k. Cut it to 13."):
        codec.encode(torch.zeros(1, 3, 16, 32, 32))
    with pytest.raises(DataError, match="32 x 30 pixels .* multiples of 4"):
        codec.encode(torch.zeros(1, 3, 17, 32, 30))
    with pytest.raises(ConfigError, match="latent_channels is 16; a block has 12 values"):
        CodecConfig(temporal_stride=1, spatial_stride=2)
    with pytest.raises(DataError, match="fewer than 16 directions"):
        fit(DEFAULT, np.zeros((4, 17, 32, 32, 3), np.uint8), seed=0)
    codec.save(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ReelforgeCodec", "latent_channels": 8}')
    with pytest.raises(CheckpointError, match="does not fit the config"):
        ReelforgeCodec.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no header")
    with pytest.raises(CheckpointError):
        ReelforgeCodec.load(tmp_path)
