"""Models of a finished demo, judged as its report judges them: same prompts, noise, truth, panel and intervals.

A study compares all of its arms with one of the demo's models, the reference.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from reelforge.bench.evaluation import (
    FRECHET,
    REWARDS,
    VOTERS,
    Evaluation,
    EvaluationConfig,
    Measured,
    recovery,
)
from reelforge.bench.exam import Exam
from reelforge.bench.judge.bootstrap import Interval
from reelforge.bench.judge.gsb import Gsb, compare, fix_panel
from reelforge.bench.judge.results import Score
from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.weights import load_transformer

UNGUIDED = ("guidance_scale=1.0",)


@dataclass(frozen=True)
class Verdict:
    """A model against the reference, clip by clip.

    Attributes:
        nfe: network evaluations a video.
        token_forwards: tokens through the network a video.
        seconds_per_video: sampling and decoding.
        scores: with paired changes; none for the reference itself.
        gain: mean change of the rewards, in standard deviations of the reference's clips.
        gsb: by held-out voters, and by the rewards that training optimised.
        frechet_ratio: distance to the truth over the reference's.
        recovery: of each reward, (model - floor) / (reference - floor) with clean clips of other prompts for the
            floor; without those whose floor is above the reference.
    """

    nfe: int
    token_forwards: int
    seconds_per_video: float
    scores: Mapping[str, Score]
    gain: float
    gsb: Mapping[str, Gsb]
    frechet_ratio: float
    recovery: Mapping[str, Interval]


class Examiner:
    """Judges models of one demo. Scores are kept in ``out/evaluations``: a model is sampled once.

    Args:
        demo: folder of a finished demo.
        out: where scores are kept.
        samples: clips a prompt; None is as many as the demo's report takes.
        reference: name of the demo's model that all others are compared with.
        settings: how it is sampled.

    Raises:
        ConfigError: the demo is not there.
    """

    def __init__(
        self,
        demo: Path,
        out: Path,
        samples: int | None,
        reference: str = "sft",
        settings: tuple[str, ...] = UNGUIDED,
    ) -> None:
        recipe, folder = demo / "config.resolved.toml", demo / f"{reference}_model"
        if not folder.exists() or not recipe.exists():
            raise ConfigError(f"{demo} is no finished demo.", "Run `reelforge demo`, or name its folder with --demo.")
        table = configuration.read_table(recipe)
        config = configuration.build(EvaluationConfig, table["evaluation"])
        self.config = replace(config, samples=samples or config.samples)
        self.seed: int = table["seed"]
        self.kept = make_folder(out / "evaluations")
        self.name, self.settings, self.folder = reference, settings, ModelFolder.load(folder)
        self._prepare(ModelFolder.load(demo / "base_model"))

    def _prepare(self, base: ModelFolder) -> None:
        """The exam, the reference's clips and both panels, from two draws of the base model."""
        self.exam = Exam(self.config, base, self.seed)
        self.prompts, self.truth = self.exam.prompts, self.exam.table(self.exam.truth)
        first, second = (self._sample(f"base draw {n}", base, UNGUIDED, n).measured.scores for n in (0, 1))
        open_rewards = tuple(replace(reward, target=False) for reward in REWARDS)
        voters = {"held-out voters": (*REWARDS, *VOTERS), "optimised rewards": open_rewards}
        self.panels = {source: fix_panel(first, second, verifiers) for source, verifiers in voters.items()}
        self.reference = self._sample(self.name, self.folder, self.settings).measured
        self.distance = self.exam.judge.distance(self.reference.features)
        self.scale = {reward.name: float(np.nanstd(self.reference.scores[reward.name])) for reward in REWARDS}

    def verdict(self, name: str, transformer: Path | None = None, settings: tuple[str, ...] = UNGUIDED) -> Verdict:
        """Judge weights of the reference's shape.

        Args:
            name: of its scores' file.
            transformer: its weights; None is the reference's.
            settings: how it is sampled, over the folder's defaults.
        """
        folder = replace(self.folder, transformer=load_transformer(transformer)) if transformer else self.folder
        return self._judge(name, folder, settings, transformer is None and settings == self.settings)

    def verdict_of_folder(self, name: str, root: Path, settings: tuple[str, ...] = ()) -> Verdict:
        """Judge a model folder, sampled as it says unless ``settings`` says otherwise."""
        return self._judge(name, ModelFolder.load(root), settings)

    def _judge(self, name: str, folder: ModelFolder, settings: tuple[str, ...], same: bool = False) -> Verdict:
        evaluation = self._sample(name, folder, settings)
        measured, below = evaluation.measured, self.reference
        scores = self.exam.table(measured, None if same else below)
        gains = [
            np.nanmean(measured.scores[axis] - below.scores[axis]) / scale
            for axis, scale in self.scale.items()
            if scale
        ]
        gsb = {
            source: compare(measured.scores, below.scores, measured.labels, panel, self.name, self.seed)
            for source, panel in self.panels.items()
        }
        ratio = scores[FRECHET.name].mean / self.distance
        kept = {
            axis: recovery(measured, below, self.exam.floor, axis, self.seed)
            for axis in self.scale
            if self._above(axis)
        }
        return Verdict(
            evaluation.nfe, evaluation.token_forwards, evaluation.seconds_per_video, scores, float(np.mean(gains)), gsb,
            ratio, kept,
        )  # fmt: skip

    def _above(self, axis: str) -> bool:
        """Whether the reference is above the floor, so that there is a way to go."""
        return bool(np.nanmean(self.reference.scores[axis]) > np.nanmean(self.exam.floor.scores[axis]))

    def _sample(self, name: str, folder: ModelFolder, settings: tuple[str, ...], draw: int = 0) -> Evaluation:
        """Sample and measure, or read what an earlier call measured of the same; without the clips."""
        path = self.kept / f"{name.replace(' ', '_').replace(',', '')}.safetensors"
        key = _key(folder, [settings, self.config.samples, self.prompts, self.seed, draw])
        if path.exists():
            with safe_open(path, "pt") as kept:
                facts, found = kept.metadata(), {of: kept.get_tensor(of) for of in kept.keys()}  # noqa: SIM118  (no mapping)
            if facts["key"] == key:
                features = found.pop("features")
                measured = Measured(
                    torch.empty(0), self.exam.asked, {of: v.numpy() for of, v in found.items()}, features
                )
                return Evaluation(measured, int(facts["nfe"]), int(facts["token_forwards"]), float(facts["seconds"]))
        made = self.exam.evaluate(folder, settings, f"sampling {name}", draw)
        facts = {
            "key": key,
            "nfe": str(made.nfe),
            "token_forwards": str(made.token_forwards),
            "seconds": repr(made.seconds_per_video),
        }
        tensors = {of: torch.from_numpy(values) for of, values in made.measured.scores.items()}
        replace_file(path, save({"features": made.measured.features.contiguous(), **tensors}, facts))
        return replace(made, measured=replace(made.measured, videos=torch.empty(0)))


def _key(folder: ModelFolder, asked: list[object]) -> str:
    """Names what was sampled: weights, schedule, and how."""
    digest = hashlib.sha256(json.dumps([asdict(folder.defaults), folder.codec.fingerprint, asked]).encode())
    for weight in folder.transformer.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()
