"""Scores a batch while the next one is sampled; whatever goes wrong in a scorer becomes a missing score.

One lane, a daemon thread, decodes and scores the batches in order. Every scorer has a lane of its own, so that it can
be given up on: a thread cannot be stopped, so a scorer that overruns keeps its lane, is not asked again before it
returns (its scores are missing meanwhile), and its late answer is thrown away. One batch of frames at most is held for
it, and it never runs twice at a time.

A scorer that raises, overruns or answers something else than one score a clip and axis costs the scores of that batch,
never the run, unless too many are missing: then the run stops with the scorer's last words. A scorer whose scores
depend on what else is in the batch stops the run at its first batch.
"""

import atexit
import ctypes
import functools
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.rewards.contract import Scorer, Scores

_ALONE_TOLERANCE = 1e-3  # of the batch's standard deviation
_ROUNDING = 1e-6  # of the largest score: float32 sums in another order, where all clips score alike
_GRACE_S = 5.0
Decode = Callable[[Tensor], Tensor]  # latents [B,C,T,H,W] to uint8 frames [B,F,H,W,3] on the CPU


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are asked for.

    Attributes:
        timeout_s: a scorer that takes longer over a batch is given up on; its scores of the batch are missing.
        missing_limit: share of an iteration's samples that may lack a score before the run stops.
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
        self.future: Future[dict[str, Scores]] = Future()

    def result(self) -> dict[str, Scores]:
        """One :class:`Scores` per axis; waits. Raises what was no scorer's fault (a decoder out of memory)."""
        return self.future.result()


