"""``reelforge bench enhance-study``: do rewrites help the demo's aligned model, and to what is it owed?

Every rewriter is trained by the command line itself. All are asked the same held-out requests, in phrasings that no
training saw, and their clips are judged by the request. Stopped, the same command goes on: a finished run is not
repeated.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.bench.drive import Drive, placed
from reelforge.bench.evaluation import REWARDS, VOTERS, EvaluationConfig, Measured
from reelforge.bench.exam import Exam
from reelforge.bench.judge.bootstrap import Interval, paired_interval
from reelforge.bench.judge.gsb import Gsb, compare, fix_panel
from reelforge.bench.judge.results import Score
from reelforge.bench.markdown import table as markdown_table
from reelforge.bench.rewrites import (
    TEMPLATES,
    Kept,
    Rewrite,
    best_template,
    held_out_requests,
    kept,
    template,
    trained,
    training_requests,
)
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware, rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import training_time
from reelforge.engine.core.progress import say
from reelforge.engine.model.folder import ModelFolder

# Acceptance, for every seed. Fixed before the reported run; a failed check is reported, not moved.
#   against the raw request and against the best template: net GSB by held-out voters, and the change of ta, above 0
#   against its own cold start: the mean of the rewards, in standard deviations, above 0; no fewer attributes preserved
SEEDS = (0, 1, 2)
_TEMPLATE_REQUESTS = 96
_WITHOUT_STRUCTURE = (
    'grpo.fusion.weights=[{axis="ta", weight=1.0}, {axis="vq", weight=0.5}, {axis="mq", weight=0.5},'
    ' {axis="structure", weight=0.0}]'
)
RAW, CAPTIONS = "raw request", "the scene's caption"
_ROWS = ("vq", "mq", "ta", "accuracy_colour", "accuracy_shape", "accuracy_motion", "strangeness", "frechet")


@dataclass(frozen=True)
class Arm:
    """A trained row: rewriters of each seed.

    Attributes:
        name: of the row.
        overrides: of the recipe's GRPO; None is the cold start alone.
    """

    name: str
    overrides: tuple[str, ...] | None


PE, COLD = Arm("PE", ()), Arm("cold start", None)
ARMS = (
    COLD,
    PE,
    Arm("PE without structure term", (_WITHOUT_STRUCTURE,)),
    Arm("PE without common noise", ("grpo.groups.common_noise=false",)),
)


@dataclass(frozen=True)
class Outcome:
    """A row, judged.

    Attributes:
        scores: with changes against the raw request.
        gain: of the rewards' mean over the raw request, in standard deviations of its clips.
        gsb: by reference.
        facts: on the words.
        seconds: of training.
    """

    name: str
    scores: dict[str, Score]
    gain: Interval
    gsb: dict[str, Gsb]
    facts: Kept
    seconds: float = 0.0


class Study:
    """Trains and judges.

    Args:
        demo: a finished demo's folder.
        out: where runs and results go.
        recipe: of every rewriter.
        overrides: of the recipe.
        samples: clips a request; None is as many as the demo's report takes.
        drive: runs a stage.

    Raises:
        ConfigError: the demo is not there.
    """

    def __init__(
        self, demo: Path, out: Path, recipe: Path, overrides: Sequence[str], samples: int | None, drive: Drive
    ) -> None:
        self.demo, self.out, self.recipe, self.overrides, self.drive = demo, out, recipe, overrides, drive
        if not (demo / "rlhf_model").exists() or not (demo / "pairs.jsonl").exists():
            raise ConfigError(f"{demo} is no finished demo.", "Run `reelforge demo`, or name its folder with --demo.")
        table = configuration.read_table(demo / "config.resolved.toml")
        config = configuration.build(EvaluationConfig, table["evaluation"])
        self.config = dataclasses.replace(config, samples=samples or config.samples)
        base, self.folder = ModelFolder.load(demo / "base_model"), ModelFolder.load(demo / "rlhf_model")
        self.exam = Exam(self.config, base, table["seed"])
        draws = [self.exam.evaluate(base, (), f"base draw {n}", n).measured.scores for n in (0, 1)]
        self.panel = fix_panel(draws[0], draws[1], (*REWARDS, *VOTERS))
        self.requests = held_out_requests(self.config.prompts)
        self.references = {RAW: self._sample(RAW, list)}

    def rewriter(self, arm: Arm, seed: int) -> tuple[Path, float]:
        """Train, or find trained: the rewriter's folder and the seconds that it took."""
        first = self.out / f"seed_{seed}"
        if arm in (COLD, PE):
            self._train(first, (), {"language_model": self.demo / "language_model"}, seed)
        phase = first / ("cold_start" if arm is COLD else "grpo")
        if arm.overrides:
            phase = self.out / _slug(arm.name) / f"seed_{seed}" / "grpo"
            files = {"language_model": first / "cold_start" / "rewriter"}
            self._train(phase.parent, ('cold_start="none"', *arm.overrides), files, seed)
        return phase / "rewriter", training_time(phase / "metrics.jsonl")[1]

    def _train(self, output: Path, overrides: Sequence[str], files: dict[str, Path], seed: int) -> None:
        places = {"grpo.generator": self.demo / "rlhf_model", "grpo.requests": self.demo / "requests.txt", **files}
        seeds = [f"grpo.train.seed={seed}"]
        if not overrides:
            places["cold_start.pairs"] = self.demo / "pairs.jsonl"
            seeds.append(f"cold_start.train.seed={seed}")
        self.drive(
            "enhance", self.recipe, (*self.overrides, *seeds, *overrides, *placed({**places, "output": output})), ()
        )

    def judge(self, name: str, rewrite: Rewrite, against: Sequence[str] = (RAW,), seconds: float = 0.0) -> Outcome:
        """A row, compared with earlier ones; it can be compared with from then on."""
        if name not in self.references:
            self.references[name] = self._sample(name, rewrite)
        measured, raw, seed = self.references[name], self.references[RAW], self.exam.seed
        gsb = {
            other: compare(measured.scores, self.references[other].scores, measured.labels, self.panel, other, seed)
            for other in against
        }
        facts = kept(self.requests, rewrite(self.requests))
        return Outcome(
            name,
            self.exam.table(measured, None if measured is raw else raw),
            self.gain(measured, raw),
            gsb,
            facts,
            seconds,
        )

    def gain(self, measured: Measured, below: Measured) -> Interval:
        """Change of the rewards' mean, each in standard deviations of the raw requests' clips."""
        raw = self.references[RAW].scores

        def mean(scores: dict[str, np.ndarray]) -> np.ndarray:
            return np.mean([scores[each.name] / np.nanstd(raw[each.name]) for each in REWARDS], axis=0)

        return paired_interval(mean(measured.scores), mean(below.scores), measured.labels, self.exam.seed)

    def best(self) -> int:
        """The template that earns most on training requests."""
        asked = training_requests(_TEMPLATE_REQUESTS)
        return best_template(self.folder, self.exam.judge, asked, self.config.batch_size, rng.key("templates"))

    def captions(self) -> Rewrite:
        """What the model was trained on: the same scenes in full."""
        return lambda requests: self.exam.prompts

    def _sample(self, name: str, rewrite: Rewrite) -> Measured:
        written = rewrite(self.requests)
        return self.exam.evaluate(self.folder, (), f"sampling {name}", 0, self.requests, written).measured


