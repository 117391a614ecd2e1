"""``reelforge bench rl-study`` and ``rl-ablation``: does RLHF help the demo's model, and which part of it does?

Every arm starts from the demo's fine-tuned model and is judged on its held-out prompts. Stopped, the same command goes
on: a finished run is not repeated, a sampled model not sampled again.
"""

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reelforge.bench.drive import Drive, placed
from reelforge.bench.examiner import Examiner
from reelforge.bench.rl_forecast import trained_states
from reelforge.bench.rl_study_report import Arm, Outcome, Training, acceptance, axes, markdown, to_table
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware
from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import read_jsonl, training_time
from reelforge.engine.core.progress import say
from reelforge.engine.rl.plan import Planner, evaluations
from reelforge.engine.rl.prompts import read_prompts
from reelforge.engine.rl.recipe import RlhfConfig

SFT = Arm("sft", "given")
GUIDANCE = (1.5, 2.0, 3.0)
SEEDS = (0, 1, 2)
PROOF = (
    SFT,
    *(Arm(f"sft, guidance {scale:g}", "given", settings=(f"guidance_scale={scale}",)) for scale in GUIDANCE),
    *(Arm(f"rlhf seed {seed}", role="candidate", overrides=(f"train.seed={seed}",)) for seed in SEEDS),
    Arm("shuffled", role="control", overrides=("fusion.shuffled=true", "train.seed=0")),
    # One walk on noise may land anywhere: its spread over walks is what a gain has to be compared with.
    *(Arm(f"shuffled seed {n}", role="control", overrides=("fusion.shuffled=true", f"train.seed={n}")) for n in (1, 2)),
    Arm("sft continued", "sft"),
)
_TIMED_LIKE = "rlhf seed 0"

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NOISES = {
    "wan": ('rollout.noise.kind="wan"', "rollout.noise.eta=1.0"),
    "trunc": ('rollout.noise.kind="trunc"', "rollout.noise.eta=1.0", "rollout.noise.cap=0.45"),
    "flow": ('rollout.noise.kind="flow"', "rollout.noise.eta=0.7"),
}
METHODS = ("ours", "flash", "flow", "dance", "mix")
TRAINED_STATE_NFE = 2  # a forward and a backward
_PROBE_PROMPTS = 96


class Study:
    """Trains arms.

    Args:
        demo: a finished demo's folder.
        out: where runs go.
        recipe: of the RLHF stage.
        overrides: laid over every arm.
        drive: runs a stage.
    """

    def __init__(self, demo: Path, out: Path, recipe: Path, overrides: Sequence[str], drive: Drive) -> None:
        self.demo, self.out, self.recipe, self.overrides, self.drive = demo, out, recipe, overrides, drive

    def config(self, arm: Arm, *more: str) -> RlhfConfig:
        """The arm's recipe: every step is logged, nothing is watched."""
        return configuration.load(RlhfConfig, self.recipe, self._overrides(arm, *more), self._overlays(arm))

    def _overrides(self, arm: Arm, *more: str) -> tuple[str, ...]:
        files = {"model": self.demo / "sft_model", "prompts": self.demo / "rl_prompts.txt", "output": self._run(arm)}
        fixed = ("held_out=none", "train.log_every=1", *placed(files))
        return (*self.overrides, *arm.overrides, *fixed, *more)

    @staticmethod
    def _overlays(arm: Arm) -> tuple[Path, ...]:
        return (RECIPES / "presets" / f"{arm.preset}.toml",) if arm.preset else ()

    def weights(self, arm: Arm) -> Path:
        """Of a finished run."""
        return self._run(arm) / "transformer"

    def train(self, arm: Arm, *more: str) -> Training | None:
        """Run the arm, or find it finished; None where there is nothing to train.

        Raises:
            Interrupted: a signal asked to stop; the same command continues.
        """
        if arm.made_by == "given":
            return None
        say(f"arm: {arm.name}")
        if arm.made_by == "sft":
            return self._continue_sft(arm)
        config, stopped = self.config(arm, *more), ""
        if config.lora:
            raise ConfigError(f"{self.recipe} trains an adapter.", "The study compares full weights: leave out [lora].")
        try:
            self.drive("rlhf", self.recipe, self._overrides(arm, *more), self._overlays(arm))
        except TrainingError as error:
            stopped = error.what
        lines = [line for line in read_jsonl(config.output / "metrics.jsonl") if "step_s" in line]
        cosines = [line["gradient_cosine"] for line in lines if line["gradient_cosine"] is not None]
        _, seconds = training_time(config.output / "metrics.jsonl")
        return Training(
            seconds, len(lines), training_nfe(config, len(lines)),
            sum(cosines) / len(cosines) if cosines else None,
            _axis_means(lines, "within_group"), _axis_means(lines, "rho"), stopped,
        )  # fmt: skip

    def _continue_sft(self, arm: Arm) -> Training:
        """The demo's own fine-tuning once more, optimizer and schedule from the start, for RLHF's seconds."""
        done, taken = training_time(self.demo / "sft" / "metrics.jsonl")
        _, seconds = training_time(self.out / _slug(_TIMED_LIKE) / "metrics.jsonl")
        steps = max(1, round(seconds / taken * done))
        run = self._run(arm)
        files = {"model": self.demo / "sft_model", "cache": self.demo / "cache" / "curated", "output": run}
        self.drive("sft", self.demo / "sft" / "config.resolved.toml", (*placed(files), f"train.steps={steps}"), ())
        _, seconds = training_time(run / "metrics.jsonl")
        return Training(seconds, steps)

    def _run(self, arm: Arm) -> Path:
        return self.out / _slug(arm.name)


