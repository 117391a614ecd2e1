"""What the pictures of any video look like, in numbers that have no better and no worse: monitors, not rewards.

A policy that games its rewards drifts in them long before an eye sees it: over-exposure, glossy saturation, grids of
the network's patches, frozen motion. They come as :class:`~reelforge.engine.rewards.contract.Scores` so that whatever
measures rewards can measure them, but no axis has a direction: compare with the model that training started from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data import filters
from reelforge.engine.io.video import VideoInfo
from reelforge.engine.rewards.contract import Scores

_MEASURED = (
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "motion",
    "static_share",
    "background_deviation",
)
_PERIODS = (2, 4, 8, 16)  # pixels: Wan's VAE makes 8 x 8 of a latent position, its transformer 16 x 16 of a token
_BRIGHT, _DARK = 250, 5  # levels of 8-bit luma
_STILLS = 8
_LUMA = torch.tensor([0.299, 0.587, 0.114])


class PictureStatistics:
    """A :class:`~reelforge.engine.rewards.contract.Scorer` that looks at no prompt.

    Axes: those of :class:`~reelforge.engine.data.filters.Stats` that are of the picture (levels are 8-bit), and
        ``over_exposed``, ``under_exposed``: share of pixels with luma of at least 250, at most 5;
        ``grid_2`` to ``grid_16``: see :func:`grid_shares`; periods of which the frame holds fewer than two are left
        out. Missing for a clip without any detail.

    Args:
        video: the clip size.
    """

    def __init__(self, video: VideoSpec) -> None:
        self.info = VideoInfo(video.width, video.height, video.fps, video.num_frames / video.fps, "")
        self.periods = [period for period in _PERIODS if 2 * period <= min(video.height, video.width)]
        grids = (f"grid_{period}" for period in self.periods)
        self.axes = (*_MEASURED, "over_exposed", "under_exposed", *grids)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """Measure uint8 ``[B, F, H, W, 3]``; the prompts do not count."""
        del prompts
        rows = torch.tensor([self._measure(clip) for clip in videos])
        return {axis: Scores.of(column) for axis, column in zip(self.axes, rows.T, strict=True)}

    def _measure(self, clip: Tensor) -> list[float]:
        stats = filters.measure(clip.numpy(), self.info)
        stills = clip[torch.linspace(0, len(clip) - 1, min(len(clip), _STILLS)).long()].float()
        luma = stills @ _LUMA
        exposed = [(luma >= _BRIGHT).float().mean().item(), (luma <= _DARK).float().mean().item()]
        shares = grid_shares(stills.movedim(-1, 1), self.periods)
        return [*(getattr(stats, name) for name in _MEASURED), *exposed, *shares.tolist()]


def grid_shares(frames: Tensor, periods: Sequence[int]) -> Tensor:
    """How much of a picture's detail repeats with each period, on the lattice that starts at the corner.

    The frame is cut into p x p tiles and each loses its mean. With E the mean square of the tiles, E_p that of their
    average and E_{p/2} that of the average of its quarters,
        share_p = (E_p - E_{p/2}) / E, in [0, 1]:
    scale free, 1 for a checkerboard of period p, about 3/4 p^2 / (H W) for detail that knows nothing of the lattice.
    A pattern counts once, at its own period.

    Args:
        frames: float ``[F, C, H, W]``.
        periods: even, at most H and W; what does not fill a tile is left out.

    Returns:
        ``[len(periods)]``, over the energy of all frames; NaN for frames without detail.
    """
    return torch.stack([_grid_share(frames, period) for period in periods])


def _grid_share(frames: Tensor, period: int) -> Tensor:
    height, width = (side // period * period for side in frames.shape[-2:])
    tiles = _tiles(frames[..., :height, :width], period)
    tiles = tiles - tiles.mean((-3, -1), keepdim=True)
    average = tiles.mean((-4, -2))
    quarter = _tiles(average, period // 2).mean((-4, -2))
    return (average.square().mean() - quarter.square().mean()) / tiles.square().mean()


def _tiles(plane: Tensor, side: int) -> Tensor:
    """``[..., H, W]`` to ``[..., H / side, side, W / side, side]``."""
    return plane.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