class Scoring:
    """All scorers of a run behind one queue.

    Args:
        scorers: their axes must not overlap.
        decode: latents to what scorers see; runs on the scoring lane.
        config: patience.

    Attributes:
        axes: of all scorers, in order.
        last_error: why a scorer was last without an answer; empty if none ever was.

    Raises:
        ConfigError: no scorer, or two with the same axis.
    """

    def __init__(self, scorers: Sequence[Scorer], decode: Decode, config: ScoringConfig) -> None:
        self.axes = tuple(axis for scorer in scorers for axis in scorer.axes)
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ConfigError(f"The scorers' axes are {', '.join(self.axes)}.", "Give each axis one scorer.")
        self.decode, self.config = decode, config
        self.last_error = ""
        self._scorers = [_Guarded(scorer, config.timeout_s) for scorer in scorers]
        self._unchecked = list(self._scorers)
        self._lane = _Lane("scoring")
        self._stream: torch.cuda.Stream | None = None
        for lane in (self._lane, *(guarded.lane for guarded in self._scorers)):
            weakref.finalize(self, lane.end)

    def submit(self, latents: Tensor, prompts: Sequence[str]) -> Pending:
        """Queue x0 ``[B,C,T,H,W]`` for decoding and scoring against B prompts; without overlap, do it here and now."""
        pending, ready = Pending(), None
        if latents.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(latents.device)
            ready = torch.cuda.current_stream(latents.device).record_event()
        job = functools.partial(self._score, latents, tuple(prompts), ready, pending)
        if self.config.overlap:
            self._lane.submit(job, pending.future)
        else:
            _settle(job, pending.future)
        return pending

    def check_missing(self, rewards: Tensor, wanted: Tensor | None = None) -> None:
        """Stop when too many of an iteration's samples lack a score.

        Args:
            rewards: ``[R,P,G]`` in the order of ``axes``, NaN where missing.
            wanted: which rewards a prompt is for, bool ``[R,P]``; None is all of them.

        Raises:
            TrainingError: with the last error of a scorer.
        """
        missing = rewards.isnan() if wanted is None else rewards.isnan() & wanted[:, :, None]
        share = missing.any(0).double().mean().item()
        if share <= self.config.missing_limit:
            return
        shares = zip(self.axes, missing.double().mean((1, 2)).tolist(), strict=True)
        axes = ", ".join(f"{axis} of {part:.0%}" for axis, part in shares if part)
        error = self.last_error or "none in this process, NaN is an answer too"
        raise TrainingError(
            f"{share:.0%} of the iteration's samples lack a score ({axes}), more than"
            f" {self.config.missing_limit:.0%}; last error: {error}.",
            "Mend the scorer, or raise scoring.missing_limit, and run the same command again: it continues from the"
            " last checkpoint.",
        )

    def _score(
        self, latents: Tensor, prompts: tuple[str, ...], ready: torch.cuda.Event | None, pending: Pending
    ) -> dict[str, Scores]:
        start = time.monotonic()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)  # the rollout's stream goes on; this one starts where it stood
                latents.record_stream(self._stream)
            videos = self.decode(latents)
        decoded = time.monotonic()
        scores: dict[str, Scores] = {}
        for scorer in self._scorers:
            missing = {axis: Scores.missing(len(prompts)) for axis in scorer.axes}
            scores |= self._ask(scorer, videos, prompts) or missing
        pending.decode_s, pending.score_s = decoded - start, time.monotonic() - decoded
        if len(prompts) > 1:
            self._unchecked = [s for s in self._unchecked if not self._agrees_alone(s, scores, videos, prompts)]
        return scores

    def _agrees_alone(
        self, scorer: "_Guarded", batch: dict[str, Scores], videos: Tensor, prompts: tuple[str, ...]
    ) -> bool:
        """Whether the first, middle and last clip get alone what they got in the batch; False while nothing is known.

        A scorer that answers in another order, for other prompts, in proportion to its neighbours or by chance turns
        advantages into noise without any other sign.

        Raises:
            TrainingError: they do not.
        """
        if not any(batch[axis].valid.any() for axis in scorer.axes):
            return False
        for place in sorted({0, len(prompts) // 2, len(prompts) - 1}):
            here = slice(place, place + 1)
            alone = self._ask(scorer, videos[here], prompts[here])
            if alone is None:
                return False
            for axis in alone:
                _compare(scorer.name, axis, place, batch[axis], alone[axis])
        return True

    def _ask(self, scorer: "_Guarded", videos: Tensor, prompts: tuple[str, ...]) -> dict[str, Scores] | None:
        """None when there was no answer; the reason is in ``last_error``."""
        answer = scorer(videos, prompts, self._stream)
        if isinstance(answer, str):
            self.last_error = f"{scorer.name}: {answer}"
            return None
        return answer


def _compare(name: str, axis: str, place: int, batch: Scores, alone: Scores) -> None:
    known = batch.values[batch.valid].double()
    here, there = batch.values[place].item(), alone.values[0].item()
    if here != here:
        return  # missing in the batch: nothing to compare
    tolerance = max(_ALONE_TOLERANCE * known.std(correction=0).item(), _ROUNDING * known.abs().max().item())
    if not abs(here - there) <= tolerance:
        raise TrainingError(
            f"{name} scores a clip {axis} = {here:.6g} in a batch of {len(batch.values)} and {there:.6g} alone;"
            f" {tolerance:.2g} of difference is allowed.",
            "A score must be a function of its clip and prompt alone: answer in the order asked, without chance.",
        )


class _Guarded:
    """A scorer on its lane."""

    def __init__(self, scorer: Scorer, timeout_s: float) -> None:
        self.scorer, self.timeout_s = scorer, min(timeout_s, threading.TIMEOUT_MAX)
        self.name, self.axes = type(scorer).__name__, scorer.axes
        self.lane = _Lane(f"scorer {'/'.join(scorer.axes)}")
        self._late: Future[Any] | None = None

    def __call__(
        self, videos: Tensor, prompts: tuple[str, ...], stream: torch.cuda.Stream | None
    ) -> dict[str, Scores] | str:
        """Scores on the CPU for all axes, or what went wrong."""
        if self._late is not None and not self._late.done():
            return f"no answer within {self.timeout_s:g} s, and still at work on that batch"
        answer: Future[dict[str, Scores] | str] = Future()
        self.lane.submit(functools.partial(_answer, self.scorer, videos, prompts, stream), answer)
        try:
            return answer.result(self.timeout_s)
        except TimeoutError:
            self._late = answer
            return f"no answer within {self.timeout_s:g} s"


def _answer(
    scorer: Scorer, videos: Tensor, prompts: tuple[str, ...], stream: torch.cuda.Stream | None
) -> dict[str, Scores] | str:
    """Calls a scorer. Its failure is put into words here: a traceback would keep the frames alive."""
    try:
        with torch.no_grad(), torch.cuda.stream(stream):
            found = scorer.score(videos, prompts)
            return _fault(found, scorer.axes, len(prompts)) or {a: Scores(found[a].values.cpu()) for a in scorer.axes}
    except BaseException as error:  # noqa: BLE001  (somebody else's code, sys.exit included: a missing score)
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = traceback.format_exception_only(error)[-1].strip()
        return f"{what} ({Path(at.filename).name}, line {at.lineno})"


def _fault(found: Any, axes: Sequence[str], count: int) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if not isinstance(found, dict) or not all(isinstance(scores, Scores) for scores in found.values()):
        return f"answered {type(found).__name__} instead of a dict of Scores"
    if found.keys() != set(axes):
        return f"answered for {', '.join(map(str, found)) or 'nothing'} instead of {', '.join(axes)}"
    counts = {axis: len(found[axis].values) for axis in axes}
    return "; ".join(f"answered {n} scores of {axis} for {count} clips" for axis, n in counts.items() if n != count)


class _Lane(threading.Thread):
    """A daemon thread that does what it is handed, in order."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._ending = False
        self.start()

    def submit(self, job: Callable[[], Any], future: Future[Any]) -> None:
        self._jobs.put((job, future))

    def end(self) -> None:
        """After the job at hand."""
        self._ending = True
        self.submit(lambda: None, Future())

    def run(self) -> None:
        while not self._ending:
            _settle(*self._jobs.get())


def _settle(job: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(job())
    except Exception as error:  # noqa: BLE001  (raised again where the result is waited for)
        future.set_exception(error)


@atexit.register
def _end_lanes() -> None:
    """Stop what is at work before the interpreter goes.

    A daemon thread that returns from torch into a finished interpreter aborts the process: exit status 134 instead of
    the run's own, every time it was tried (Python before 3.14). Python code is stopped by an exception at its next
    step; whoever waits outside Python (a socket, a lock) never returns, and does no harm.
    """
    lanes = [thread for thread in threading.enumerate() if isinstance(thread, _Lane)]
    for lane in lanes:
        lane.end()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(lane.ident or 0), ctypes.py_object(SystemExit))
    deadline = time.monotonic() + _GRACE_S
    for lane in lanes:
        lane.join(max(0.0, deadline - time.monotonic()))
