"""Clips of a model on given prompts and noise, as files, with what scorers say of each; only what is missing is made.

Ranks share the clips.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reelforge.bench.judge.bootstrap import Labels
from reelforge.bench.judge.config import SECOND, ColumnConfig, JudgeConfig
from reelforge.bench.judge.gsb import Scores
from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.errors import Interrupted, TrainingError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.interrupt import StopRequest, stop_on_signals
from reelforge.engine.core.progress import track
from reelforge.engine.io.model_files import fingerprint_folders
from reelforge.engine.io.video import write_video
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.engine.model.generator import GenerateConfig, Generator, Job, decode_uint8, load_served, resolve
from reelforge.engine.rewards.contract import Scorer
from reelforge.engine.rewards.scoring import Scoring


@dataclass(frozen=True)
class Film:
    """All clips of a column.

    Attributes:
        scores: by axis, fp64 ``[N]``, NaN where missing; clips in the order of prompts, then members.
        labels: ``[N]`` prompt ids.
        clips: their files.
        fps: of these.
        nfe: network evaluations a video.
        token_forwards: tokens through the network a video.
        seconds_per_video: sampling and decoding.
    """

    scores: Scores
    labels: Labels
    clips: tuple[Path, ...]
    fps: float
    nfe: int
    token_forwards: int
    seconds_per_video: float


@dataclass(frozen=True)
class _Take:
    """A clip to make, and where it and its scores go."""

    job: Job
    clip: Path
    scores: Path
    identity: str

    @property
    def known(self) -> dict[str, Any] | None:
        """What its file says, if it is of this very clip and no scorer was silent."""
        if not (self.clip.exists() and self.scores.exists()):
            return None
        try:
            facts = json.loads(self.scores.read_text(encoding="utf-8"))
            complete = facts["identity"] == self.identity and None not in facts["scores"].values()
            return facts if complete else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Studio:
    """Films column after column.

    Args:
        config: how much, where.
        scorers: of ``config.rewards`` and ``config.voters``.
    """

    def __init__(self, config: JudgeConfig, scorers: Sequence[Scorer]) -> None:
        self.config = config
        self.device = distributed.pick_device(config.device)
        patience = dataclasses.replace(config.scoring, overlap=False)
        self.scoring = Scoring(scorers, lambda frames: frames, patience)
        self._weights = cache(_weights)  # columns share models; 1 to 2 GB/s

    def film(self, column: ColumnConfig, asked: Sequence[str], texts: Sequence[str], draw: int = 0) -> Film:
        """Every rank makes its share of what is missing; all get the whole.

        Args:
            column: whose model, sampled how.
            asked: what clips are scored against, and what names their noise.
            texts: what the model is given, one each.
            draw: 1 for the same once more, on other noise.

        Raises:
            Interrupted: a signal asked to stop.
            TrainingError: too many clips lack a score.
        """
        config, seed = self.config, self.config.seed + draw
        generation = how_sampled(config, column)
        decisive = dataclasses.replace(generation, batch_size=1, samples=1)
        judged = (*config.rewards, *config.voters)
        weights = self._weights(column.model, column.transformer, column.adapter)
        made_by = f"{weights} {configuration.fingerprint(decisive)} {seed} {judged}"
        name, slug = (f"{column.name}, second noise", column.slug + SECOND) if draw else (column.name, column.slug)
        takes = self._takes(slug, asked, texts, made_by)
        own = [take for take in takes[distributed.rank() :: distributed.world_size()] if take.known is None]
        if own:
            dtype = generation.weights_dtype(self.device)
            folder = load_served(column.model, column.transformer, column.adapter, dtype, self.device)
            generator = Generator(folder, generation, seed)
            size, silent = generation.batch_size, 0
            batches = [own[start : start + size] for start in range(0, len(own), size)]
            with stop_on_signals() as stop:
                for batch in track(batches, f"filming {name}", total=len(batches)):
                    silent += self._shoot(generator, batch, stop)
                    self._check_silence(silent, len(own), name)
        distributed.barrier()
        return self._gather(takes, generation.video.fps)

    def _takes(self, slug: str, asked: Sequence[str], texts: Sequence[str], made_by: str) -> list[_Take]:
        clips, scores = (make_folder(self.config.output / kind / slug) for kind in ("clips", "scores"))
        takes = []
        for place, (request, text) in enumerate(zip(asked, texts, strict=True)):
            for member in range(self.config.samples):
                stem = f"{place:04d}-{member}"
                identity = hashlib.sha256(json.dumps([made_by, request, text, member]).encode()).hexdigest()[:16]
                job = Job(text, member, request)
                takes.append(_Take(job, clips / f"{stem}.mp4", scores / f"{stem}.json", identity))
        return takes

    def _check_silence(self, silent: int, clips: int, name: str) -> None:
        """Stop early: a scorer that is broken at the first clip is broken at the last."""
        if silent > self.config.scoring.missing_limit * clips:
            raise TrainingError(
                f"{silent} of {clips} clips of {name!r} lack a score; last error: "
                f"{self.scoring.last_error or 'none, NaN is an answer too'}.",
                "Mend the scorer and run the same command: these clips are made again. Or raise scoring.missing_limit.",
            )

    def _shoot(self, generator: Generator, takes: Sequence[_Take], stop: StopRequest) -> int:
        """Make and score a batch; how many clips lack a score."""

        def check(_: int) -> None:
            if stop.requested:
                raise Interrupted(f"{stop.signal_name} arrived.", "Run the same command to film what is missing.")

        start = time.perf_counter()
        latents = generator.latents([take.job for take in takes], check)
        frames = decode_uint8(generator.folder.codec, latents)
        seconds = (time.perf_counter() - start) / len(takes)
        found = self.scoring.submit(torch.from_numpy(frames), [take.job.request for take in takes]).result()
        for place, (take, clip) in enumerate(zip(takes, frames, strict=True)):
            write_video(take.clip, clip, generator.config.video.fps)
            scores = {axis: each.values[place].item() for axis, each in found.items()}
            facts = {
                "identity": take.identity,
                "prompt": take.job.prompt,
                "request": take.job.request,
                "scores": {axis: None if math.isnan(score) else score for axis, score in scores.items()},
                "nfe": generator.num_evaluations,
                "token_forwards": generator.token_forwards,
                "seconds": seconds,
            }
            replace_file(take.scores, json.dumps(facts, ensure_ascii=False, indent=1))
        return int(torch.stack([~each.valid for each in found.values()]).any(0).sum())

    def _gather(self, takes: Sequence[_Take], fps: float) -> Film:
        facts = [json.loads(take.scores.read_text(encoding="utf-8")) for take in takes]
        scores = {axis: np.array([each["scores"][axis] for each in facts], np.float64) for axis in self.scoring.axes}
        labels = np.repeat(np.arange(len(takes) // self.config.samples), self.config.samples)
        seconds = float(np.mean([each["seconds"] for each in facts]))
        clips = tuple(take.clip for take in takes)
        return Film(scores, labels, clips, fps, facts[0]["nfe"], facts[0]["token_forwards"], seconds)


def how_sampled(config: JudgeConfig, column: ColumnConfig) -> GenerateConfig:
    """The folder's defaults with the column's settings and the recipe's size laid over them."""
    device = distributed.pick_device(config.device).type
    settings = (f"device={device}", f"batch_size={config.batch_size}", *column.settings)
    video = config.video or load_generation_defaults(config.columns[0].model).video
    return dataclasses.replace(resolve(load_generation_defaults(column.model), settings), video=video)


def _weights(model: Path, transformer: Path | None, adapter: Path | None) -> str:
    """Hash of what samples and decodes; the text encoder, 22 GB in Wan's, is taken as the folder's."""
    parts = [transformer or model / "transformer", model / "vae", model / "scheduler", *([adapter] if adapter else [])]
    return fingerprint_folders(model, *(part for part in parts if part.is_dir()))
