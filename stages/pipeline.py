"""``reelforge pipeline``: base, fine-tuned, aligned, with a rewriter, distilled, judged; each from the one before.

A stage is its own verb with the paths filled in. What it leaves is recorded with a hash: a folder that was changed
behind the pipeline's back is not built upon.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.bench.judge import judging
from reelforge.bench.judge.config import ColumnConfig, JudgeConfig
from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.engine.core.errors import CheckpointError, ConfigError, DataError, ReelforgeError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import training_time
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.io.model_files import fingerprint_folders, read_json
from reelforge.engine.model.folder import derive_model_folder
from reelforge.engine.model.lora import load_adapter, merge
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.rl import recipe
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.stages import cache, distill, distill_config, enhance, enhance_config, rlhf, sft
from reelforge.stages.cache import CacheConfig
from reelforge.stages.console import emit
from reelforge.stages.distill_config import DistillConfig
from reelforge.stages.enhance_config import EnhanceConfig
from reelforge.stages.sft import SftConfig

# What the pipeline fills in, by stage; a recipe need not say it.
_FILLED: dict[str, tuple[str, ...]] = {
    "cache": ("model", "output"),
    "sft": ("model", "cache", "output"),
    "rlhf": ("model", "output"),
    "longer": ("model", "cache", "output"),
    "enhance": ("output", "grpo.generator"),
    "distill": ("teacher", "output"),
    "judge": ("output",),
}
STAGES = tuple(_FILLED)
_DOES = {
    "cache": "decoding, filtering and encoding the clips",
    "sft": "fine-tuning on the clips",
    "rlhf": "GRPO from rewards",
    "longer": "fine-tuning for as long as RLHF took, to compare with",
    "enhance": "a rewriter of prompts, from pairs and rewards",
    "distill": "a causal few-step student by self-forcing",
    "judge": "all models on the same prompts and noise",
}

_FACTS = ("artefact", "fingerprint", "seconds")  # what the record says of a stage


@dataclass(frozen=True)
class PipelineConfig:
    """The stages, each as its own recipe; a stage that is not there is skipped.

    Attributes:
        model: model folder to start from.
        output: the run directory; every stage has a folder in it.
        cache: clips to latents; skipped when ``sft.cache`` names a finished one.
        sft: supervised fine-tuning.
        rlhf: GRPO on the fine-tuned model.
        longer: fine-tuning continued, for as many steps as RLHF's seconds pay for, whatever its recipe says: what
            rewards are compared with.
        enhance: a rewriter for the aligned model.
        distill: a causal few-step student of the aligned model.
        judge: a report of them all, on requests with and without rewriting too where it names requests; the pipeline
            adds the columns.
    """

    model: Path
    output: Path
    cache: CacheConfig | None = None
    sft: SftConfig | None = None
    rlhf: RlhfConfig | None = None
    longer: SftConfig | None = None
    enhance: EnhanceConfig | None = None
    distill: DistillConfig | None = None
    judge: JudgeConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("The pipeline has no stage.", f"Add a table: {', '.join(STAGES)}.")
        if self.cache and not self.sft:
            raise ConfigError("The pipeline has [cache] and no [sft].", "Only fine-tuning reads a cache.")
        if self.sft and not self.cache and self.sft.cache == Path():
            raise ConfigError("The pipeline has [sft] and no latents.", "Add a table [cache], or set sft.cache.")
        if self.longer and not (self.sft and self.rlhf):
            raise ConfigError("The pipeline has [longer].", "It continues [sft] for the time of [rlhf]: add both.")

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that run, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)


@dataclass(frozen=True)
class Artefacts:
    """What a pipeline left.

    Attributes:
        models: model folders by stage, ``base`` first; the last is the one to serve.
        rewriter: of requests for these models; None without.
        seconds: of each stage, as far as this pipeline ran it.
    """

    models: dict[str, Path]
    rewriter: Path | None
    seconds: dict[str, float]


def load(path: Path, overrides: Sequence[str] = (), skip: Sequence[str] = ()) -> PipelineConfig:
    """Read a recipe; the paths that the pipeline fills in may be missing.

    Args:
        skip: stages to leave out.

    Raises:
        ConfigError: as :func:`reelforge.engine.core.config.load`.
    """
    table = configuration.read_table(path)
    for assignment in overrides:
        configuration.override(table, assignment)
    for name in skip:
        table.pop(name, None)
    for name in STAGES:
        for key in _FILLED[name] if name in table else ():
            _fill(table[name], key.split("."))
    return configuration.build(PipelineConfig, table)


def _fill(table: Any, keys: list[str]) -> None:
    for parent in keys[:-1]:
        table = table.get(parent) if isinstance(table, dict) else None
    if isinstance(table, dict):  # "none" leaves a stage or a phase out
        table.setdefault(keys[-1], "")


class Pipeline:
    """The stages, each a method that does nothing when its result is there.

    Args:
        config: the recipe.
        announce: told what begins.
    """

    def __init__(self, config: PipelineConfig, announce: Callable[[str], None] = say) -> None:
        self.config, self.root, self.announce = config, config.output, announce
        self.models = {"base": config.model}
        self.rewriter: Path | None = None
        self.latents = config.sft.cache if config.sft else Path()
        self._record = self.root / "pipeline.json"

    def run(self) -> Artefacts:
        """Every stage, in order.

        Raises:
            Interrupted: a signal asked to stop; calling again continues.
            DataError: what an earlier stage left has changed since.
            ConfigError, CheckpointError, StorageError, TrainingError: as named.
        """
        if self.config.judge:
            judging.read_words(self.config.judge)  # what is wrong with them is better known now than in a week
        with distributed.process_group(distributed.pick_device("auto")):
            self._note("base", self.config.model, 0.0)
            for name in self.config.stages:
                self.announce(f"{name}: {_DOES[name]}")
                start = time.monotonic()
                with _named(name):
                    artefact = getattr(self, f"_{name}")()
                if artefact:
                    self._note(name, artefact, time.monotonic() - start)
        seconds = {name: facts["seconds"] for name, facts in self._known().items() if name in self.config.stages}
        return Artefacts(self.models, self.rewriter, seconds)

    @property
    def newest(self) -> Path:
        """Model folder that the next stage starts from."""
        return [folder for name, folder in self.models.items() if name != "longer"][-1]

    def _cache(self) -> Path:
        assert self.config.cache is not None
        self.latents = self.root / "cache"
        if "cache" in self._known() and self.latents.exists():
            say(f"{self.latents} is finished.")  # clips and text encoder are needed no more
        elif distributed.rank() == 0:
            cache.run(dataclasses.replace(self.config.cache, model=self.newest, output=self.latents))
        distributed.barrier()
        return self.latents

    def _sft(self) -> Path:
        assert self.config.sft is not None
        config = dataclasses.replace(self.config.sft, model=self.newest, cache=self.latents, output=self.root / "sft")
        return self._finish("sft", sft.run(config).weights, self.newest)

    def _rlhf(self) -> Path:
        assert self.config.rlhf is not None
        config = dataclasses.replace(self.config.rlhf, model=self.newest, output=self.root / "rlhf")
        return self._finish("rlhf", rlhf.run(config).weights, self.newest)

    def _longer(self) -> Path:
        assert self.config.longer is not None
        steps, seconds = training_time(self.root / "sft" / "metrics.jsonl")
        _, paid = training_time(self.root / "rlhf" / "metrics.jsonl")
        tuned = self.models["sft"]
        config = dataclasses.replace(
            self.config.longer,
            model=tuned,
            cache=self.latents,
            output=self.root / "longer",
            train=dataclasses.replace(self.config.longer.train, steps=max(1, round(steps * paid / seconds))),
        )
        return self._finish("longer", sft.run(config).weights, tuned)

    def _enhance(self) -> Path:
        config = self.config.enhance
        assert config is not None
        grpo = config.grpo and dataclasses.replace(config.grpo, generator=self.newest)
        result = enhance.run(dataclasses.replace(config, grpo=grpo, output=self.root / "enhance"))
        self.rewriter = result.rewriter
        return result.rewriter

    def _distill(self) -> Path:
        assert self.config.distill is not None
        config = dataclasses.replace(self.config.distill, teacher=self.newest, output=self.root / "distill")
        self.models["distill"] = distill.run(config).model
        return self.models["distill"]

    def _judge(self) -> None:
        """Nothing is built upon a report: it may be made again, in other ways."""
        assert self.config.judge is not None
        config = dataclasses.replace(self.config.judge, output=self.root / "judge")
        given = dataclasses.replace(config, rewriter=self.rewriter, columns=self.columns(config.requests is not None))
        judging.run(given)

    def columns(self, requests: bool) -> tuple[ColumnConfig, ...]:
        """What a report compares: every model, then the served ones on requests, as they are and rewritten."""
        named = {"longer": "sft, longer", "distill": "student"}
        names = {stage: named.get(stage, stage) for stage in ("base", "sft", "longer", "rlhf", "distill")}
        against = {"sft": ("base",), "longer": ("sft",), "rlhf": ("sft", "longer"), "distill": ("rlhf",)}
        found = [
            ColumnConfig(
                names[stage],
                self.models[stage],
                tuple(names[other] for other in against.get(stage, ()) if other in self.models),
                metrics=self._metrics(stage),
            )
            for stage in names
            if stage in self.models
        ]
        for stage in ("rlhf", "distill") if requests else ():
            if stage in self.models:
                found += self._asked(names[stage], self.models[stage], {column.name for column in found})
        return tuple(found)

    def _asked(self, name: str, model: Path, known: set[str]) -> list[ColumnConfig]:
        """A model's columns on requests; the first ones are what later models' are compared with."""
        raw, rewritten = f"{name}, raw request", f"{name} + PE"
        before = {"student, raw request": ("rlhf, raw request",), "student + PE": ("rlhf + PE",)}
        columns = [ColumnConfig(raw, model, tuple(known & {*before.get(raw, ())}), "requests")]
        if self.rewriter:
            against = (raw, *(known & {*before.get(rewritten, ())}))
            trained = self._metrics("enhance") if name == "rlhf" else ()
            columns.append(ColumnConfig(rewritten, model, against, "rewritten", metrics=trained))
        return columns

    def _metrics(self, stage: str) -> tuple[Path, ...]:
        """Logs of a stage's runs, in order."""
        runs = {
            "distill": ("distill/causal_init", "distill/self_forcing"),
            "enhance": ("enhance/cold_start", "enhance/grpo"),
        }
        files = (self.root / run / "metrics.jsonl" for run in runs.get(stage, (stage,)))
        return tuple(file for file in files if file.exists())

    def _finish(self, name: str, weights: Path, origin: Path) -> Path:
        """The stage's model folder: ``origin`` with these weights, an adapter merged in."""
        folder = self.root / f"{name}_model"
        if not folder.exists() and distributed.rank() == 0:
            adapter = weights.name == "adapter"
            model = load_transformer(origin / "transformer" if adapter else weights)
            if adapter:
                load_adapter(model, weights)
                merge(model)
            derive_model_folder(origin, folder, model)
        distributed.barrier()
        self.models[name] = folder
        return folder

    def _note(self, name: str, artefact: Path, seconds: float) -> None:
        """Record what a stage left, or check it against the record.

        Raises:
            DataError: it is not what the stage left.
        """
        known, found = self._known(), _fingerprint(artefact)
        distributed.barrier()  # nobody writes before everybody has read
        if name in known:
            if known[name]["fingerprint"] != found:
                since, again = f"stage {name} left it", f"remove it and {self._record} to make it again"
                if name == "base":
                    since, again = "this pipeline was started", "choose another output"
                raise DataError(
                    f"{artefact} has changed since {since} ({known[name]['fingerprint']}, now {found}).",
                    f"Put it back, or {again}.",
                )
            return
        facts = {"artefact": str(artefact), "fingerprint": found, "seconds": seconds}
        if distributed.rank() == 0:
            replace_file(self._record, json.dumps({**known, name: facts}, indent=1))
        distributed.barrier()

    def _known(self) -> dict[str, Any]:
        """The record, by stage."""
        if not self._record.exists():
            return {}
        try:
            known = read_json(self._record)
            return {name: {key: known[name][key] for key in _FACTS} for name in known}
        except (CheckpointError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._record} is damaged.", "Remove it: what every stage left is then recorded as it is now."
            ) from error


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Errors say in which stage they came up."""
    try:
        yield
    except ReelforgeError as error:
        raise type(error)(f"Stage {stage}: {error.what}", error.hint) from error


def _fingerprint(folder: Path) -> str:
    """Hash of what a stage left; of a model all but the text encoder, 22 GB in Wan's, which no stage changes."""
    parts = (folder / name for name in ("transformer", "vae", "scheduler"))
    return fingerprint_folders(folder, *(part for part in parts if part.is_dir()))


