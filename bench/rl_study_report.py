"""What a study of RLHF arms found: acceptance checks, a JSON file and Markdown tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reelforge.bench.evaluation import ACCURACIES, REWARDS
from reelforge.bench.examiner import UNGUIDED, Verdict
from reelforge.bench.judge.results import Score

# Acceptance. Fixed before the reported run; a failed check is reported, not moved.
MIN_NET_GSB = 0.5  # by held-out voters
MAX_FRECHET_RATIO = 0.6  # to the fine-tuned model's distance
MAX_SHUFFLED_LOSS = 0.05  # of a reward's standard deviation over the fine-tuned model's clips
HELD_OUT = ("strangeness", "manifold_gap", "flicker_gap", "frechet", "background", "rim")

_REWARDS = tuple(reward.name for reward in REWARDS)
_ACCURACIES = tuple(accuracy.name for accuracy in ACCURACIES)


@dataclass(frozen=True)
class Arm:
    """A model of the study.

    Attributes:
        name: of the row and, trained, of the run's folder.
        made_by: ``given`` is the fine-tuned model, sampled in some way.
        role: what is expected of it.
        overrides: of the RLHF recipe.
        preset: laid over the recipe.
        settings: how it is sampled.
    """

    name: str
    made_by: Literal["given", "rlhf", "sft"] = "rlhf"
    role: Literal["", "candidate", "control"] = ""
    overrides: tuple[str, ...] = ()
    preset: str = ""
    settings: tuple[str, ...] = UNGUIDED


@dataclass(frozen=True)
class Training:
    """What an arm's training took and said of itself.

    Attributes:
        seconds: in its steps, by its own log; checkpoints are not in them.
        nfe: network evaluations of rollouts and training in all; 0 where that is not counted.
        gradient_cosine, within_group, rho: means over the run; None or no entry where they have no value.
        stopped: why it did not reach its end.
    """

    seconds: float
    iterations: int
    nfe: int = 0
    gradient_cosine: float | None = None
    within_group: Mapping[str, float] | None = None
    rho: Mapping[str, float] | None = None
    stopped: str = ""


@dataclass(frozen=True)
class Outcome:
    """An arm, trained and judged; no verdict when its training was stopped."""

    arm: Arm
    training: Training | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Check:
    """An acceptance criterion and what was found."""

    arm: str
    criterion: str
    found: str
    passed: bool


def acceptance(outcomes: Sequence[Outcome], scale: Mapping[str, float]) -> list[Check]:
    """All checks of candidates and controls.

    Args:
        scale: standard deviation of each reward over the fine-tuned model's clips.
    """
    checks = []
    for outcome in outcomes:
        name, verdict = outcome.arm.name, outcome.verdict
        if not outcome.arm.role:
            continue
        if verdict is None:
            stopped = outcome.training.stopped if outcome.training else ""
            checks.append(Check(name, "trained to the end", stopped, False))
        else:
            found = _of_candidate(verdict) if outcome.arm.role == "candidate" else _of_control(verdict, scale)
            checks += [Check(name, *each) for each in found]
    return checks


def _of_candidate(verdict: Verdict) -> list[tuple[str, str, bool]]:
    changes = {name: score.change for name, score in verdict.scores.items() if score.change}
    net = verdict.gsb["held-out voters"].net
    worse = [name for name in HELD_OUT if name in verdict.scores and _worse(verdict.scores[name])]
    lower = [name for name in _ACCURACIES if name in verdict.scores and _worse(verdict.scores[name])]
    return [
        (f"{name} rises", _change(verdict.scores[name]), name in changes and changes[name].low > 0) for name in _REWARDS
    ] + [
        (f"net GSB by held-out voters is {MIN_NET_GSB:g} or more", f"{net:+.2f}", net >= MIN_NET_GSB),
        (
            f"Frechet distance is {MAX_FRECHET_RATIO:g} of sft's or less",
            f"{verdict.frechet_ratio:.2f}",
            verdict.frechet_ratio <= MAX_FRECHET_RATIO,
        ),
        ("no held-out verifier gets worse", ", ".join(worse) or "none", not worse),
        ("no accuracy falls", ", ".join(lower) or "none", not lower),
    ]


def _of_control(verdict: Verdict, scale: Mapping[str, float]) -> list[tuple[str, str, bool]]:
    found = []
    for name in _REWARDS:
        change, told = verdict.scores[name].change, _change(verdict.scores[name])
        assert change is not None, "a control is compared with the fine-tuned model"
        share = f"{change.mean / scale[name]:+.3f}" if scale[name] else "fine-tuned clips are all equal in it"
        kept = change.mean >= -MAX_SHUFFLED_LOSS * scale[name]
        found.append((f"{name} does not rise", told, change.low <= 0))
        found.append((f"{name} loses {MAX_SHUFFLED_LOSS:g} of its spread or less", share, kept))
    return found


def _worse(score: Score) -> bool:
    """Whether the whole interval of the change is on the worse side."""
    assert score.change is not None, "compared with the fine-tuned model"
    return score.change.high < 0 if score.better == "higher" else score.change.low > 0


def to_table(outcomes: Sequence[Outcome], checks: Sequence[Check], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into study.json."""
    arms = [{"name": outcome.arm.name, **asdict(outcome)} for outcome in outcomes]
    return {**facts, "arms": arms, "checks": [asdict(check) for check in checks]}


