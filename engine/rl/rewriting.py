"""GRPO for the rewriter: write, film, score against the request, learn.

The generator is frozen and stands inside the reward. A group is G rewrites of one request and, as a free member that
anchors the mean, the request itself; all share the generator's noise. An answer out of form is filmed as the request,
which is what serving would do, and its structure reward says so; an answer cut at its longest takes no part.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.enhance.completions import Completion, complete, token_logp
from reelforge.engine.enhance.dialogue import Dialogue
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.structure import Structure, mean_parts
from reelforge.engine.model.generation import half_precision
from reelforge.engine.rl.advantage import Fusion, shuffle
from reelforge.engine.rl.filming import Filming, Take
from reelforge.engine.rl.statistics import describe_rewards, means, merge_facts
from reelforge.engine.rl.text_loss import TextLossConfig, text_loss
from reelforge.engine.train.loop import LoopConfig

STRUCTURE = "structure"  # the axis beside the scorers'
# Mean difference between a token's log-probability when it was drawn, against a KV cache, and in the training forward.
_SAMPLING_GAP = {"fp32": 1e-3, "bf16": 0.1}


@dataclass(frozen=True)
class RewritingConfig:
    """A group and how it is filmed.

    Attributes:
        group_size: rewrites a request.
        temperature: they are drawn with.
        common_noise: all members of a group share the generator's noise.
        draws: noises a rewrite is filmed with; its rewards are averaged.
        sample_rows: answers that are drawn together.
    """

    group_size: int = 8
    temperature: float = 1.0
    common_noise: bool = True
    draws: int = 1
    sample_rows: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "temperature", "draws", "sample_rows")
        if self.group_size < 2:
            raise ConfigError(f"group_size is {self.group_size}.", "A group compares at least 2 rewrites; 8 is usual.")


@dataclass
class _Row:
    """One answer of this rank."""

    request: list[int]
    answer: Completion
    advantage: float = 0.0
    counted: bool = False
    logp_old: Tensor | None = None
    logp_reference: Tensor | None = None


class RewritingTask:
    """Losses and facts of a run; all of them functions of the step and the weights.

    Args:
        language: the policy.
        dialogue: its format.
        structure: the reward on its words.
        filming: the rewards on its pictures.
        fusion: built for the scorers' axes and :data:`STRUCTURE`, in this order.
        requests: to train on.
        config: groups.
        loss: the objective.
        updates: optimizer steps per rollout.
        train: batch (requests), micro-batch (answers), precision, seed.

    Raises:
        ConfigError: a fusion rule that has no single advantage.
        DataError: a request leaves no room for an answer.
    """

    def __init__(
        self,
        language: LanguageModel,
        dialogue: Dialogue,
        structure: Structure,
        filming: Filming,
        fusion: Fusion,
        requests: Sequence[str],
        config: RewritingConfig,
        loss: TextLossConfig,
        updates: int,
        train: LoopConfig,
    ) -> None:
        if fusion.config.rule == "separate":
            raise ConfigError('fusion.rule is "separate".', 'A rewrite has one advantage: take "each" or "sum".')
        dialogue.check_room(requests, language.room)
        self.language, self.dialogue, self.structure, self.filming = language, dialogue, structure, filming
        self.fusion, self.requests, self.config, self.loss = fusion, tuple(requests), config, loss
        self.updates, self.train = updates, train
        self.axes = (*filming.scoring.axes, STRUCTURE)
        self.reference = language.frozen_copy() if loss.kl else None
        self._rows: list[_Row] = []
        self._tokens = 0.0
        self._facts: list[dict[str, Any]] = []

    def losses(self, step: int) -> Iterator[Tensor]:
        """This rank's share of an optimizer step, micro-batch by micro-batch."""
        iteration, update = divmod(step, self.updates)
        if update == 0:
            self._roll_out(iteration)
        assert self._rows, "a run continues at the start of an iteration"
        start, gap = time.monotonic(), torch.zeros(2, dtype=torch.float64)
        sums: dict[str, float] = {}
        for rows in self._micro_batches():
            logp, tokens = self._logp(self.language.model, rows)
            if update == 0:
                gap += self._sampling_gap(rows, logp, tokens)
                self._keep(rows, logp, tokens)
            counted = tokens & torch.tensor([row.counted for row in rows], device=tokens.device)[:, None]
            advantages = torch.tensor([row.advantage for row in rows], device=logp.device)
            old = _stacked([row.logp_old for row in rows], logp)
            reference = _stacked([row.logp_reference for row in rows], logp) if self.reference else logp.detach()
            total, found = text_loss(logp, old, reference, advantages, counted, self.loss)
            if self.reference is None:
                del found["kl_reference"]
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in found.items()}
            yield total / max(self._tokens, 1.0)
        facts = {name: value / max(self._tokens, 1.0) for name, value in self._totals(sums).items()}
        if update == 0:
            facts["sampling_gap"] = self._check_gap(gap)
        self._facts.append({**facts, "train_s": time.monotonic() - start})

    def describe(self, steps: range) -> dict[str, Any]:
        """The facts of the last optimizer steps."""
        del steps
        merged = merge_facts(self._facts)
        self._facts.clear()
        return merged

    def write(self, asked: Sequence[tuple[str, int]]) -> list[Completion]:
        """Draw an answer for each (request, key)."""
        found: list[Completion] = []
        for start in range(0, len(asked), self.config.sample_rows):
            part = asked[start : start + self.config.sample_rows]
            with self._precision():
                found += complete(
                    self.language,
                    [self.dialogue.ask(request) for request, _ in part],
                    self.dialogue.config.max_new_tokens,
                    [key for _, key in part],
                    self.config.temperature,
                )
        return found

    def _roll_out(self, iteration: int) -> None:
        size, group, seed = self.train.batch_size, self.config.group_size, self.train.seed
        chosen = rng.in_epochs("requests", seed, len(self.requests), range(iteration * size, (iteration + 1) * size))
        own = distributed.own_slots(size)
        mine = [self.requests[chosen[slot]] for slot in own]
        start = time.monotonic()
        keys = [rng.key("rewrite", seed, iteration, slot, member) for slot in own for member in range(group)]
        answers = self.write(list(zip([text for text in mine for _ in range(group)], keys, strict=True)))
        written_s, filmed = time.monotonic() - start, self.filming.seconds
        texts = [self._read(answer) for answer in answers]
        rewards = torch.zeros(len(self.axes), size, group + 1, dtype=torch.float64)
        rewards[:, own] = self._rewards(mine, texts, iteration)
        rewards = distributed.summed(self.language.device, rewards)
        self.filming.scoring.check_missing(rewards[:-1])
        cut = torch.zeros(size, group + 1, dtype=torch.float64)
        cut[own, :group] = torch.tensor([not answer.finished for answer in answers]).double().view(len(own), group)
        cut = distributed.summed(self.language.device, cut)
        if cut[:, :group].all():
            raise TrainingError(
                f"Every answer of iteration {iteration} was cut at {self.dialogue.config.max_new_tokens} tokens.",
                "Raise dialogue.max_new_tokens, or start from a model that ends its answers (cold_start).",
            )
        advantages = self.fusion(rewards.masked_fill(cut.bool(), torch.nan))
        if self.fusion.config.shuffled:
            advantages = shuffle(advantages, seed, iteration)
        self._take(mine, answers, advantages.values[0, own, :group], advantages.counted[own, :group])
        self._facts.append(
            {
                **describe_rewards(self.axes, rewards, advantages),
                "original": means(self.axes, rewards[:, :, group]),
                **self._describe_texts(mine, texts, answers),
                "write_s": written_s,
                "film_s": self.filming.seconds - filmed,
                "rollout_s": time.monotonic() - start,
            }
        )

    def _read(self, answer: Completion) -> str | None:
        """The prompt, unless serving would not use it: cut, out of form, or too long for the text encoder."""
        text = self.dialogue.read(answer.ids) if answer.finished else None
        return text if text is not None and self.filming.generator.fits(text) else None

    def _rewards(self, requests: Sequence[str], texts: Sequence[str | None], iteration: int) -> Tensor:
        """``[R, P, G + 1]`` of this rank's groups; the last member is the request itself."""
        group, draws = self.config.group_size, self.config.draws
        takes, structure = [], []
        for place, request in enumerate(requests):
            written = [*texts[place * group : (place + 1) * group], request]
            for member, text in enumerate(written):
                noise = iteration * (group + 1) + (0 if self.config.common_noise else member)
                takes += [Take(request, text or request, noise * draws + draw) for draw in range(draws)]
                structure.append(self.structure(text or request, request, text is not None))
        filmed = self.filming(takes).view(-1, len(requests), group + 1, draws).mean(3)
        return torch.cat((filmed, torch.tensor(structure, dtype=torch.float64).view(1, len(requests), group + 1)))

    def _take(self, requests: Sequence[str], answers: Sequence[Completion], values: Tensor, counted: Tensor) -> None:
        group = self.config.group_size
        self._rows = [
            _Row(self.dialogue.ask(requests[place // group]), answer, value, there)
            for place, (answer, value, there) in enumerate(
                zip(answers, values.flatten().tolist(), counted.flatten().tolist(), strict=True)
            )
        ]
        with torch.no_grad():
            for rows in self._micro_batches() if self.reference else ():
                logp, _ = self._logp(self.reference, rows)
                for row, known in zip(rows, logp, strict=True):
                    row.logp_reference = known[: len(row.answer.ids)]
        own = torch.tensor(float(sum(len(row.answer.ids) for row in self._rows if row.counted)))
        self._tokens = distributed.summed(self.language.device, own).item()

    def _micro_batches(self) -> Iterator[list[_Row]]:
        for start in range(0, len(self._rows), self.train.micro_batch_size):
            yield self._rows[start : start + self.train.micro_batch_size]

    def _logp(self, model: Any, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        prompts, answers = [row.request for row in rows], [row.answer.ids for row in rows]
        with self._precision():
            return token_logp(model, prompts, answers, self.language.pad, self.config.temperature)

    def _keep(self, rows: Sequence[_Row], logp: Tensor, tokens: Tensor) -> None:
        for row, values, there in zip(rows, logp.detach(), tokens, strict=True):
            row.logp_old = values[there]

    def _sampling_gap(self, rows: Sequence[_Row], logp: Tensor, tokens: Tensor) -> Tensor:
        """Sum of |difference to when they were drawn| over tokens, and how many."""
        drawn = _stacked([row.answer.logp for row in rows], logp)
        apart = (logp.detach() - drawn).abs()[tokens]
        return torch.tensor([apart.double().sum().item(), float(len(apart))], dtype=torch.float64)

    def _check_gap(self, gap: Tensor) -> float:
        """Mean gap; what is written and what is trained must be one policy.

        Raises:
            TrainingError: they are not.
        """
        total, count = distributed.summed(self.language.device, gap).tolist()
        mean, limit = total / max(count, 1.0), _SAMPLING_GAP[self.train.precision]
        if not mean <= limit:
            raise TrainingError(
                f"Answers were drawn with log-probabilities {mean:.2g} off the training forward's ({limit:g} allowed).",
                "Sampling and training must use the same weights, template and temperature: report this as a bug.",
            )
        return mean

    def _describe_texts(
        self, requests: Sequence[str], texts: Sequence[str | None], answers: Sequence[Completion]
    ) -> dict[str, Any]:
        """Facts on this rank's words."""
        group = self.config.group_size
        asked = [request for request in requests for _ in range(group)]
        written = [(text, request) for text, request in zip(texts, asked, strict=True) if text is not None]
        finished = [answer for answer in answers if answer.finished]
        alike = [len(set(texts[first : first + group])) / group for first in range(0, len(texts), group)]
        return {
            "malformed": 1 - len(written) / max(len(finished), 1),
            "cut": 1 - len(finished) / len(answers),
            "copied": sum(text == self.dialogue.plain(request) for text, request in written) / max(len(written), 1),
            "distinct": sum(alike) / len(alike),
            "answer_tokens": sum(len(answer.ids) for answer in answers) / len(answers),
            "structure_parts": mean_parts([self.structure.parts(text, request) for text, request in written]),
            "example": {"request": asked[0], "rewrite": texts[0]},
        }

    def _totals(self, sums: dict[str, float]) -> dict[str, float]:
        shared = distributed.summed(self.language.device, torch.tensor(list(sums.values()), dtype=torch.float64))
        return dict(zip(sums, shared.tolist(), strict=True))

    def _precision(self) -> Any:
        return half_precision(self.language.device, self.train.precision == "bf16")


def _stacked(rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Rows of different length as one ``[B, C]``, 0 behind."""
    out = torch.zeros_like(like, requires_grad=False)
    for place, row in enumerate(rows):
        assert row is not None
        out[place, : len(row)] = row.to(out)
    return out
