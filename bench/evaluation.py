"""A model on held-out prompts of the toy world: clips, scores of every verifier, cost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reelforge.bench.judge.bootstrap import Interval, ratio_interval
from reelforge.bench.judge.gsb import Verifier
from reelforge.bench.judge.results import Score, score_clips, score_set
from reelforge.bench.toy.held_out import Basis, HeldOut, frechet
from reelforge.bench.toy.render import render
from reelforge.bench.toy.verifiers import ToyVerifier
from reelforge.bench.toy.world import Scene, captions, scenes
from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.progress import track
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import Generator, Job, decode_uint8, resolve

# Rewards are what a later stage trains on: they never vote. Nor does what shares their fit (background, rim,
# accuracies), nor what a blurred clip wins (manifold and flicker themselves).
REWARDS = (
    Verifier("vq", "higher", target=True, unit="x10 dB"),
    Verifier("mq", "higher", target=True),
    Verifier("ta", "higher", target=True),
)
VOTERS = (
    Verifier("strangeness", "lower", target=False),
    Verifier("manifold_gap", "lower", target=False, unit="%"),
    Verifier("flicker_gap", "lower", target=False),
)
MEASURES = (
    Verifier("manifold", "lower", target=False, unit="%"),
    Verifier("flicker", "lower", target=False),
    Verifier("background", "lower", target=False, unit="%"),
    Verifier("rim", "lower", target=False, unit="%"),
)
ACCURACIES = tuple(
    Verifier(f"accuracy_{factor}", "higher", target=False)
    for factor in ("colour", "shape", "motion", "speed", "background")
)
FRECHET = Verifier("frechet", "lower", target=False)
TRUTH_SAMPLES = 12  # clean clips a prompt that sets of clips are compared with
_MEASURE_BATCH = 128


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is sampled.

    Attributes:
        prompts: held-out scenes, one caption each.
        samples: clips per prompt.
        batch_size: clips a forward.
        calibration_clips: clips per row of known quality.
    """

    prompts: int
    samples: int
    batch_size: int
    calibration_clips: int = 128


@dataclass(frozen=True)
class Measured:
    """Clips and what the verifiers say of each.

    Attributes:
        videos: uint8 ``[N, F, H, W, 3]``.
        prompts: N prompts.
        scores: verifier to float ``[N]``, NaN where missing.
        features: ``[N, D]`` for the Frechet distance.
    """

    videos: Tensor
    prompts: list[str]
    scores: dict[str, np.ndarray]
    features: Tensor

    @property
    def labels(self) -> np.ndarray:
        """``[N]`` prompt ids, the unit of every bootstrap."""
        return np.unique(np.array(self.prompts), return_inverse=True)[1]


@dataclass(frozen=True)
class Evaluation:
    """A model's clips, measured, and what they cost.

    Attributes:
        nfe: network evaluations a video.
        token_forwards: tokens through the network a video.
        seconds_per_video: sampling and decoding.
    """

    measured: Measured
    nfe: int
    token_forwards: int
    seconds_per_video: float