def training_nfe(config: RlhfConfig, iterations: int) -> int:
    """Network evaluations of so many iterations: rollouts once, trained states ``TRAINED_STATE_NFE`` times."""
    return sum(itertools.islice(_iteration_nfe(config), iterations))


def iterations_within(config: RlhfConfig, nfe: int) -> int:
    """How many whole iterations ``nfe`` evaluations pay for.

    Raises:
        ConfigError: not one.
    """
    spent = itertools.accumulate(_iteration_nfe(config))
    count = sum(1 for _ in itertools.takewhile(lambda total: total <= nfe, spent))
    if not count:
        first = training_nfe(config, 1)
        raise ConfigError(f"--nfe is {nfe}, one iteration of {config.output.name} takes {first}.", f"Give {first}.")
    return count


def _iteration_nfe(config: RlhfConfig) -> Iterator[int]:
    """Of iteration 0, 1, ... for ever."""
    plan, steps = config.plan, config.rollout.num_steps
    prompts = len(read_prompts(config.prompts).prompts)
    planner = Planner(plan, config.train.seed, prompts, config.train.batch_size, steps)
    branches = 1 if config.rollout.path.guidance_scale == 1.0 else 2
    for number in itertools.count():
        groups = planner.iteration(number)
        trained = TRAINED_STATE_NFE * config.updates_per_rollout
        yield branches * sum(evaluations(g, plan, steps) + trained * trained_states(g, plan) for g in groups)


def ablation_arms(group_size: int) -> list[Arm]:
    """Sharing x noise x rectification, and the published methods."""
    sharing = {"independent": group_size, "shared": 1}
    cells = itertools.product(sharing.items(), NOISES.items(), (True, False))
    return [
        Arm(
            f"{name} {kind}{' rectified' if rectify else ''}",
            overrides=(f"plan.distinct_noise={noises}", *rate, f"loss.rectify={str(rectify).lower()}"),
        )
        for (name, noises), (kind, rate), rectify in cells
    ] + [Arm(f"preset {method}", preset=method) for method in METHODS]


def _at_equal_cost(study: Study, arms: Sequence[Arm], nfe: int, seconds: float | None) -> list[Arm]:
    """Each arm for as many iterations as the evaluations pay for and, with ``seconds``, once more for the seconds."""
    sized = [_lasting(arm, iterations_within(study.config(arm), nfe)) for arm in arms]
    if seconds is None:
        return sized
    for arm in arms:
        trial = _lasting(dataclasses.replace(arm, name=f"calibration {arm.name}"), 2)
        study.train(trial)
        # The first iteration pays for what is prepared once.
        pace = list(read_jsonl(study.out / _slug(trial.name) / "metrics.jsonl"))[-1]["step_s"]
        longer = dataclasses.replace(arm, name=f"{arm.name}, {seconds:g} s")
        sized.append(_lasting(longer, max(1, int(seconds / pace))))
    return sized


