"""A trained rewriter at work: requests to prompts, kept in a cache, and never worse than what the user wrote.

Whatever goes wrong (an answer out of form, too long, too late), the user's own prompt is used and the reason is told.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reelforge.engine.core import config as configuration
from reelforge.engine.core import rng
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import staged_folder
from reelforge.engine.core.metrics import JsonlLog, read_jsonl
from reelforge.engine.enhance.completions import Completion, complete
from reelforge.engine.enhance.dialogue import Dialogue, DialogueConfig
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.structure import split_words
from reelforge.engine.io.model_files import read_json, write_json

_FILE = "rewriter.json"  # beside the language model's files


@dataclass(frozen=True)
class RewriterConfig:
    """How a rewriter answers.

    Attributes:
        temperature: 0 takes the likeliest words.
        seed: of the words above temperature 0.
        timeout_s: of a batch; what is not finished by then is not rewritten.
        batch_size: requests at a time.
    """

    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 30.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s", "batch_size")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}.", "It must be 0 (the likeliest words) or more.")


@dataclass(frozen=True)
class Enhanced:
    """What became of a request.

    Attributes:
        request: as the user wrote it.
        prompt: to generate from.
        kept: why the prompt is the request; empty when it was rewritten.
    """

    request: str
    prompt: str
    kept: str = ""


class Rewriter:
    """Answers requests.

    Args:
        language: the model.
        dialogue: its format.
        config: how it answers.
        fits: whether a prompt is short enough for the generator's text encoder.
        cache: a JSONL file of earlier answers of the same model and settings; None keeps them in memory.
    """

    def __init__(
        self,
        language: LanguageModel,
        dialogue: Dialogue,
        config: RewriterConfig,
        fits: Callable[[str], bool] = lambda prompt: True,
        cache: Path | None = None,
    ) -> None:
        self.language, self.dialogue, self.config, self.fits = language, dialogue, config, fits
        settings = dataclasses.replace(config, timeout_s=1.0, batch_size=1)
        self._name = "-".join((language.fingerprint, *map(configuration.fingerprint, (dialogue.config, settings))))
        lines = [line for line in read_jsonl(cache) if {"key", "prompt"} <= line.keys()] if cache else []
        self._known: dict[str, str] = {line["key"]: line["prompt"] for line in lines}
        self._log = JsonlLog(cache) if cache else None

    def __call__(self, requests: Sequence[str]) -> list[Enhanced]:
        """One :class:`Enhanced` per request, in order."""
        found: dict[str, Enhanced] = {}
        for request in dict.fromkeys(requests):
            if prompt := self._known.get(self._key(request)):
                found[request] = self._fitting(request, prompt)
            elif kept := self._as_it_is(request):
                found[request] = Enhanced(request, request, kept)
        open_ = [request for request in dict.fromkeys(requests) if request not in found]
        for start in range(0, len(open_), self.config.batch_size):
            batch = open_[start : start + self.config.batch_size]
            found |= {made.request: made for made in self._rewrite(batch)}
        return [found[request] for request in requests]

    def _as_it_is(self, request: str) -> str:
        """Why a request is not put to the model; empty when it is."""
        if not self.dialogue.plain(request):
            return "the prompt is empty"
        words = len(split_words(request))
        if words > self.dialogue.config.max_request_words:
            return f"the prompt is complete with {words} words"
        needed = len(self.dialogue.ask(request)) + self.dialogue.config.max_new_tokens
        if needed > self.language.room:
            return f"prompt and answer take {needed} tokens, and the language model has room for {self.language.room}"
        return ""

    def _rewrite(self, requests: Sequence[str]) -> list[Enhanced]:
        dialogue, config = self.dialogue, self.config
        keys = [rng.key("rewrite:" + dialogue.plain(request), config.seed) for request in requests]
        answers = complete(
            self.language,
            [dialogue.ask(request) for request in requests],
            dialogue.config.max_new_tokens,
            keys if config.temperature else None,
            config.temperature or 1.0,
            config.timeout_s,
        )
        return [self._judge(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _judge(self, request: str, answer: Completion) -> Enhanced:
        prompt = self.dialogue.read(answer.ids)
        if not answer.finished:
            long = len(answer.ids) >= self.dialogue.config.max_new_tokens
            why = f"the answer has more than {len(answer.ids)} tokens" if long else "the answer took too long"
        elif prompt is None:
            why = "the answer is not in form"
        else:
            self._keep(self._key(request), request, prompt)
            return self._fitting(request, prompt)
        return Enhanced(request, request, why)

    def _fitting(self, request: str, prompt: str) -> Enhanced:
        if self.fits(prompt):
            return Enhanced(request, prompt)
        return Enhanced(request, request, "the answer is too long for the text encoder")

    def _keep(self, key: str, request: str, prompt: str) -> None:
        self._known[key] = prompt
        if self._log:
            self._log.write(key=key, request=request, prompt=prompt)

    def _key(self, request: str) -> str:
        # A request from the command line may hold bytes that are no text.
        return hashlib.sha256(f"{self._name}\0{request}".encode(errors="surrogatepass")).hexdigest()[:32]


def save_rewriter(language: LanguageModel, dialogue: DialogueConfig, folder: Path) -> None:
    """Write a folder that :func:`load_rewriter` reads, and transformers too; it appears only when it is complete.

    Raises:
        StorageError: the disk refused.
    """
    with staged_folder(folder) as staging:
        language.save(staging)
        write_json(staging / _FILE, dataclasses.asdict(dialogue))


def load_rewriter(
    folder: Path,
    config: RewriterConfig = RewriterConfig(),
    device: torch.device | str = "cpu",
    fits: Callable[[str], bool] = lambda prompt: True,
    cache: Path | None = None,
) -> Rewriter:
    """A rewriter from its folder; any instruction-tuned model's folder will do, asked in the default words.

    Raises:
        ConfigError, CheckpointError: the folder is not one.
    """
    half = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    language, path = LanguageModel.load(folder, half, device), folder / _FILE
    words = configuration.build(DialogueConfig, read_json(path), f"{path}: ") if path.exists() else DialogueConfig()
    return Rewriter(language, Dialogue(words, language.tokenizer), config, fits, cache)
