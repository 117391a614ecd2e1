"""Answers of a language model and their log-probabilities, token by token.

Sampling is a function of its keys: token t of a row is argmax(logits / T + Gumbel(key, t)), which is an exact draw from
softmax(logits / T) and does not depend on what else is in the batch, on the rank or on a resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reelforge.engine.core import rng
from reelforge.engine.enhance.language_model import LanguageModel


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        ids: its tokens, the end mark included if it came.
        logp: log-probability of each at the temperature it was drawn with, fp32 ``[len(ids)]`` on the CPU.
        finished: whether the end mark came.
    """

    ids: tuple[int, ...]
    logp: Tensor
    finished: bool


@torch.no_grad()
def complete(
    language: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    keys: Sequence[int] | None = None,
    temperature: float = 1.0,
    max_time_s: float | None = None,
) -> list[Completion]:
    """Answer every prompt, with a KV cache.

    Args:
        prompts: token ids of each.
        keys: one a row to sample by; None takes the likeliest token.
        max_time_s: no new token is begun after so many seconds.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids, mask = pad_left(prompts, language.pad, language.device)
    chosen = _Chosen(keys, temperature, ids.shape[1])
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(language.ends), pad_token_id=language.pad,
        max_time=max_time_s,
    )  # fmt: skip
    out = language.model.generate(
        ids, attention_mask=mask, generation_config=how, logits_processor=LogitsProcessorList([chosen])
    )
    answers, logp = out[:, ids.shape[1] :].cpu(), torch.stack(chosen.logp, 1).cpu()
    return [_cut(row.tolist(), values, language.ends) for row, values in zip(answers, logp, strict=True)]


def _cut(ids: list[int], logp: Tensor, ends: Sequence[int]) -> Completion:
    """A row up to its end mark; what follows is padding."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
    length = len(ids) if stop is None else stop
    return Completion(tuple(ids[:length]), logp[:length].float(), stop is not None)


class _Chosen:
    """A logits processor that chooses the token itself, and remembers how likely it was.

    Keeping all logits until the end would take gigabytes for a vocabulary of 150,000.
    """

    def __init__(self, keys: Sequence[int] | None, temperature: float, start: int) -> None:
        self.keys, self.temperature, self.start = keys, temperature, start
        self.logp: list[Tensor] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logp = F.log_softmax(logits.float() / self.temperature, -1)
        scores = logp
        if self.keys is not None:
            place = ids.shape[1] - self.start
            scores = logp + rng.gumbel([rng.key("token", key, place) for key in self.keys], logp.shape[1], logp.device)
        token = scores.argmax(-1, keepdim=True)
        self.logp.append(logp.gather(1, token)[:, 0])
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)


def token_logp(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every token of given answers, in one forward.

    Returns:
        fp32 ``[B, C]``, C tokens of the longest answer, 0 behind the end of shorter ones; bool ``[B, C]``, True on
        the answers' tokens.
    """
    before, mask = pad_left(prompts, pad, model.device)
    after, there = pad_right(answers, pad, model.device)
    whole = torch.cat((mask, there.long()), 1)
    positions = (whole.cumsum(1) - 1).clamp_min(0)
    logits = model(
        torch.cat((before, after), 1), attention_mask=whole, position_ids=positions, use_cache=False,
        logits_to_keep=after.shape[1] + 1,
    ).logits[:, :-1]  # fmt: skip
    logp = F.log_softmax(logits.float() / temperature, -1).gather(2, after[:, :, None])[:, :, 0]
    return torch.where(there, logp, 0.0), there


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[B, L]`` that end together, and 1 where they are real, int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[B, L]`` that begin together, int64, and bool ``[B, L]`` where they are real."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows], device=device)
    there = torch.arange(width, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, there