def _lasting(arm: Arm, iterations: int) -> Arm:
    return dataclasses.replace(arm, overrides=(*arm.overrides, f"train.steps={iterations}"))


def _probe(study: Study) -> dict[str, dict[str, float]]:
    """rho of each noise at the fine-tuned weights: one rollout with two initial noises a group."""
    prompts = len(read_prompts(study.demo / "rl_prompts.txt").prompts)
    laid_out = ("plan.distinct_noise=2", "train.steps=1", f"train.batch_size={min(_PROBE_PROMPTS, prompts)}")
    trained = {kind: study.train(Arm(f"probe {kind}", overrides=(*rate, *laid_out))) for kind, rate in NOISES.items()}
    return {kind: dict(training.rho or {}) for kind, training in trained.items() if training}


def proof(arguments: argparse.Namespace, drive: Drive) -> int:
    """The verb ``rl-study``."""
    note = (
        "`sft continued` is the demo's own fine-tuning recipe restarted from the fine-tuned model, at its full rate,"
        f" for the seconds of `{_TIMED_LIKE}`."
    )
    return _conclude(arguments, _study(arguments, drive), PROOF, [note], {})


def ablation(arguments: argparse.Namespace, drive: Drive) -> int:
    """The verb ``rl-ablation``."""
    study = _study(arguments, drive)
    arms = ablation_arms(study.config(SFT).plan.group_size)
    sized = _at_equal_cost(study, arms, arguments.nfe, arguments.seconds)
    rho = _probe(study)
    told = [f"rho at the fine-tuned weights, {kind} noise: {axes(values)}." for kind, values in rho.items()]
    note = (
        f"An arm spends {arguments.nfe} network evaluations at most, a trained state counting {TRAINED_STATE_NFE};"
        " an arm with seconds in its name is as long as these."
    )
    return _conclude(arguments, study, [SFT, *sized], [note, *told], {"rho": rho})


def _study(arguments: argparse.Namespace, drive: Drive) -> Study:
    return Study(arguments.demo, arguments.out, arguments.recipe, arguments.overrides, drive)


def _conclude(
    arguments: argparse.Namespace, study: Study, arms: Sequence[Arm], notes: Sequence[str], facts: dict[str, Any]
) -> int:
    """Train, judge, write."""
    examiner = Examiner(arguments.demo, arguments.out, arguments.samples)
    outcomes = []
    for arm in arms:
        training = study.train(arm)
        verdict = None
        if not (training and training.stopped):
            weights = study.weights(arm) if training else None
            verdict = examiner.verdict(arm.name, weights, arm.settings)
        outcomes.append(Outcome(arm, training, verdict))
    checks = acceptance(outcomes, examiner.scale)
    facts |= {
        "demo": str(arguments.demo), "seed": examiner.seed, "prompts": len(examiner.prompts),
        "samples": examiner.config.samples, "scale": examiner.scale, "overrides": list(arguments.overrides),
        "truth": {name: dataclasses.asdict(score) for name, score in examiner.truth.items()},
        "panels": {source: dataclasses.asdict(panel) for source, panel in examiner.panels.items()},
        "versions": hardware.versions(), "hardware": hardware.hardware(),
    }  # fmt: skip
    table = to_table(outcomes, checks, facts)
    replace_file(arguments.out / "study.json", json.dumps(table, indent=1, allow_nan=False) + "\n")
    lead = (
        f"{len(examiner.prompts)} held-out prompts, {examiner.config.samples} clips each; changes and GSB are against"
        " `sft` on the same prompts and noise, with 95 % intervals over prompts."
    )
    replace_file(arguments.out / "study.md", markdown(outcomes, checks, examiner.truth, [lead, *notes]))
    passed = sum(check.passed for check in checks)
    told = f"; {passed} of {len(checks)} acceptance checks pass" if checks else ""
    say(f"{arguments.out}/study.md and study.json are written{told}")
    return 0


def _axis_means(lines: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Mean over lines of a table of axes, where they have a value."""
    found = {}
    for axis in lines[-1][key] if lines else ():
        values = [line[key][axis] for line in lines if line[key][axis] is not None]
        if values:
            found[axis] = sum(values) / len(values)
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())
