"""``reelforge demo``: a miniature Wan learns from mp4 files, better ones and rewards, is distilled, and is judged.

Nothing here is special to the miniature but its recipe: clips are decoded, filtered and cached, models trained and
sampled by the stages that do it for Wan2.1. Every phase leaves its result in the folder, so an interrupted demo goes
on where it stopped.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reelforge.bench.demo_report import Entrant, StageCost, judge_and_report
from reelforge.bench.evaluation import EvaluationConfig
from reelforge.bench.toy import render
from reelforge.bench.toy.world import captions, scenes
from reelforge.engine.core import config as configuration
from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import training_time
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data.clips import load_clip
from reelforge.engine.data.filters import FilterConfig
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model import codec_fit
from reelforge.engine.model.codec import CodecConfig
from reelforge.engine.model.folder import GenerationDefaults, ModelFolder, derive_model_folder
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.engine.train.flow_loss import FlowLossConfig
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig
from reelforge.stages import cache, distill, rlhf, sft
from reelforge.stages.console import emit
from reelforge.stages.distill import DistillResult
from reelforge.stages.distill_config import DistillConfig
from reelforge.stages.sft import SftConfig, ValidationConfig

_GUIDED = 2.0  # the guidance at which the fine-tuned model is at its best: RLHF at 1 is judged against that too
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class WorldConfig:
    """The toy world's files.

    Attributes:
        base_clips: broad and flawed clips.
        curated_clips: rightly described ones, before filtering.
        codec_clips: clips of the base set that the codec is fitted to.
        video: what every clip is brought to.
    """

    base_clips: int
    curated_clips: int
    codec_clips: int
    video: VideoSpec = render.TOY_SPEC


@dataclass(frozen=True)
class SamplingDefaults:
    """How the miniature is sampled, as in a model folder."""

    num_steps: int
    guidance_scale: float
    schedule: FlowSchedule


@dataclass(frozen=True)
class TrainingBudget:
    """The part of an :class:`~reelforge.stages.sft.SftConfig` that a demo's recipe sets."""

    train: LoopConfig
    optimizer: OptimizerConfig
    loss: FlowLossConfig = FlowLossConfig()
    validation: ValidationConfig = ValidationConfig(clips=32)


@dataclass(frozen=True)
class DemoConfig:
    """The whole demo; see recipes/demo.toml.

    Attributes:
        rlhf: recipes/rlhf_miniature.toml, with what the demo's recipe sets laid over it.
        distill: recipes/distill_miniature.toml, likewise.
    """

    seed: int
    world: WorldConfig
    text: SeededTextConfig
    transformer: WanConfig
    sampling: SamplingDefaults
    base: TrainingBudget
    sft: TrainingBudget
    rlhf: RlhfConfig
    distill: DistillConfig
    evaluation: EvaluationConfig
    codec: CodecConfig = CodecConfig()
    filters: FilterConfig = field(default_factory=FilterConfig)


