"""From a recipe to the parts of a rewriter's training."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.progress import say
from reelforge.engine.enhance.dialogue import Dialogue
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.pairs import read_pairs
from reelforge.engine.enhance.rewriter import Rewriter, RewriterConfig
from reelforge.engine.enhance.structure import Structure
from reelforge.engine.io.model_files import fingerprint_folders
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import Generator, decode_uint8, resolve
from reelforge.engine.rewards.registry import build_scorers
from reelforge.engine.rewards.scoring import Scoring
from reelforge.engine.rl.advantage import Fusion
from reelforge.engine.rl.cold_start import ColdStartTask
from reelforge.engine.rl.filming import Filming, Take, rank_correlation
from reelforge.engine.rl.origin import digest
from reelforge.engine.rl.prompts import read_prompts
from reelforge.engine.rl.rewriting import STRUCTURE, RewritingTask
from reelforge.engine.rl.statistics import means
from reelforge.engine.train.state import TrainState
from reelforge.stages.enhance_config import ColdStartPhase, EnhanceConfig, GrpoPhase


@dataclass(frozen=True)
class Work:
    """A phase before its first step.

    Attributes:
        losses, describe, look: hooks; ``look`` takes the state and the step.
        before: called once the state is restored.
        carried: further tensors of the run's state.
        stride: steps between which the run is not cut.
    """

    losses: Callable[[int], Iterable[Tensor]]
    describe: Callable[[range], dict[str, Any]] = lambda steps: {}
    look: Callable[[TrainState, int], dict[str, Any]] = lambda state, step: {}
    before: Callable[[TrainState], None] = lambda state: None
    carried: dict[str, Tensor] = field(default_factory=dict)
    stride: int = 1


def origin(config: EnhanceConfig) -> dict[str, str]:
    """Hashes of what a run starts from: language model, pairs, requests, generator."""
    found = {"language_model": digest(fingerprint_folders(_folder(config.language_model)).encode())}
    if config.cold_start:
        found["pairs"] = digest(_read(config.cold_start.pairs))
    if config.grpo:
        used = config.grpo.proxy.model if config.grpo.proxy else config.grpo.generator
        found["prompts"] = digest(json.dumps(read_prompts(config.grpo.requests).prompts).encode())
        parts = [_folder(used / part) for part in ("transformer", "vae", "text_encoder", "scheduler")]
        found["generator"] = digest(fingerprint_folders(used, *parts).encode())
    return found


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder.", "Give a local model folder; nothing is downloaded.")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error


def check(config: EnhanceConfig, device: torch.device) -> None:
    """Refuse what any phase could not use, before anything is written: an earlier phase may take hours."""
    language = LanguageModel.load(config.language_model, device=device)
    for name in config.phases:
        build(config, name, language, config.output / name)
    if config.grpo and config.grpo.proxy:
        film_crew(config.grpo, config.grpo.generator, device)


def build(config: EnhanceConfig, name: str, language: LanguageModel, root: Path) -> Work:
    """A phase's parts.

    Args:
        language: what the phase starts from, and trains.
        root: the phase's run directory.
    """
    phase, dialogue = config.phases[name], Dialogue(config.dialogue, language.tokenizer)
    distributed.own_slots(phase.train.batch_size)
    structure = Structure(config.structure)
    if isinstance(phase, ColdStartPhase):
        pairs = read_pairs(phase.pairs, structure, phase.min_coverage, phase.identity, phase.train.seed)
        return Work(ColdStartTask(language, dialogue, pairs, phase.train).losses)
    return _grpo(phase, language, dialogue, structure, root)


def _grpo(phase: GrpoPhase, language: LanguageModel, dialogue: Dialogue, structure: Structure, root: Path) -> Work:
    filming = film_crew(phase, phase.proxy.model if phase.proxy else phase.generator, language.device)
    requests = read_prompts(phase.requests).prompts
    fusion = Fusion(phase.fusion, (*filming.scoring.axes, STRUCTURE))
    task = RewritingTask(
        language, dialogue, structure, filming, fusion, requests, phase.groups, phase.loss, phase.updates_per_rollout,
        phase.train,
    )  # fmt: skip

    def before(state: TrainState) -> None:
        if phase.proxy and state.step == 0:
            _check_proxy(phase, task)

    watched = read_prompts(phase.held_out.requests).prompts if phase.held_out else ()
    look = Look(task, watched, phase.held_out.draws if phase.held_out else 1, root)
    return Work(
        task.losses, task.describe, look if watched else lambda state, step: {}, before,
        {"fusion_running": fusion.running}, phase.updates_per_rollout,
    )  # fmt: skip


def film_crew(phase: GrpoPhase, model: Path, device: torch.device) -> Filming:
    """A frozen generator and the phase's scorers."""
    folder = ModelFolder.load(model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    config = resolve(folder.defaults, phase.sampling)
    generator = Generator(folder, config, rng.key("filming", phase.train.seed))
    scorers = build_scorers(phase.rewards, config.video)
    codec = folder.codec
    return Filming(
        generator, Scoring(scorers, lambda latents: torch.from_numpy(decode_uint8(codec, latents)), phase.scoring)
    )


def _check_proxy(phase: GrpoPhase, task: RewritingTask) -> None:
    """Refuse a proxy that ranks videos otherwise than the generator.

    What is ranked is what a rewrite gains over its request from the same noise: between requests both models agree
    about which scenes are easy, and no group compares those.

    Raises:
        ConfigError: with their correlation.
    """
    assert phase.proxy is not None
    requests = task.requests[: phase.proxy.requests]
    answers = task.write([(request, rng.key("proxy_check", place)) for place, request in enumerate(requests)])
    texts = [task.dialogue.read(answer.ids) for answer in answers]
    takes = [Take(request, text or request, 0) for request, text in zip(requests, texts, strict=True)]
    plain = [Take(request, request, 0) for request in requests]
    crews = task.filming, film_crew(phase, phase.generator, task.language.device)
    proxy, real = (crew(takes) - crew(plain) for crew in crews)
    found = rank_correlation(proxy, real)
    say(f"The proxy ranks {len(takes)} videos as the generator does with a Spearman correlation of {found:.2f}.")
    if not found >= phase.proxy.min_correlation:
        raise ConfigError(
            f"The proxy {phase.proxy.model} ranks videos otherwise than {phase.generator}: Spearman {found:.2f}, "
            f"{phase.proxy.min_correlation:g} is asked for.",
            "Train against the generator itself, or distil a closer student: in another output folder, with"
            f" {task.language.folder} as its language_model.",
        )


class Look:
    """Films the likeliest rewrites of held-out requests, beside the requests themselves.

    Args:
        task: with the rewriter in training.
        requests: watched.
        draws: videos each.
        root: where ``samples/step-*/rewrites.jsonl`` goes.
    """

    def __init__(self, task: RewritingTask, requests: Sequence[str], draws: int, root: Path) -> None:
        self.task, self.requests, self.draws, self.root = task, requests, draws, root
        self._raw: dict[str, float | None] = {}

    def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
        """Mean rewards of averaged weights: ``held_out`` of the rewrites, ``held_out_raw`` of the requests."""
        task = self.task
        with state.ema.applied():
            made = Rewriter(task.language, task.dialogue, RewriterConfig(timeout_s=3600.0))(self.requests)
        self._raw = self._raw or self._film([(request, request) for request in self.requests])
        found = self._film([(each.request, each.prompt) for each in made])
        if distributed.rank() == 0:
            lines = [json.dumps(vars(each), ensure_ascii=False) for each in made]
            folder = make_folder(self.root / "samples" / f"step-{step:08d}")
            replace_file(folder / "rewrites.jsonl", "\n".join(lines) + "\n")
        return {"held_out": found, "held_out_raw": self._raw}

    def _film(self, texts: Sequence[tuple[str, str]]) -> dict[str, float | None]:
        scores = self.task.filming([Take(x, y, draw) for x, y in texts for draw in range(self.draws)])
        return means(self.task.filming.scoring.axes, scores)
