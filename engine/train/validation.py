"""Held-out loss per noise level, the same clips, noise and sigmas at every checkpoint.

The training loss mostly tells which sigmas were drawn. Here each clip is judged once inside each of eight equal sigma
bins with frozen noise, so that the difference between two checkpoints is the checkpoints' own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reelforge.engine.core import distributed, rng
from reelforge.engine.model.generation import half_precision
from reelforge.engine.train.flow_loss import flow_losses

BINS = 8
_GOLDEN = 0.6180339887498949

Clip = Callable[[int], tuple[Tensor, Tensor]]


def frozen_sigmas(clip: int) -> Tensor:
    """One sigma inside each bin, fp64 ``[8]``; clips are spread over the bins by the golden ratio."""
    return (torch.arange(BINS, dtype=torch.float64) + (0.5 + clip * _GOLDEN) % 1.0) / BINS


@torch.no_grad()
def clip_losses(model: nn.Module, x0: Tensor, text: Tensor, clip: int, rows: int, precision: str) -> Tensor:
    """Unweighted loss of one clip in each bin.

    Args:
        x0: latents ``[1,C,T,H,W]``.
        text: ``[1,S,E]``.
        clip: its number in the held-out set, which names its noise.
        rows: noise levels per forward.

    Returns:
        fp32 ``[8]``.
    """
    noise = rng.normal([rng.key("validation", clip, level) for level in range(BINS)], x0.shape[1:], x0.device)
    losses = []
    for part, sigma in zip(noise.split(rows), frozen_sigmas(clip).split(rows), strict=True):
        n = len(part)
        with half_precision(x0.device, precision == "bf16"):
            losses.append(flow_losses(model, x0.expand(n, -1, -1, -1, -1), part, sigma, text.expand(n, -1, -1)))
    return torch.cat(losses)


def validate(model: nn.Module, clip: Clip, count: int, rows: int, precision: str) -> dict[str, Any]:
    """Mean loss of ``count`` held-out clips, shared among ranks.

    Args:
        model: with the weights to judge in place (:meth:`Ema.applied`).
        clip: number of a held-out clip to its latents ``[1,C,T,H,W]`` and text ``[1,S,E]``.
        rows: noise levels per forward.

    Returns:
        ``validation_loss``, and ``validation_bins``: eight means from sigma 0 to 1.
    """
    device = next(model.parameters()).device
    table = torch.zeros(count, BINS, device=device)
    for number in range(distributed.rank(), count, distributed.world_size()):
        table[number] = clip_losses(model, *clip(number), number, rows, precision)
    distributed.sum_([table])
    bins = table.double().mean(0).tolist()
    return {"validation_loss": sum(bins) / BINS, "validation_bins": bins}
