"""3-D rotary position tables of Wan: time, height and width share the head's dimensions.

Of head dimension D, height and width take 2 (D // 6) each and time the rest (44 / 42 / 42 of 128). Frequency i of an
axis with d dimensions is theta^(-2i / d). Tables are computed in fp64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reelforge.engine.core.errors import ConfigError


class RotaryTable(nn.Module):
    """cos and sin per position and axis.

    Args:
        head_dim: D, even.
        max_positions: positions an axis can take; 1024 latent frames are 4093 pixel frames.
        theta: base of the frequencies.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float = 10_000.0) -> None:
        super().__init__()
        spatial = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * spatial, spatial, spatial)
        self.max_positions = max_positions
        self.theta = theta
        self._tables: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def _axis_tables(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """fp64 cos and sin ``[max_positions, d / 2]`` for each axis, made once per device."""
        if device not in self._tables:
            position = torch.arange(self.max_positions, dtype=torch.float64, device=device)
            self._tables[device] = [
                (angles.cos(), angles.sin())
                for angles in (torch.outer(position, self._frequencies(dim, device)) for dim in self.axis_dims)
            ]
        return self._tables[device]

    def _frequencies(self, dim: int, device: torch.device) -> Tensor:
        return self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)

    def forward(
        self, frame_index: Sequence[int], height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for a grid of tokens, frame-major, then rows, then columns.

        Args:
            frame_index: temporal position of each token frame.
            height: token rows.
            width: token columns.
            device: where the tables live.
            dtype: of the result; fp32, or fp64 for fp64 models.

        Returns:
            Two ``[len(frame_index) * height * width, D / 2]`` tensors.

        Raises:
            ConfigError: a position lies outside the table.
        """
        largest = max(max(frame_index), height - 1, width - 1)
        if largest >= self.max_positions:
            raise ConfigError(
                f"Position {largest} is outside the rotary table of {self.max_positions}.",
                "Use fewer latent frames or a smaller picture, or raise rope_max_seq_len.",
            )
        time, rows, columns = self._axis_tables(device)
        grid = (len(frame_index), height, width)
        cos, sin = (
            torch.cat(
                (
                    # Slices of consecutive frames: an index list would be copied to the device in every forward.
                    torch.cat([time[part][run] for run in _runs(frame_index)])[:, None, None].expand(*grid, -1),
                    rows[part][:height][None, :, None].expand(*grid, -1),
                    columns[part][:width][None, None, :].expand(*grid, -1),
                ),
                dim=-1,
            )
            .flatten(0, 2)
            .to(dtype)
            for part in (0, 1)
        )
        return cos, sin


def _runs(frames: Sequence[int]) -> list[slice]:
    """Consecutive frames as slices: (0, 1, 2, 0, 1, 2) is 0:3 twice."""
    starts = [i for i in range(len(frames)) if i == 0 or frames[i] != frames[i - 1] + 1]
    ends = [*starts[1:], len(frames)]
    return [slice(frames[start], frames[start] + end - start) for start, end in zip(starts, ends, strict=True)]