def run(arguments: argparse.Namespace, drive: Drive) -> int:
    """The verb."""
    study = Study(arguments.demo, arguments.out, arguments.recipe, arguments.overrides, arguments.samples, drive)
    rows = [study.judge(RAW, list), study.judge(CAPTIONS, study.captions())]
    best = study.best()
    rows += [study.judge(f"template {n + 1}", template(n)) for n in range(len(TEMPLATES))]
    chosen, found = f"template {best + 1}", []
    for arm in ARMS:
        for seed in SEEDS:
            say(f"arm: {arm.name}, seed {seed}")
            folder, seconds = study.rewriter(arm, seed)
            name, first = f"{arm.name}, seed {seed}", f"{COLD.name}, seed {seed}"
            against = (RAW, chosen) if arm is COLD else (RAW, chosen, first)
            rows.append(study.judge(name, trained(folder), against, seconds))
            if arm is PE:
                found += _checks(study, rows[-1], next(row for row in rows if row.name == first), chosen)
    return _conclude(arguments, study, rows, found, chosen)


def _checks(study: Study, row: Outcome, first: Outcome, chosen: str) -> list[tuple[str, str, str, bool]]:
    """(row, criterion, found, passed)."""
    measured, found = study.references[row.name], []
    for other in (RAW, chosen):
        vote, below = row.gsb[other], study.references[other]
        change = paired_interval(measured.scores["ta"], below.scores["ta"], measured.labels, study.exam.seed)
        found.append((f"net GSB against {other} above 0", _told(Interval(vote.net, vote.low, vote.high)), vote.low > 0))
        found.append((f"ta against {other} above 0", _told(change), change.low > 0))
    more = study.gain(measured, study.references[first.name])
    found.append(("rewards against the cold start above 0", _told(more), more.low > 0))
    told = f"{row.facts.preserved:.2f}, cold start {first.facts.preserved:.2f}"
    found.append(("no fewer attributes preserved", told, row.facts.preserved >= first.facts.preserved))
    return [(row.name, *check) for check in found]


