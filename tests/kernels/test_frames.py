"""Pixels to bytes: the Triton kernels against the references bit for bit, and NV12 against FFmpeg's conversion."""

import numpy as np
import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import dispatch, frames
from reelforge.kernels.errors import KernelError

# one pixel, odd sizes, one past an RGB tile of 2,048 pixels; batches and frames
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 3, 683), (1, 1, 32, 64)]
# one chroma sample, past a tile of 32 rows by 64 columns, sizes a 16-byte vector does not divide
EVEN_SHAPES = [(1, 1, 2, 2), (2, 3, 34, 66), (1, 2, 36, 128)]


def draw(batch: int, time: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels of which about a quarter is outside [-1, 1]."""
    return (parity.randn(0, batch, 3, time, height, width) * 0.9).to(dtype)


def code_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def from_codes(rgb: Tensor) -> Tensor:
    """``[B, T, H, W, 3]`` uint8 to pixels."""
    return (rgb.permute(0, 4, 1, 2, 3).double() / 127.5 - 1).contiguous()


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rgb_kernel_gives_the_references_bits(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    pixels = draw(*shape, dtype=dtype)
    with parity.triton("frames"):
        assert torch.equal(frames.to_uint8(pixels), frames.reference_uint8(pixels))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("shape", EVEN_SHAPES, ids=str)
def test_nv12_kernel_gives_the_references_bits(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    pixels = draw(*shape, dtype=dtype)
    with parity.triton("frames"):
        assert torch.equal(frames.to_nv12(pixels), frames.reference_nv12(pixels))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_every_code_value_comes_back(implementation: str) -> None:
    rgb = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    with parity.triton("frames", implementation):
        assert torch.equal(frames.to_uint8(from_codes(rgb).float().to(parity.DEVICE)).cpu(), rgb)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_ties_round_to_even(implementation: str) -> None:
    x = torch.arange(127, 510, 2, dtype=torch.float32) / 255 - 1  # code values n + 0.5, but for rounding
    x = x[(x + 1) * 127.5 % 1 == 0.5].to(parity.DEVICE)
    with parity.triton("frames", implementation):
        rgb = frames.to_uint8(x.expand(1, 3, 1, 1, -1).contiguous())
    assert len(x) > 50 and (rgb % 2 == 0).all()
    assert ((rgb[0, 0, 0, :, 0] - (x + 1) * 127.5).abs() == 0.5).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_values_outside_are_limited_and_nan_is_black(implementation: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1.0, -1.0, 1.01, -1.01, -0.0], device=parity.DEVICE)
    pixels = x.repeat_interleave(4).view(1, 1, 10, 2, 2).expand(1, 3, 10, 2, 2)
    limits = [0, 255, 0, 255, 0, 255, 0, 255, 0, 128]
    with parity.triton("frames", implementation):
        assert frames.to_uint8(pixels)[0, :, 0, 0, 0].tolist() == limits
        assert frames.to_nv12(pixels)[0, :, 0, 0].tolist() == [round(16 + 219 * x / 255) for x in limits]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_nv12_of_primaries_greys_and_nan(implementation: str) -> None:
    """BT.709's narrow range: white 235, black 16, and the eight corners of the cube to the nearest code value."""
    corners = torch.tensor([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], dtype=torch.float32)
    pixels = (2 * corners.T - 1).view(1, 3, 8, 1, 1).expand(1, 3, 8, 2, 2).contiguous()
    pixels = torch.cat((pixels, torch.full_like(pixels[:, :, :1], float("nan"))), dim=2).to(parity.DEVICE)
    with parity.triton("frames", implementation):
        nv12 = frames.to_nv12(pixels)[0]
    assert nv12[:, 0, 0].tolist() == [16, 32, 173, 188, 63, 78, 219, 235, 16]
    assert nv12[:, 2].tolist() == [
        [128, 128], [240, 118], [42, 26], [154, 16], [102, 240], [214, 230], [16, 138], [128, 128], [128, 128],
    ]  # fmt: skip
    assert torch.equal(nv12[:, 0], nv12[:, 1])


def test_fp32_rounds_as_fp64_but_at_ties() -> None:
    pixels = draw(1, 4, 64, 64)
    for reference in (frames.reference_uint8, frames.reference_nv12):
        difference = reference(pixels).int() - reference(pixels.double()).int()
        assert difference.abs().max() <= 1 and difference.count_nonzero() <= 2


@pytest.mark.parametrize("picture", ["smooth", "random"])
def test_nv12_against_ffmpeg(picture: str) -> None:
    """swscale computes in 15-bit fixed point: 0.2 to 1.1 % of the values were off by 1, none by more."""
    av = pytest.importorskip("av")
    height, width = 64, 96
    if picture == "random":
        rgb = code_values(1, 1, height, width, 3)
    else:
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        wave = torch.stack((x, y, 0.5 + 0.5 * torch.sin(6 * x + 4 * y)), dim=-1)
        rgb = (255 * wave).round().byte()[None, None]
    frame = av.VideoFrame.from_ndarray(rgb[0, 0].numpy(), format="rgb24")
    theirs = frame.reformat(
        format="nv12", dst_colorspace="ITU709", dst_color_range="MPEG", src_color_range="JPEG", interpolation="AREA"
    ).to_ndarray()
    ours = frames.reference_nv12(from_codes(rgb))[0, 0].numpy()
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() == 1 and difference.mean() < 0.015


def test_a_slice_of_a_longer_video_is_read_in_place() -> None:
    video = draw(2, 5, 34, 66)
    with parity.triton("frames"):
        assert torch.equal(frames.to_uint8(video[:, :, 1:4]), frames.to_uint8(video)[:, 1:4])
        assert torch.equal(frames.to_nv12(video[:, :, 1:4]), frames.to_nv12(video)[:, 1:4])


def test_custom_ops_are_registered_right() -> None:
    pixels = draw(2, 2, 4, 6)
    with dispatch.pinned("frames", "triton"):
        torch.library.opcheck(frames._uint8_op, (pixels,))
        torch.library.opcheck(frames._nv12_op, (pixels,))


@pytest.mark.parametrize(
    ("convert", "pixels", "message"),
    [
        (frames.to_nv12, parity.zeros(1, 3, 1, 4, 5), "NV12 of 4 x 5 pixels"),
        (frames.to_nv12, parity.zeros(1, 3, 1, 3, 4), "Both must be even"),
        (frames.to_uint8, parity.zeros(1, 4, 1, 4, 4), r"must be \[B, 3, T, H, W\]"),
        (frames.to_uint8, parity.zeros(3, 1, 4, 4), r"must be \[B, 3, T, H, W\]"),
        (frames.to_uint8, parity.zeros(1, 3, 1, 4, 6).transpose(3, 4), "strides"),
        (frames.to_nv12, parity.zeros(1, 3, 1, 4, 6)[..., :4], "strides"),
        (frames.to_uint8, parity.zeros(1, 3, 1, 4, 4, dtype=torch.float64), "float64 is not one of"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(convert: object, pixels: Tensor, message: str) -> None:
    with parity.triton("frames"), pytest.raises(KernelError, match=message):
        convert(pixels)
