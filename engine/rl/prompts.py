"""The prompt set: a text file or JSON lines, encoded once and kept beside the run."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.types import TextEncoder, pad_text


@dataclass(frozen=True)
class PromptSet:
    """What to train on.

    Attributes:
        prompts: the texts, each once.
        rewards: axes that a prompt is for; empty is all of them.
    """

    prompts: tuple[str, ...]
    rewards: tuple[tuple[str, ...], ...]

    @property
    def ids(self) -> list[int]:
        """Names each prompt's noise by the prompt itself, as ``generate`` does."""
        return [rng.key("prompt:" + prompt) for prompt in self.prompts]

    def wanted(self, axes: tuple[str, ...]) -> Tensor | None:
        """Which rewards each prompt is for, bool ``[R, N]``; None when all are for all.

        Raises:
            DataError: a prompt names a reward that no scorer gives.
        """
        for prompt, names in zip(self.prompts, self.rewards, strict=True):
            if unknown := sorted(set(names) - set(axes)):
                raise DataError(f"Prompt {prompt!r} asks for reward {unknown[0]!r}.", f"There are {', '.join(axes)}.")
        if not any(self.rewards):
            return None
        return torch.tensor([[not names or axis in names for names in self.rewards] for axis in axes])


def read_prompts(path: Path) -> PromptSet:
    """Read a ``.txt`` (a prompt a line) or ``.jsonl`` (``{"prompt": "...", "rewards": ["ta"]}``, rewards optional).

    Empty lines and repeated prompts are left out.

    Raises:
        DataError: unreadable, empty, or a line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Prompts {path} cannot be read ({error}).", "Give a text file with one prompt a line."
        ) from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt, rewards = _record(line, f"{path}:{number}") if path.suffix == ".jsonl" else (line.strip(), ())
            found.setdefault(prompt, rewards)
    if not found:
        raise DataError(f"{path} holds no prompt.", "Write one a line.")
    return PromptSet(tuple(found), tuple(found.values()))


def _record(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        record = json.loads(line)
        prompt, rewards = record["prompt"], record.get("rewards", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is no prompt record.", 'Write {"prompt": "..."}.') from error
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(rewards, list):
        raise DataError(f"{where} is no prompt record.", 'Write {"prompt": "...", "rewards": ["..."]}.')
    return prompt.strip(), tuple(map(str, rewards))


def encode_prompts(load: Callable[[], TextEncoder], prompts: Sequence[str], negative: str, path: Path) -> Tensor:
    """Embeddings ``[N + 1, S, E]``, padded, the negative prompt's last; made by rank 0 unless ``path`` has them.

    Args:
        load: the text encoder, which is dropped again: UMT5 takes 11 GB.
        path: a safetensors file that belongs to one text encoder.
    """
    wanted = hashlib.sha256("\0".join((*prompts, negative)).encode()).hexdigest()
    if distributed.rank() == 0 and not _holds(path, wanted):
        encoder = load()
        text = pad_text(encoder.encode([*prompts, negative]), encoder.max_tokens)
        replace_file(path, save({"text": text.cpu().contiguous()}, {"prompts": wanted}))
    distributed.barrier()
    with safe_open(path, "pt") as reader:
        return reader.get_tensor("text")


def _holds(path: Path, wanted: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, "pt") as reader:
        return (reader.metadata() or {}).get("prompts") == wanted