def identity(config: PipelineConfig) -> str:
    """Hash of what decides the results. Which files a stage reads, it checks itself, by what is in them."""
    nowhere = Path()
    plain: dict[str, Any] = {
        "cache": config.cache and dataclasses.replace(config.cache, model=nowhere, output=nowhere),
        "sft": config.sft and dataclasses.replace(sft.decisive(config.sft), model=nowhere),
        "rlhf": config.rlhf and recipe.decisive(config.rlhf),
        "longer": config.longer and dataclasses.replace(sft.decisive(config.longer), model=nowhere),
        "enhance": config.enhance and enhance_config.decisive(config.enhance),
        "distill": config.distill and distill_config.decisive(config.distill),
        "judge": None,  # a finished pipeline may be judged again, in other ways
    }
    return configuration.fingerprint(dataclasses.replace(config, model=nowhere, output=nowhere, **plain))


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints what every stage left."""
    config = load(arguments.recipe, arguments.overrides, arguments.skip)
    if not config.model.is_dir():
        raise ConfigError(f"{config.model} is no folder.", "Give a model folder in diffusers' layout.")
    with distributed.process_group(distributed.pick_device("auto")):
        if distributed.rank() == 0:
            try:
                RunDir.open(config.output, config, identity(config))
            except ConfigError as error:
                raise ConfigError(error.what, "Choose another output, or remove the folder.") from error
        distributed.barrier()
        made = Pipeline(config).run()
    models = {name: str(path) for name, path in made.models.items()}
    emit(json.dumps({"models": models, "rewriter": made.rewriter and str(made.rewriter), "seconds": made.seconds}))
    return 0
