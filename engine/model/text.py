"""Text encoders: Wan's UMT5, and the miniature's seeded embeddings behind the same interface."""

import dataclasses
import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.core.config import build, fingerprint
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.io.model_files import fingerprint_folders, read_json, write_json


@dataclass(frozen=True)
class SeededTextConfig:
    """The miniature's text encoder.

    Attributes:
        width: channels of one token.
        max_tokens: longer prompts are cut here, silently, as Wan cuts at 512.
        seed: names the embeddings.
    """

    width: int
    max_tokens: int
    seed: int = 0


class SeededTextEncoder:
    """Frozen embeddings drawn from a seed: every word works, and there is no vocabulary and no weight file.

    Token i of the lower-cased words w, closed by an end mark, is

        sqrt(1/2) a(w_i) + 1/2 b(w_{i-1}) + 1/2 c(w_{i+1}),

    where a, b and c are independent standard normal tables named by the word, so a channel has unit variance.
    Cross-attention gives text no positions; the neighbours are what tells "a red circle on a blue background" from
    "a blue circle on a red background". Both ends of the prompt have a mark as neighbour. An empty prompt is one token.
    """

    _END = "</s>"  # holds characters that no word has
    _ROLES = (("word", 0, 0.5**0.5), ("previous", -1, 0.5), ("next", 1, 0.5))

    def __init__(self, config: SeededTextConfig) -> None:
        self.config = config
        self.width, self.max_tokens = config.width, config.max_tokens
        self.fingerprint = f"seeded-1-{fingerprint(config)}"

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One float32 ``[S_i, width]`` per prompt; S_i counts the words and the end mark."""
        return [self._encode(prompt) for prompt in prompts]

    def num_tokens(self, prompt: str) -> int:
        """Words and the end mark."""
        return len(self._words(prompt)) + 1

    def _words(self, prompt: str) -> list[str]:
        return re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())

    def _encode(self, prompt: str) -> Tensor:
        words = self._words(prompt)[: self.max_tokens - 1]
        line = [self._END, *words, self._END, self._END]
        keys = [
            rng.key(f"text.{role}.{line[i + offset]}", self.config.seed)
            for role, offset, _ in self._ROLES
            for i in range(1, len(line) - 1)
        ]
        tables = rng.normal(keys, (self.width,)).view(len(self._ROLES), -1, self.width)
        return torch.stack([scale * table for (_, _, scale), table in zip(self._ROLES, tables, strict=True)]).sum(0)

    def save(self, folder: Path) -> None:
        """Write ``text_encoder/config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)})

    @classmethod
    def load(cls, folder: Path) -> "SeededTextEncoder":
        """Read what :meth:`save` wrote."""
        table = read_json(folder / "config.json")
        values = {name: value for name, value in table.items() if not name.startswith("_")}
        return cls(build(SeededTextConfig, values, f"{folder / 'config.json'}: "))


class Umt5TextEncoder:
    """Wan's text encoder: UMT5's encoder stack, from transformers.

    Prompts are cleaned as in Wan2.1 (ftfy, HTML entities, white space) and cut at 512 tokens. Each is encoded alone
    and unpadded: the result does not depend on what else is in the batch, and equals the rows up to the true length
    of the padded and masked call in diffusers' ``WanPipeline``.
    """

    max_tokens = 512

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self._model, self._tokenizer, self._folder = model, tokenizer, folder
        self.width: int = model.config.d_model

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> "Umt5TextEncoder":
        """Read ``text_encoder/`` and the ``tokenizer/`` beside it.

        Args:
            folder: the ``text_encoder/`` folder.
            dtype: of the weights; bfloat16 is what Wan2.1 runs.
            device: where to run.

        Raises:
            ConfigError: transformers or ftfy is not installed, or a folder is not theirs.
        """
        try:
            import ftfy  # noqa: F401
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError as error:
            raise ConfigError(f"UMT5 needs {error.name}.", "Run: pip install 'reelforge[wan]'.") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer", local_files_only=True)
            model = UMT5EncoderModel.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            hint = f"Put UMT5 into {folder} and its tokenizer into {folder.parent / 'tokenizer'}."
            raise ConfigError(f"{folder} does not load ({error}).", hint) from error
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, folder)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all files of both folders; read when a cache first asks."""
        return "umt5-" + fingerprint_folders(self._folder, self._folder.parent / "tokenizer")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One float32 ``[S_i, width]`` per prompt on the encoder's device; S_i counts the closing ``</s>``."""
        embeddings = []
        for prompt in prompts:
            tokens = self._tokenizer(
                clean_prompt(prompt), max_length=self.max_tokens, truncation=True, return_tensors="pt"
            )
            ids = tokens.input_ids.to(self._model.device)
            embeddings.append(self._model(input_ids=ids).last_hidden_state[0].float())
        return embeddings

    def num_tokens(self, prompt: str) -> int:
        """Of the cleaned prompt, the closing ``</s>`` included."""
        return len(self._tokenizer(clean_prompt(prompt)).input_ids)

    def save(self, folder: Path) -> None:
        """Write ``folder`` (``text_encoder/``) and the ``tokenizer/`` beside it."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder.parent / "tokenizer")


def clean_prompt(prompt: str) -> str:
    """Wan2.1's cleaning: mend mojibake, resolve HTML entities (twice), collapse white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
