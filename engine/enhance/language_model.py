"""A causal language model from transformers: any local folder, or a tiny one of its own for the miniature."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.io.model_files import fingerprint_folders

# Roles as special tokens, as instruction-tuned models have them.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MARKS = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")


@dataclass(frozen=True)
class TinyLanguageModelConfig:
    """The miniature's language model: a Qwen3 of this size with a byte-level tokenizer of its own.

    Attributes:
        hidden_size: width; heads are 32 wide.
        layers: depth.
        vocabulary: tokens, the 256 bytes among them.
        max_positions: of question and answer together.
    """

    hidden_size: int = 128
    layers: int = 3
    vocabulary: int = 1024
    max_positions: int = 512


class LanguageModel:
    """Model and tokenizer of a folder.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        folder: where both are.

    Attributes:
        ends: ids that end an answer, the tokenizer's own first.
        pad: an id to fill rows with; masked out, so any that the model knows will do.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        ends = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.ends = tuple(dict.fromkeys(end for end in ends if end is not None))
        if not self.ends:
            raise ConfigError(
                f"The language model in {folder} has no end-of-text token.", "Set eos_token in tokenizer_config.json."
            )
        self.pad: int = self.ends[0]
        # The folder's own sampling habits (top_k, repetition penalty) must not colour a policy's samples.
        self._generation, model.generation_config = model.generation_config, GenerationConfig()

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "LanguageModel":
        """Read a folder that ``save_pretrained`` wrote; safetensors only, no code from the folder.

        Raises:
            ConfigError: transformers is not installed, or the folder is not such a one.
        """
        try:
            from huggingface_hub.errors import StrictDataclassError
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                "The prompt enhancer needs transformers.", "Run: pip install 'reelforge[wan]'."
            ) from error
        _no_bars()
        hint = "Name a local folder with config.json, *.safetensors and a tokenizer of a causal language model."
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if not tokenizer("a", add_special_tokens=False).input_ids:  # transformers makes an empty one up
                raise ValueError("it has no tokenizer")
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            why = " ".join(str(error).split())  # transformers writes lists
            raise ConfigError(f"{folder} does not load ({why}).", hint) from error
        if found["missing_keys"]:  # transformers would go on with random ones
            raise ConfigError(f"{folder} has no weights {sorted(found['missing_keys'])[:3]}.", hint)
        return cls(model.to(device).eval(), tokenizer, folder)

    @classmethod
    def create(cls, config: TinyLanguageModelConfig, texts: Iterable[str], seed: int, folder: Path) -> "LanguageModel":
        """A tiny untrained one in ``folder``: tokenizer trained on ``texts``, weights drawn from ``seed``."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        tokenizer = _byte_tokenizer(texts, config.vocabulary)
        heads = max(1, config.hidden_size // 32)
        shape = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=32,
            max_position_embeddings=config.max_positions, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(Qwen3ForCausalLM(shape).eval(), tokenizer, folder)
        made.save(folder)
        return made

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def room(self) -> float:
        """Tokens that question and answer may take together; infinite where the config names no limit."""
        return getattr(self.model.config, "max_position_embeddings", None) or math.inf

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the folder's files."""
        return "lm-" + fingerprint_folders(self.folder)

    def save(self, folder: Path) -> None:
        """Write weights and tokenizer as transformers reads them."""
        _no_bars()
        self.model.save_pretrained(folder)
        self._generation.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def frozen_copy(self) -> Any:
        """The model as it is now, for reference."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)


def _no_bars() -> None:
    """Keep transformers from drawing progress bars: this code's own say what takes time."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _byte_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from reelforge.engine.enhance.dialogue import TAGS

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=list(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", chat_template=_CHAT_TEMPLATE,
        additional_special_tokens=list(_MARKS[2:]),
    )  # fmt: skip
