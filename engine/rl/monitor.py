"""Watches what training does not optimise: fixed prompts and noises, sampled as a user would, scored by everybody.

Clips of the averaged weights are compared, clip by clip, with those of the model that training started from. Rewards
that rise while a scorer that nothing optimises falls are the sign of a hacked reward, and :func:`fallen` says so.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reelforge.engine.core import distributed
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.core.files import replace_file
from reelforge.engine.flow.sampler import initial_noise
from reelforge.engine.flow.schedule import Grid
from reelforge.engine.model.generation import Guidance, half_precision, sample_latents
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rewards.contract import Scorer
from reelforge.engine.rewards.scoring import Decode, Scoring, ScoringConfig
from reelforge.engine.rl.prompts import PromptSet

Kind = Literal["reward", "held_out", "picture"]
Keep = Callable[[int, np.ndarray], None]  # told the place of a clip's prompt, and its frames [F,H,W,3]
_SIGNIFICANT = 2.0  # standard errors
_NOTABLE = 0.5  # standard deviations of the start


@dataclass(frozen=True)
class HeldOutConfig:
    """What is watched at every checkpoint.

    Attributes:
        prompts: like the run's prompts, and better none of them.
        scorers: named as in ``rewards``, and none of them; their fall ends the run.
        samples: clips a prompt.
        batch_size: clips a forward.
        max_fall: how far a held-out score may fall while the rewards rise, in standard deviations of the starting
            model's scores over the clips.
        previews: prompts whose first clip is kept as a video and shown on the contact sheet.
    """

    prompts: Path
    scorers: tuple[str, ...] = ()
    samples: int = 1
    batch_size: int = 4
    max_fall: float = 0.5
    previews: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "samples", "batch_size", "max_fall")
        if self.previews < 0:
            raise ConfigError(f"held_out.previews is {self.previews}.", "It must be 0 (none) or more.")


@dataclass(frozen=True)
class Sampling:
    """How a clip is made: the model folder's defaults.

    Attributes:
        grid: the schedule's steps.
        guidance_scale: 1 is none.
        shape: of a latent, ``[C,T,H,W]``.
        seed: names the noise, as it does for ``generate``.
        autocast: bf16 around fp32 weights.
    """

    grid: Grid
    guidance_scale: float
    shape: Sequence[int]
    seed: int
    autocast: bool

    @property
    def rows(self) -> int:
        """Network rows a clip."""
        return self.grid.num_steps * (1 if self.guidance_scale == 1.0 else 2)


class Monitor:
    """Samples, scores and compares; ranks share the clips and get the same numbers.

    Args:
        config: what is watched.
        model: with the weights to judge in place whenever :meth:`measure` is called.
        prompts: what ``config.prompts`` holds.
        text: ``[H + 1, S, E]`` of these prompts, the negative prompt last.
        sampling: how a clip is made.
        scorers: by kind; an axis belongs to one of them.
        decode: latents to frames.
        patience: with the scorers.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        model: WanTransformer,
        prompts: PromptSet,
        text: Tensor,
        sampling: Sampling,
        scorers: Mapping[Kind, Sequence[Scorer]],
        decode: Decode,
        patience: ScoringConfig,
    ) -> None:
        self.config, self.model, self.prompts, self.text = config, model, prompts, text
        self.sampling, self.decode = sampling, decode
        self.kinds = {axis: kind for kind, group in scorers.items() for scorer in group for axis in scorer.axes}
        everyone = [scorer for group in scorers.values() for scorer in group]
        self.scoring = Scoring(everyone, self._decode, dataclasses.replace(patience, overlap=False))
        self.start: Tensor | None = None
        self._videos = torch.empty(0)

    @property
    def clips(self) -> int:
        """In all."""
        return len(self.prompts.prompts) * self.config.samples

    def measure(self, keep: Keep) -> Tensor:
        """Scores of every clip under the weights in place: fp64 ``[A,N]``, NaN where missing.

        Args:
            keep: told the first clips of this rank's ``previews``.
        """
        device = self.model.proj_out.weight.device
        scores = torch.zeros(len(self.kinds), self.clips, dtype=torch.float64)
        own = list(range(distributed.rank(), self.clips, distributed.world_size()))
        for first in range(0, len(own), self.config.batch_size):
            part = own[first : first + self.config.batch_size]
            places = [divmod(clip, self.config.samples) for clip in part]
            texts = [self.prompts.prompts[prompt] for prompt, _ in places]
            found = self.scoring.submit(self._sample(places, device), texts).result()
            scores[:, part] = torch.stack([found[axis].values.double() for axis in self.kinds])
            for (prompt, member), video in zip(places, self._videos, strict=True):
                if member == 0 and prompt < self.config.previews:
                    keep(prompt, video.numpy())
        shared = scores.to(device)
        distributed.sum_([shared])
        return shared.cpu()

    def _sample(self, places: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """x0 of some (prompt, member)."""
        how, names, prompts = self.sampling, self.prompts.ids, [prompt for prompt, _ in places]
        text = self.text[prompts].to(device)
        guidance = Guidance(text, self.text[-1:].to(device).expand_as(text), how.guidance_scale)
        ids, members = [names[prompt] for prompt in prompts], [member for _, member in places]
        noise = initial_noise(how.seed, ids, members, how.shape, device=device)
        with half_precision(device, how.autocast):
            return sample_latents(self.model, guidance, noise, how.grid)

    def _decode(self, latents: Tensor) -> Tensor:
        self._videos = self.decode(latents)
        return self._videos

    def begin(self, path: Path, origin: Mapping[str, str], keep: Keep) -> bool:
        """Know the starting model's scores: from a file, or by measuring, for which its weights must be in place.

        Args:
            path: a JSON file, written by rank 0; one of other prompts, scorers or samples is replaced.
            origin: what training starts from.
            keep: see :meth:`measure`.

        Returns:
            Whether they were measured now.

        Raises:
            TrainingError: a reward or a held-out scorer gave no score at all, or the latter the same to all clips: what
                happens to it could not be measured.
        """
        identity = self._identity(origin)
        self.start = _read(path, identity, self.kinds)
        if self.start is not None:
            return False
        self.start = self.measure(keep)
        self._check_start(self.start)
        if distributed.rank() == 0:
            rows = [[None if score != score else score for score in row] for row in self.start.tolist()]
            replace_file(path, json.dumps({"identity": identity, "scores": dict(zip(self.kinds, rows, strict=True))}))
        distributed.barrier()
        return True

    def _check_start(self, start: Tensor) -> None:
        for (axis, kind), scores in zip(self.kinds.items(), start, strict=True):
            known = scores[~scores.isnan()]
            if not len(known) and kind != "picture":
                why = self.scoring.last_error or "its scorer answered NaN"
                hint = "Mend the scorer, or take it out of the recipe."
                raise TrainingError(f"No held-out clip has a score on {axis}: {why}.", hint)
            if kind == "held_out" and (known == known[0]).all():
                raise TrainingError(
                    f"All {len(known)} held-out clips of the starting model score {known[0]:.4g} on {axis}.",
                    "Its fall is measured in their standard deviation: watch more prompts, or another scorer.",
                )

    def _identity(self, origin: Mapping[str, str]) -> str:
        """Hash of all that decides the starting model's scores."""
        how = self.sampling
        seen = (
            self.prompts.prompts, self.config.samples, self.config.scorers, self.kinds, how.grid.sigmas.tolist(),
            how.guidance_scale, list(how.shape), how.seed, how.autocast, origin["weights"], origin["codec"],
        )  # fmt: skip
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def compare(self, scores: Tensor) -> dict[str, dict[str, Any]]:
        """Scores ``[A,N]`` against the starting model's, clip by clip.

        Returns:
            per axis: its ``kind``; ``mean`` and that of the ``start``; share ``missing``; ``drift``, the mean
            difference in standard deviations of the starting model's scores over the clips, and its standard ``error``.
            None where undefined: the drift where all clips of the start score the same.
        """
        assert self.start is not None, "begin first"
        rows = zip(self.kinds.items(), scores, self.start, strict=True)
        return {axis: {"kind": kind, **_against(now, start)} for (axis, kind), now, start in rows}


def _read(path: Path, identity: str, axes: Iterable[str]) -> Tensor | None:
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if stored.get("identity") != identity:
        return None
    rows = [[math.nan if score is None else score for score in stored["scores"][axis]] for axis in axes]
    return torch.tensor(rows, dtype=torch.float64)


def _against(now: Tensor, start: Tensor) -> dict[str, float | None]:
    known, before, both = (table[~table.isnan()] for table in (now, start, now - start))
    spread = before.std(correction=0).item() if len(before) else 0.0
    defined = len(both) > 1 and spread > 0
    return {
        "mean": known.mean().item() if len(known) else None,
        "start": before.mean().item() if len(before) else None,
        "missing": now.isnan().double().mean().item(),
        "drift": both.mean().item() / spread if defined else None,
        "error": both.std().item() / len(both) ** 0.5 / spread if defined else None,
    }


def fallen(compared: Mapping[str, Mapping[str, Any]], max_fall: float) -> str | None:
    """The held-out axis that fell furthest beyond ``max_fall``, by two standard errors, while the rewards rose.

    Args:
        compared: what :meth:`Monitor.compare` returned.
        max_fall: in standard deviations of the starting model's scores.
    """
    known = {axis: facts for axis, facts in compared.items() if facts["drift"] is not None}
    gains = [facts["drift"] for facts in known.values() if facts["kind"] == "reward"]
    if sum(gains) <= 0:
        return None
    surely = {
        axis: facts["drift"] + _SIGNIFICANT * facts["error"]
        for axis, facts in known.items()
        if facts["kind"] == "held_out"
    }
    worst = min(surely, key=lambda axis: surely[axis], default=None)
    return worst if worst is not None and surely[worst] < -max_fall else None


def summary(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for a person: all drifts of scorers, and of the picture's statistics those that are worth a look."""
    return ", ".join(
        f"{axis} {_change(facts)}"
        for axis, facts in compared.items()
        if facts["kind"] != "picture" or _worth_a_look(facts)
    )


def _change(facts: Mapping[str, Any]) -> str:
    if facts["mean"] is None or facts["start"] is None:
        return "has no score"
    if facts["drift"] is None:
        return f"{facts['start']:.3g} -> {facts['mean']:.3g}"
    return f"{facts['drift']:+.2f} +- {_SIGNIFICANT * facts['error']:.2f}"


def _worth_a_look(facts: Mapping[str, Any]) -> bool:
    if facts["drift"] is None:
        return facts["mean"] != facts["start"]
    return abs(facts["drift"]) > _NOTABLE