class Judge:
    """Every verifier of the toy world behind one call.

    Args:
        basis: of the held-out measures.
        spec: the clip size.
    """

    def __init__(self, basis: Basis, spec: VideoSpec) -> None:
        self.rewards, self.held_out = ToyVerifier(spec), HeldOut(basis, spec)
        self._truth: dict[str, float] = {}
        self._reference = (basis.truth_mean, basis.truth_covariance)

    def calibrate(self, videos: Tensor, prompts: Sequence[str], others: Tensor) -> Measured:
        """Measure the truth, and judge every later clip's texture, flicker and Frechet distance against it.

        Args:
            videos: clean clips of N prompts, uint8 ``[N, F, H, W, 3]``.
            others: further clean clips of the same scenes, ``[M, F, H, W, 3]``: what sets of clips are compared with.
        """
        features = self.held_out.features(others)
        self._reference = features.mean(0), torch.cov(features.T)
        truth = self.measure(videos, prompts)
        self._truth = {name: float(np.nanmean(truth.scores[name])) for name in ("manifold", "flicker")}
        return self.measure(videos, prompts)

    def measure(self, videos: Tensor, prompts: Sequence[str]) -> Measured:
        """Score uint8 ``[N, F, H, W, 3]`` against N prompts."""
        parts = [
            self._measure(videos[start : start + _MEASURE_BATCH], prompts[start : start + _MEASURE_BATCH])
            for start in range(0, len(videos), _MEASURE_BATCH)
        ]
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        features = self.held_out.features(videos)
        # True clips have independent standard normal features: 1 is typical, more is unlike any of them.
        scores["strangeness"] = features.square().mean(1).numpy()
        scores |= {f"{name}_gap": np.abs(scores[name] - mean) for name, mean in self._truth.items()}
        return Measured(videos, list(prompts), scores, features)

    def _measure(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        fit = self.rewards.fit(videos)
        scores = self.rewards.score_fit(fit, prompts) | self.held_out.measure(videos, prompts, fit)
        return {name: score.values.numpy().astype(np.float64) for name, score in scores.items()}

    def distance(self, features: Tensor) -> float:
        """Frechet distance of a set's features ``[N, D]`` to the truth's; a finite set of true clips is not at 0."""
        return frechet(features.mean(0), torch.cov(features.T), *self._reference)

    def floor(self, truth: Measured) -> Measured:
        """Clean clips under other clips' prompts: perfect pictures of the wrong thing."""
        return self.measure(truth.videos.roll(len(truth.videos) // 2, 0), truth.prompts)

    def table(self, measured: Measured, seed: int, reference: Measured | None = None) -> dict[str, Score]:
        """Means with 95 % intervals over prompts, and paired changes to ``reference``."""
        below = reference.scores if reference else None
        present = [v for v in (*REWARDS, *VOTERS, *MEASURES, *ACCURACIES) if np.isfinite(measured.scores[v.name]).any()]
        clip_level = score_clips(measured.scores, measured.labels, present, seed, below)
        frechet = score_set(
            lambda clips: self.distance(measured.features[clips]),
            measured.labels,
            FRECHET,
            seed,
            (lambda clips: self.distance(reference.features[clips])) if reference else None,
        )
        return {**clip_level, FRECHET.name: frechet}


def recovery(student: Measured, teacher: Measured, floor: Measured, axis: str, seed: int) -> Interval:
    """How far a student got from the floor to its teacher, (student - floor) / (teacher - floor): 1 is level."""
    low = floor.scores[axis]
    above, below = student.scores[axis] - low, teacher.scores[axis] - low
    return ratio_interval(above, below, student.labels, seed)


def held_out_prompts(count: int) -> list[tuple[Scene, str]]:
    """``count`` scenes that no training saw, each with one caption that names all five factors.

    Raises:
        ConfigError: there are not so many.
    """
    every = scenes("held_out")
    if not 0 < count <= len(every):
        raise ConfigError(f"evaluation.prompts is {count}.", f"The world holds out {len(every)} scenes.")
    order = rng.generator("held_out_prompts", 1).permutation(len(every))[:count]
    return [(every[place], captions(every[place])[3 + index % 4]) for index, place in enumerate(order)]


def truth_clip(scene: Scene, member: int, spec: VideoSpec, seed: int) -> Tensor:
    """A clean rendering of a scene, uint8 ``[F, H, W, 3]``."""
    name = rng.key("truth:" + " ".join((scene.shape, scene.colour, scene.motion, scene.speed, scene.background)), seed)
    return torch.from_numpy(render(scene, spec, rng.generator("truth", name, member)))


def truth_clips(prompts: Sequence[tuple[Scene, str]], members: range, spec: VideoSpec, seed: int) -> Tensor:
    """Clean renderings of each scene, scene by scene, uint8 ``[len(prompts) * len(members), F, H, W, 3]``."""
    return torch.stack([truth_clip(scene, member, spec, seed) for scene, _ in prompts for member in members])


@torch.no_grad()
def evaluate(
    folder: ModelFolder,
    judge: Judge,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    batch_size: int,
    label: str,
    settings: Sequence[str] = (),
    written: Sequence[str] | None = None,
) -> Evaluation:
    """Sample ``samples`` clips per prompt as ``generate`` does, and measure them.

    Args:
        prompts: what is asked for; clips are measured against it, and it names their noise.
        written: what the model is given in its place, one a prompt; None is the prompt itself.
        label: of the progress line.
        settings: ``key=value`` laid over the folder's defaults, as ``generate --set``.
    """
    generator = Generator(folder, resolve(folder.defaults, settings), seed)
    texts = zip(written or prompts, prompts, strict=True)
    jobs = [Job(text, member, prompt) for text, prompt in texts for member in range(samples)]
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    start, clips = time.perf_counter(), []
    for batch in track(batches, label, total=len(batches)):
        clips.append(torch.from_numpy(decode_uint8(folder.codec, generator.latents(batch))))
    seconds = (time.perf_counter() - start) / len(jobs)
    measured = judge.measure(torch.cat(clips), [job.request for job in jobs])
    return Evaluation(measured, generator.num_evaluations, generator.token_forwards, seconds)


def chunk_seconds(folder: ModelFolder, prompt: str, settings: Sequence[str] = (), repeats: int = 5) -> list[float]:
    """How long each chunk of one video takes to denoise, the pass that writes the chunk before included; medians."""
    generator = Generator(folder, resolve(folder.defaults, settings), 0)
    runs = []
    for _ in range(repeats):
        marks = [time.perf_counter()]

        def mark(done: int, marks: list[float] = marks) -> None:
            if done == generator.grid.num_steps:
                marks.append(time.perf_counter())

        generator.latents([Job(prompt, 0)], mark)
        runs.append(np.diff(marks))
    return np.median(runs, axis=0).tolist()