class Demo:
    """The phases, each a method that does nothing when its result is there.

    Args:
        config: the recipe.
        root: the demo's folder.
    """

    def __init__(self, config: DemoConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.videos, self.model = root / "videos", root / "model"
        self._phase, self._start = 0, time.monotonic()

    def run(self) -> Path:
        """Everything, in order; returns the report's path."""
        self._announce("rendering clips to mp4 files")
        self._render()
        self._announce("fitting the codec, and a fresh model folder")
        self._make_model()
        self._announce("decoding, filtering and encoding the clips")
        self._cache("base", FilterConfig())
        self._cache("curated", self.config.filters)
        self._announce("base: pretraining on the flawed set")
        base = self._train("base", self.config.base, self.model, "base")
        self._announce("sft: fine-tuning on the curated set")
        tuned = self._train("sft", self.config.sft, base, "curated")
        self._announce("rlhf: GRPO from three rewards")
        aligned = self._align(tuned)
        self._announce("distill: a causal few-step student by self-forcing")
        distilled = self._distill(aligned)
        self._announce("sampling held-out prompts, scoring, reporting")
        guided, teacher = _guidance(_GUIDED), f"rlhf, guidance {self._teaching:g}"
        entrants = {
            "base": Entrant(base, (), self._cost("base")),
            "sft": Entrant(tuned, ("base",), self._cost("sft")),
            f"sft, guidance {_GUIDED:g}": Entrant(tuned, ("sft",), settings=guided),
            "rlhf": Entrant(aligned, ("sft", f"sft, guidance {_GUIDED:g}"), self._cost("rlhf")),
            teacher: Entrant(aligned, ("rlhf",), settings=_guidance(self._teaching)),
            "student": Entrant(distilled.model, (teacher, "rlhf"), self._student_cost(distilled), teacher=teacher),
        }
        return judge_and_report(self.config.evaluation, entrants, self.root, self.config, self.config.seed)

    def _announce(self, what: str) -> None:
        self._phase += 1
        say(f"[{self._phase}/8] {what} ({time.monotonic() - self._start:.0f} s so far)")

    def _render(self) -> None:
        world, seed = self.config.world, self.config.seed
        sets = {"base": (world.base_clips, render.WEB), "curated": (world.curated_clips, render.CAPTIONED)}
        for number, (name, (count, rates)) in enumerate(sets.items()):
            folder = self.videos / name
            if len(list(folder.glob("*.txt"))) < count:
                folder.mkdir(parents=True, exist_ok=True)
                set_seed = rng.key("demo_set", seed, number)
                render.write_flawed(folder, count, set_seed, "train", rates, world.video)

    def _make_model(self) -> None:
        if self.model.exists():
            return
        config = self.config
        paths = sorted((self.videos / "base").glob("*.mp4"))[: config.world.codec_clips]
        clips = np.stack([load_clip(path, config.world.video)[0] for path in paths])
        defaults = GenerationDefaults(
            video=config.world.video,
            schedule=config.sampling.schedule,
            num_steps=config.sampling.num_steps,
            guidance_scale=config.sampling.guidance_scale,
            negative_prompt="",
        )
        ModelFolder(
            WanTransformer.from_config(config.transformer.to_dict(), config.seed),
            codec_fit.fit(config.codec, clips, config.seed),
            SeededTextEncoder(config.text),
            defaults,
        ).save(self.model)

    def _cache(self, name: str, filters: FilterConfig) -> None:
        cache.run(
            cache.CacheConfig(
                data=self.videos / name,
                model=self.model,
                output=self.root / "cache" / name,
                video=self.config.world.video,
                filters=filters,
                precision="float32",
                batch_size=64,
                device="cpu",
            )
        )

    def _train(self, name: str, budget: TrainingBudget, model: Path, data: str) -> Path:
        """Run the SFT driver; returns the trained model's folder."""
        folder = self.root / f"{name}_model"
        result = sft.run(
            SftConfig(
                model=model,
                cache=self.root / "cache" / data,
                output=self.root / name,
                loss=budget.loss,
                train=budget.train,
                optimizer=budget.optimizer,
                validation=budget.validation,
                device="cpu",
            )
        )
        if not folder.exists():
            derive_model_folder(model, folder, load_transformer(result.weights))
        return folder

    def _align(self, model: Path) -> Path:
        """Run the RLHF driver on one caption of every training scene; returns the aligned model's folder."""
        prompts, folder = self.root / "rl_prompts.txt", self.root / "rlhf_model"
        if not prompts.exists():
            texts = [captions(scene)[3 + index % 4] for index, scene in enumerate(scenes("train"))]
            replace_file(prompts, "\n".join(texts) + "\n")
        config = dataclasses.replace(self.config.rlhf, model=model, prompts=prompts, output=self.root / "rlhf")
        result = rlhf.run(config)
        if not folder.exists():
            derive_model_folder(model, folder, load_transformer(result.weights))
        return folder

    @property
    def _teaching(self) -> float:
        """The guidance of the samples that the student starts from: the aligned model at its best."""
        phase = self.config.distill.causal_init
        return (phase.pairs.guidance_scale if phase else None) or self.config.sampling.guidance_scale

    def _distill(self, teacher: Path) -> DistillResult:
        """Run the distillation driver on the prompts of RLHF."""
        config = dataclasses.replace(
            self.config.distill, teacher=teacher, prompts=self.root / "rl_prompts.txt", output=self.root / "student"
        )
        return distill.run(config)

    def _student_cost(self, result: DistillResult) -> StageCost:
        steps = sum(metrics["step"] for metrics in result.metrics.values())
        last = list(result.metrics)[-1]
        return StageCost(steps, sum(result.seconds.values()), self.root / "student" / last / "metrics.jsonl")

    def _cost(self, name: str) -> StageCost:
        metrics = RunDir(self.root / name).metrics
        return StageCost(*training_time(metrics), metrics)


def _guidance(scale: float) -> tuple[str, ...]:
    return (f"guidance_scale={scale}",)


def load_config(quick: bool, overrides: list[str]) -> DemoConfig:
    """The packaged recipe, or its quick variant."""
    table = configuration.read_table(RECIPES / ("demo_quick.toml" if quick else "demo.toml"))
    aligning = configuration.read_table(RECIPES / "rlhf_miniature.toml") | {"held_out": "none"}
    table["rlhf"] = configuration.merge(aligning, table.get("rlhf", {}))
    distilling = configuration.read_table(RECIPES / "distill_miniature.toml")
    table["distill"] = configuration.merge(distilling, table.get("distill", {}))
    for assignment in overrides:
        configuration.override(table, assignment)
    return configuration.build(DemoConfig, table)


def main(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.quick, [f"seed={arguments.seed}"])
    start = time.monotonic()
    try:
        RunDir.open(arguments.out, config)
    except ConfigError as error:
        raise ConfigError(error.what, "Give another --out, or remove the folder.") from error
    report = Demo(config, arguments.out).run()
    emit(f"{report} is written after {time.monotonic() - start:.0f} s; the numbers are in {report.parent}/results.json")
    return 0
