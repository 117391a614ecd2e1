"""Scores a batch while the next one is sampled; whatever goes wrong in a scorer becomes a missing score.

One daemon thread works through the batches in order. A scorer that raises, answers for another number of clips,
leaves an axis out or takes too long costs the scores of that batch and axis, never the run, unless too many are
missing: then the run stops with the scorer's last words.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.rewards.contract import Scorer, Scores

_ALONE_TOLERANCE = 1e-3  # of the batch's standard deviation
Decode = Callable[[Tensor], Tensor]  # latents [B,C,T,H,W] to uint8 frames [B,F,H,W,3] on the CPU


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are asked for.

    Attributes:
        timeout_s: a batch that takes a scorer longer is missing on its axes.
        missing_limit: share of an iteration's scores that may be missing before the run stops.
        overlap: score while the next batch is sampled.
    """

    timeout_s: float = 600.0
    missing_limit: float = 0.1
    overlap: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s")
        if not 0 <= self.missing_limit <= 1:
            raise ConfigError(f"scoring.missing_limit is {self.missing_limit}.", "It is a share in [0, 1].")


class Pending:
    """A batch's scores to come.

    Attributes:
        decode_s, score_s: what they took, once they are there.
    """

    decode_s = score_s = 0.0

    def __init__(self) -> None:
        self._done = threading.Event()
        self._scores: dict[str, Scores] = {}
        self._error: BaseException | None = None

    def settle(self, scores: dict[str, Scores], error: BaseException | None = None) -> None:
        self._scores, self._error = scores, error
        self._done.set()

    def result(self) -> dict[str, Scores]:
        """Waits. Raises what was no scorer's fault (a decoder out of memory)."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._scores


class Scoring:
    """All scorers of a run behind one queue.

    Args:
        scorers: their axes must not overlap.
        decode: latents to what scorers see; runs on the scoring thread.
        config: patience.

    Attributes:
        axes: of all scorers, in order.
        last_error: why a score was last missing; empty if none ever was.

    Raises:
        ConfigError: no scorer, or two with the same axis.
    """

    def __init__(self, scorers: Sequence[Scorer], decode: Decode, config: ScoringConfig) -> None:
        self.axes = tuple(axis for scorer in scorers for axis in scorer.axes)
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ConfigError(f"The scorers' axes are {', '.join(self.axes)}.", "Give each axis one scorer.")
        self.scorers, self.decode, self.config = scorers, decode, config
        self.last_error = ""
        self._checked = False
        self._queue: queue.SimpleQueue[tuple[Tensor, Sequence[str], Pending]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, latents: Tensor, prompts: Sequence[str]) -> Pending:
        """Queue x0 ``[B,C,T,H,W]`` for decoding and scoring against B prompts."""
        pending = Pending()
        if not self.config.overlap:
            self._settle(latents, prompts, pending)
            return pending
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
            self._thread.start()
        self._queue.put((latents, prompts, pending))
        return pending

    def check_missing(self, rewards: Tensor) -> None:
        """Stop when too many of an iteration's rewards (NaN where missing) are not there.

        Raises:
            TrainingError: with the last error of a scorer.
        """
        share = rewards.isnan().double().mean().item()
        if share > self.config.missing_limit:
            raise TrainingError(
                f"{share:.0%} of the iteration's scores are missing, more than {self.config.missing_limit:.0%};"
                f" last error: {self.last_error or 'the scorers answered NaN'}.",
                "Mend the scorer and run the same command again; the weights are those of the step before.",
            )

    def _work(self) -> None:
        while True:
            self._settle(*self._queue.get())

    def _settle(self, latents: Tensor, prompts: Sequence[str], pending: Pending) -> None:
        try:
            start = time.monotonic()
            with torch.no_grad():
                videos = self.decode(latents)
            decoded = time.monotonic()
            scores: dict[str, Scores] = {}
            for scorer in self.scorers:
                scores |= self._ask(scorer, videos, prompts)
            pending.decode_s, pending.score_s = decoded - start, time.monotonic() - decoded
            if not self._checked:
                self._check_alone(scores, videos, prompts)
            pending.settle(scores)
        except Exception as error:  # noqa: BLE001  (raised again where the scores are waited for)
            pending.settle({}, error)

    def _check_alone(self, scores: dict[str, Scores], videos: Tensor, prompts: Sequence[str]) -> None:
        """Once: the batch's last clip scored alone must get what it got in the batch.

        A scorer that answers in another order, for other prompts, or in proportion to its neighbours turns advantages
        into noise without any other sign.
        """
        for scorer in self.scorers:
            alone = self._ask(scorer, videos[-1:], prompts[-1:])
            for axis in scorer.axes:
                batch = scores[axis].values.double()
                known = batch[~batch.isnan()]
                difference = (alone[axis].values[-1].double() - batch[-1]).abs().item()
                if difference > _ALONE_TOLERANCE * max(known.std(correction=0).item() if len(known) else 0.0, 1e-6):
                    raise TrainingError(
                        f"{type(scorer).__name__} scores a clip {axis} = {batch[-1]:.4g} in a batch of {len(batch)} and"
                        f" {alone[axis].values[-1]:.4g} alone.",
                        "Scores must belong to their clip and prompt alone, in the order they were asked for.",
                    )
        self._checked = True

    def _ask(self, scorer: Scorer, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """One scorer's axes; all of them missing when it fails, with the reason in ``last_error``."""
        answer: list[dict[str, Scores] | str] = []

        def ask() -> None:
            try:
                answer.append(scorer.score(videos, prompts))
            except Exception as error:  # noqa: BLE001  (a scorer is somebody else's code: its failure is a missing score)
                answer.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=ask, name=f"scorer {'/'.join(scorer.axes)}", daemon=True)
        thread.start()
        thread.join(self.config.timeout_s)
        found = answer[0] if answer else f"no answer within {self.config.timeout_s:g} s"
        fault = found if isinstance(found, str) else _fault(found, scorer.axes, len(prompts))
        if not fault and not isinstance(found, str):
            return {axis: found[axis] for axis in scorer.axes}
        self.last_error = f"{type(scorer).__name__}: {fault}"
        return {axis: Scores.missing(len(prompts)) for axis in scorer.axes}


def _fault(found: dict[str, Scores], axes: Sequence[str], count: int) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if found.keys() != set(axes):
        return f"answered for {', '.join(found)} instead of {', '.join(axes)}"
    for axis in axes:
        if len(found[axis].values) != count:
            return f"answered {len(found[axis].values)} scores of {axis} for {count} clips"
    return ""