def markdown(
    outcomes: Sequence[Outcome], checks: Sequence[Check], truth: Mapping[str, Score], notes: Sequence[str]
) -> str:
    """The arms' table, that of the held-out measures, and the checks'."""
    best = best_guided(outcomes)
    columns = [
        "arm", "seconds", "iterations", "NFE", *_REWARDS, "gain (z)", "net GSB, held-out voters",
        "net GSB, optimised rewards", "Frechet / sft's", "gradient cosine", "within group",
    ]  # fmt: skip
    rows = [[_mark(o, best), *_cost(o), *_scores(o, _REWARDS), *_summary(o), *_signal(o)] for o in outcomes]
    held_out = [[_mark(o, best), *_scores(o, HELD_OUT), *_scores(o, _ACCURACIES)] for o in outcomes]
    clean = [["truth", *(_mean(truth.get(name)) for name in (*HELD_OUT, *_ACCURACIES))]]
    rows.append(["truth", "", "", "", *(_mean(truth.get(name)) for name in _REWARDS), *[""] * 6])
    parts = [*notes, _grid(columns, rows), _grid(["arm", *HELD_OUT, *_ACCURACIES], held_out + clean)]
    if checks:
        table = [[c.arm, c.criterion, c.found, "pass" if c.passed else "**fail**"] for c in checks]
        parts.append(_grid(["arm", "criterion", "found", ""], table))
    return "\n\n".join(parts) + "\n"


def best_guided(outcomes: Sequence[Outcome]) -> str:
    """Which way of sampling the fine-tuned model has the largest gain."""
    given = {o.arm.name: o.verdict.gain for o in outcomes if o.arm.made_by == "given" and o.verdict}
    return max(given, key=lambda name: given[name]) if len(given) > 1 else ""


def _mark(outcome: Outcome, best: str) -> str:
    return f"{outcome.arm.name} (best of its kind)" if outcome.arm.name == best else outcome.arm.name


def _cost(outcome: Outcome) -> list[str]:
    training = outcome.training
    if training is None:
        return ["", "", ""]
    return [f"{training.seconds:.0f}", str(training.iterations), f"{training.nfe}" if training.nfe else ""]


def _scores(outcome: Outcome, names: Sequence[str]) -> list[str]:
    if outcome.verdict is None:
        return [""] * len(names)
    scores = outcome.verdict.scores
    return [_told(scores[name]) if name in scores else "" for name in names]


def _summary(outcome: Outcome) -> list[str]:
    verdict = outcome.verdict
    if verdict is None:
        return ["stopped", "", "", ""]
    votes = [f"{gsb.net:+.2f} [{gsb.low:+.2f}, {gsb.high:+.2f}]" for gsb in verdict.gsb.values()]
    return [f"{verdict.gain:+.2f}", *votes, f"{verdict.frechet_ratio:.2f}"]


def _signal(outcome: Outcome) -> list[str]:
    training = outcome.training
    if training is None:
        return ["", ""]
    cosine = "" if training.gradient_cosine is None else f"{training.gradient_cosine:.3f}"
    return [cosine, axes(training.within_group)]


def axes(values: Mapping[str, float] | None) -> str:
    """One number an axis, in words."""
    return ", ".join(f"{axis} {value:.2f}" for axis, value in (values or {}).items())


def _told(score: Score) -> str:
    return f"{score.mean:.3g} ({_change(score)})" if score.change else _mean(score)


def _mean(score: Score | None) -> str:
    return f"{score.mean:.3g}" if score else ""


def _change(score: Score) -> str:
    change = score.change
    return f"{change.mean:+.3g} [{change.low:+.3g}, {change.high:+.3g}]" if change else ""


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
