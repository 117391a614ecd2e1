"""What a run started from: hashes that must be the same whenever it is continued, and on every rank.

The config's own hash does not see inside the files that it names: an edited prompt list, a model folder with another
schedule or other weights would continue another run under the same name.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import DataError, TrainingError
from reelforge.engine.flow.schedule import Grid
from reelforge.engine.rl.prompts import PromptSet

_SAMPLED = 64  # elements of a weight that its hash looks at: training changes them all, a copy none
_DIGITS = 15  # hexadecimal, so that a hash fits an int64
_NOUNS = {
    "prompts": "the prompts",
    "sigmas": "the sampler's sigmas",
    "weights": "the model's weights",
    "codec": "the codec",
    "recipe": "the recipe",
    "language_model": "the language model",
    "pairs": "the pairs",
    "generator": "the generator",
}


def origin(prompts: PromptSet, grid: Grid, weights: Iterable[Tensor], codec: str) -> dict[str, str]:
    """Hashes of prompts (with the rewards they are for), sigmas and timesteps, a sample of the starting weights, codec.

    Args:
        codec: its fingerprint.
    """
    sigmas = [f"{value:.9f}" for value in (*grid.sigmas.tolist(), *grid.timesteps.tolist())]
    taken = [weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)].float() for weight in weights]
    return {
        "prompts": digest(json.dumps([prompts.prompts, prompts.rewards]).encode()),
        "sigmas": digest(" ".join(sigmas).encode()),
        "weights": digest(torch.cat(taken).cpu().numpy().tobytes()),
        "codec": digest(codec.encode()),
    }


def check_continued(known: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to continue a run from something else.

    Raises:
        DataError: names what has changed.
    """
    for name, value in now.items():
        if known.get(name) != value:
            raise DataError(
                f"Since this run was started, {_NOUNS[name]} changed ({known.get(name)}, now {value}).",
                "Put back what it was started with, or choose another output folder.",
            )


def check_ranks(now: Mapping[str, str], device: torch.device) -> None:
    """Stop unless every rank starts from the same, and so plans the same.

    Args:
        now: :func:`origin`, and the hash of the ``recipe``.
        device: of the collective.

    Raises:
        TrainingError: names what differs.
    """
    table = torch.zeros(distributed.world_size(), len(now), dtype=torch.int64, device=device)
    table[distributed.rank()] = torch.tensor([int(value[:_DIGITS], 16) for value in now.values()])
    distributed.sum_([table])
    for name, column in zip(now, table.T.tolist(), strict=True):
        others = [rank for rank, value in enumerate(column) if value != column[0]]
        if others:
            what = f"Rank {others[0]} differs from rank 0 in {_NOUNS[name]}."
            raise TrainingError(what, "Give all processes the same files and settings.")


def digest(payload: bytes) -> str:
    """15 hexadecimal digits that name some bytes."""
    return hashlib.sha256(payload).hexdigest()[:_DIGITS]