def _told(interval: Interval) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def markdown(rows: Sequence[Outcome], found: Sequence[tuple[str, str, str, bool]], lead: str, chosen: str) -> str:
    """The study as a page."""
    head = [
        "prompts", *_ROWS, "rewards, z", "GSB against raw", f"GSB against {chosen}", "preserved", "copied", "distinct",
        "words", "training, s",
    ]  # fmt: skip
    table = [
        [
            row.name, *(f"{row.scores[name].mean:.2f}" for name in _ROWS), _told(row.gain), _vote(row, RAW),
            _vote(row, chosen), f"{row.facts.preserved:.2f}", f"{row.facts.copied:.2f}", f"{row.facts.distinct:.2f}",
            f"{row.facts.words:.0f}", f"{row.seconds:.0f}" if row.seconds else "–",
        ]
        for row in rows
    ]  # fmt: skip
    judged = [[name, criterion, told, "pass" if passed else "**fail**"] for name, criterion, told, passed in found]
    parts = (lead, markdown_table(head, table), markdown_table(["rewriter", "criterion", "found", ""], judged))
    return "\n\n".join(parts) + "\n"


def _vote(row: Outcome, other: str) -> str:
    vote = row.gsb.get(other)
    return _told(Interval(vote.net, vote.low, vote.high)) if vote else "–"


def _conclude(
    arguments: argparse.Namespace, study: Study, rows: Sequence[Outcome],
    found: Sequence[tuple[str, str, str, bool]], chosen: str,
) -> int:  # fmt: skip
    lead = (
        f"{len(study.requests)} held-out requests, {study.config.samples} clips each, judged by the request; GSB by "
        f"held-out voters on the same requests and noise, with 95 % intervals over requests. {chosen.capitalize()} "
        f"earned most on {_TEMPLATE_REQUESTS} training requests: {TEMPLATES[int(chosen.split()[-1]) - 1]!r}."
    )
    facts = {
        "demo": str(arguments.demo), "seed": study.exam.seed, "overrides": list(arguments.overrides),
        "rows": [dataclasses.asdict(row) for row in rows], "checks": list(found), "template": chosen,
        "versions": hardware.versions(), "hardware": hardware.hardware(),
    }  # fmt: skip
    replace_file(arguments.out / "study.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
    replace_file(arguments.out / "study.md", markdown(rows, found, lead, chosen))
    passed = sum(check[-1] for check in found)
    say(f"{arguments.out}/study.md and study.json are written; {passed} of {len(found)} acceptance checks pass")
    return 0


def _slug(name: str) -> str:
    return "_".join(name.lower().split())
