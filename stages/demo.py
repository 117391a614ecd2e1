"""``reelforge demo``: the whole pipeline on a miniature Wan, from mp4 files to a student, and the judging of it all.

The demo makes what a user brings: clips, requests, a base model and a small language model. The rest is the pipeline
that post-trains Wan2.1. Every phase leaves its result in the folder, so an interrupted demo goes on where it stopped.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from reelforge.bench.demo_report import Entrant, judge_and_report
from reelforge.bench.evaluation import EvaluationConfig
from reelforge.bench.judge.columns import Training
from reelforge.bench.rewrites import trained
from reelforge.bench.toy import make
from reelforge.bench.toy.make import SamplingDefaults, WorldConfig
from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.data.filters import FilterConfig
from reelforge.engine.enhance.language_model import TinyLanguageModelConfig
from reelforge.engine.model.codec import CodecConfig
from reelforge.engine.model.folder import derive_model_folder
from reelforge.engine.model.text import SeededTextConfig
from reelforge.engine.model.wan_config import WanConfig
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.engine.train.flow_loss import FlowLossConfig
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig
from reelforge.stages import cache, sft
from reelforge.stages.console import emit
from reelforge.stages.distill_config import DistillConfig
from reelforge.stages.enhance_config import EnhanceConfig
from reelforge.stages.pipeline import Pipeline, PipelineConfig
from reelforge.stages.sft import SftConfig, ValidationConfig

_PHASES = 10
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


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
        base: pretraining on the flawed set.
        sft: fine-tuning on the curated one.
        longer: more of it, as :class:`~reelforge.stages.pipeline.PipelineConfig` says.
        language_model: what becomes the rewriter.
        pairs: of request and caption for each training scene, the rewriter's first lessons.
        rlhf, enhance, distill: the miniature's recipes, with what the demo's recipe sets laid over them.
    """

    seed: int
    world: WorldConfig
    text: SeededTextConfig
    transformer: WanConfig
    sampling: SamplingDefaults
    base: TrainingBudget
    sft: TrainingBudget
    longer: TrainingBudget
    rlhf: RlhfConfig
    enhance: EnhanceConfig
    distill: DistillConfig
    evaluation: EvaluationConfig
    language_model: TinyLanguageModelConfig = TinyLanguageModelConfig()
    pairs: int = 6
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
        self._announce("rendering clips to mp4 files, writing requests")
        config, root = self.config, self.root
        make.render_clips(self.videos, config.world, config.seed)
        make.write_requests(root, config.seed, config.pairs)
        self._announce("fitting the codec, fresh models of video and language")
        make.make_language_model(root / "language_model", config.language_model, root / "pairs.jsonl", config.seed)
        make.make_model(
            self.model, self.videos / "base", config.world, config.transformer, config.codec, config.text,
            config.sampling, config.seed,
        )  # fmt: skip
        self._announce("decoding, filtering and encoding the clips")
        self._cache("base", FilterConfig())
        self._cache("curated", config.filters)
        self._announce("base: pretraining on the flawed set")
        base = self._train("base", config.base, self.model, "base")
        pipeline = Pipeline(self._pipeline(base), self._announce)
        pipeline.run()
        self._announce("sampling held-out prompts and requests, scoring, reporting")
        return self._judge(pipeline)

    def _pipeline(self, base: Path) -> PipelineConfig:
        """The pipeline on what the demo made."""
        config, root = self.config, self.root
        aligning, enhancing = config.rlhf, config.enhance
        assert enhancing.cold_start and enhancing.grpo, "the miniature's rewriter has both phases"
        lessons = dataclasses.replace(enhancing.cold_start, pairs=root / "pairs.jsonl")
        filming = dataclasses.replace(enhancing.grpo, requests=root / "requests.txt")
        return PipelineConfig(
            model=base,
            output=root,
            sft=self._sft("sft", config.sft, base, "curated"),
            rlhf=dataclasses.replace(aligning, prompts=root / "rl_prompts.txt"),
            longer=self._sft("longer", config.longer, base, "curated"),
            enhance=dataclasses.replace(
                enhancing, language_model=root / "language_model", cold_start=lessons, grpo=filming
            ),
            distill=dataclasses.replace(config.distill, prompts=root / "rl_prompts.txt"),
        )

    def _judge(self, pipeline: Pipeline) -> Path:
        """Every column of the report: captions first, then requests with and without rewriting."""
        assert pipeline.rewriter is not None
        ways = {"prompts": None, "requests": list, "rewritten": trained(pipeline.rewriter)}
        entrants = {
            column.name: Entrant(
                column.model,
                column.against,
                Training(column.metrics) if column.metrics else None,
                "rlhf" if column.name == "student" else None,
                ways[column.asked],
            )
            for column in pipeline.columns(requests=True)
        }
        config = self.config
        return judge_and_report(config.evaluation, entrants, self.root, config, config.seed)

    def _announce(self, what: str) -> None:
        self._phase += 1
        say(f"[{self._phase}/{_PHASES}] {what} ({time.monotonic() - self._start:.0f} s so far)")

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
        folder, result = self.root / f"{name}_model", sft.run(self._sft(name, budget, model, data))
        if not folder.exists():
            derive_model_folder(model, folder, load_transformer(result.weights))
        return folder

    def _sft(self, name: str, budget: TrainingBudget, model: Path, data: str) -> SftConfig:
        return SftConfig(
            model=model,
            cache=self.root / "cache" / data,
            output=self.root / name,
            loss=budget.loss,
            train=budget.train,
            optimizer=budget.optimizer,
            validation=budget.validation,
            device="cpu",
        )


def load_config(quick: bool, overrides: list[str]) -> DemoConfig:
    """The packaged recipe, or its quick variant."""
    table = configuration.read_table(RECIPES / ("demo_quick.toml" if quick else "demo.toml"))
    for assignment in overrides:
        configuration.override(table, assignment)
    return configuration.build(DemoConfig, table)


def main(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.quick, [f"seed={arguments.seed}", *arguments.overrides])
    start = time.monotonic()
    try:
        RunDir.open(arguments.out, config)
    except ConfigError as error:
        raise ConfigError(error.what, "Give another --out, or remove the folder.") from error
    report = Demo(config, arguments.out).run()
    emit(f"{report} is written after {time.monotonic() - start:.0f} s; the numbers are in {report.parent}/results.json")
    return 0
