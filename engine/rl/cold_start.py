"""A rewriter's first lessons: cross-entropy on the answers of (request, caption) pairs."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.enhance.completions import token_logp
from reelforge.engine.enhance.dialogue import Dialogue
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.pairs import Pair
from reelforge.engine.model.generation import half_precision
from reelforge.engine.train.loop import LoopConfig


class ColdStartTask:
    """Losses of a run; all of them functions of the step and the weights.

    Args:
        language: trained.
        dialogue: its format.
        pairs: to learn.
        train: batch, micro-batch, precision, seed.

    Raises:
        DataError: an answer is longer than ``dialogue.max_new_tokens``, or a request leaves no room for one.
    """

    def __init__(self, language: LanguageModel, dialogue: Dialogue, pairs: Sequence[Pair], train: LoopConfig) -> None:
        dialogue.check_room((pair.request for pair in pairs), language.room)
        self.language, self.train = language, train
        self.requests = [dialogue.ask(pair.request) for pair in pairs]
        self.answers = [[*dialogue.answer(pair.caption, pair.thought), language.ends[0]] for pair in pairs]
        longest = max(range(len(pairs)), key=lambda place: len(self.answers[place]))
        if len(self.answers[longest]) > dialogue.config.max_new_tokens:
            raise DataError(
                f"The caption {pairs[longest].caption[:60]!r}... takes {len(self.answers[longest])} tokens.",
                f"dialogue.max_new_tokens is {dialogue.config.max_new_tokens}: raise it, or leave the pair out.",
            )

    def losses(self, step: int) -> Iterator[Tensor]:
        """Each micro-batch's share of the step's mean over tokens, on this rank's slots."""
        size, seed = self.train.batch_size, self.train.seed
        slots = range(step * size, (step + 1) * size)
        chosen = rng.in_epochs("pairs", seed, len(self.requests), slots)
        tokens = sum(len(self.answers[place]) for place in chosen)
        own = distributed.own_slots(size)
        for start in range(own.start, own.stop, self.train.micro_batch_size):
            rows = chosen[start : min(start + self.train.micro_batch_size, own.stop)]
            with self._precision():
                logp, _ = token_logp(
                    self.language.model, [self.requests[i] for i in rows], [self.answers[i] for i in rows],
                    self.language.pad,
                )  # fmt: skip
            yield -logp.sum() / tokens

    def _precision(self) -> AbstractContextManager[object]:
        return half_precision(self.language.device, self.train.precision == "bf16")
