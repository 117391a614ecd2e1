"""``reelforge bench distill-study``: is the demo's student level with its teacher, and to what does it owe that?

Every arm is distilled from the demo's aligned model by the command line itself, and judged on held-out prompts against
that model as it teaches. Stopped, the same command goes on: a finished run is not repeated, a sampled model not sampled
again.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.bench.drive import Drive, placed
from reelforge.bench.examiner import Examiner, Verdict
from reelforge.bench.markdown import table as markdown_table
from reelforge.engine.core import config as configuration
from reelforge.engine.core import hardware
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import training_time
from reelforge.engine.core.progress import say

# Acceptance. Fixed before the reported run; a failed check is reported, not moved.
MIN_RECOVERY = 0.9
MAX_ACCURACY_LOSS = 0.02  # of colour and direction
MAX_SHARE_OF_WORK = 1 / 8  # of the teacher's token-forwards
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """A row of the study.

    Attributes:
        name: of the row and, trained, of the run's folder.
        overrides: of the recipe; none is the teacher, sampled in some way.
        settings: how it is sampled; none is what its model folder says.
        begins_with: arm whose causal initialisation it starts from.
        candidate: whether the acceptance criteria apply.
    """

    name: str
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    begins_with: str = ""
    candidate: bool = False


def arms(few_steps: str, guidance: float, frames: int) -> list[Arm]:
    """All rows.

    Args:
        few_steps: the recipe's denoising steps, as TOML.
        guidance: at which the teacher teaches.
        frames: latent frames of a clip: one chunk of so many is the bidirectional model.
    """
    untrained = (f"denoising_steps={few_steps}", "guidance_scale=1.0")
    first = "student seed 0"
    no_init, no_student = "causal_init=none", "self_forcing=none"
    return [
        Arm("teacher, 20 steps", settings=(f"guidance_scale={guidance}", "num_steps=20")),
        Arm("teacher, few steps, untrained", settings=(*untrained, f"chunk_frames={frames}")),
        Arm("teacher, few steps, causal, untrained", settings=(*untrained, "chunk_frames=1")),
        *(
            Arm(
                f"student seed {seed}",
                (f"causal_init.train.seed={seed}", f"self_forcing.train.seed={seed}"),
                candidate=True,
            )
            for seed in SEEDS
        ),
        Arm("initialisation alone", (no_student,), untrained),
        Arm("no initialisation", (no_init,)),
        Arm("ODE initialisation", ('causal_init.init.method="ode"',)),
        Arm("consistency initialisation", ('causal_init.init.method="consistency"',)),
        Arm("4 steps", (no_init, "denoising_steps=[1000, 750, 500, 250]"), begins_with=first),
        Arm("1 step", (no_init, "denoising_steps=[1000]"), begins_with=first),
        Arm("clean context", (no_init, 'self_forcing.rollout.context.kind="clean"'), begins_with=first),
        Arm("noisy context", (no_init, "self_forcing.rollout.context.noise=0.1",
                              'self_forcing.rollout.context.kind="clean"'), begins_with=first),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """An arm, trained and judged; ``seconds`` of training by phase."""

    arm: Arm
    verdict: Verdict
    seconds: Mapping[str, float]


def distil(
    arm: Arm, demo: Path, out: Path, recipe: Path, overrides: Sequence[str], drive: Drive
) -> tuple[Path, dict[str, float]]:
    """Run the verb, or find it finished; returns the student's model folder and seconds of training by phase."""
    folder = out / _slug(arm.name)
    files = {"teacher": demo / "rlhf_model", "prompts": demo / "rl_prompts.txt", "output": folder}
    if arm.begins_with:
        files["student"] = out / _slug(arm.begins_with) / "causal_init"
    drive("distill", recipe, (*overrides, *arm.overrides, *placed(files)), ())
    logs = sorted(folder.glob("*/metrics.jsonl"))
    return folder / "model", {log.parent.name: training_time(log)[1] for log in logs}


def run(arguments: argparse.Namespace, drive: Drive) -> int:
    """The verb."""
    table = configuration.read_table(arguments.recipe)
    for override in arguments.overrides:
        configuration.override(table, override)
    guidance = table["causal_init"]["pairs"]["guidance_scale"]
    examiner = Examiner(arguments.demo, arguments.out, arguments.samples, "rlhf", (f"guidance_scale={guidance}",))
    frames = 1 + (examiner.folder.defaults.video.num_frames - 1) // examiner.folder.codec.temporal_stride
    teacher = Outcome(Arm("teacher"), examiner.verdict("teacher", None, examiner.settings), {})
    outcomes = [teacher]
    for arm in arms(json.dumps(table["denoising_steps"]), guidance, frames):
        say(f"arm: {arm.name}")
        if not arm.overrides:
            outcomes.append(Outcome(arm, examiner.verdict(arm.name, None, arm.settings), {}))
            continue
        model, seconds = distil(arm, arguments.demo, arguments.out, arguments.recipe, arguments.overrides, drive)
        outcomes.append(Outcome(arm, examiner.verdict_of_folder(arm.name, model, arm.settings), seconds))
    return _conclude(arguments, examiner, outcomes)


def checks(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, bool]]:
    """(arm, criterion, found, passed) of every candidate against the teacher, the first row."""
    teacher, found = outcomes[0].verdict, []
    for outcome in outcomes:
        if not outcome.arm.candidate:
            continue
        verdict, name = outcome.verdict, outcome.arm.name
        for axis, kept in verdict.recovery.items():
            told = f"{kept.mean:.2f} [{kept.low:.2f}, {kept.high:.2f}]"
            found.append((name, f"recovery of {axis} >= {MIN_RECOVERY}", told, kept.mean >= MIN_RECOVERY))
        for axis in ("accuracy_colour", "accuracy_motion"):
            lost = teacher.scores[axis].mean - verdict.scores[axis].mean
            found.append((name, f"{axis} at most {MAX_ACCURACY_LOSS} below", f"{lost:.3f}", lost <= MAX_ACCURACY_LOSS))
        share = verdict.token_forwards / teacher.token_forwards
        found.append((name, "token-forwards at most 1/8", f"1/{1 / share:.1f}", share <= MAX_SHARE_OF_WORK))
    return found


def markdown(outcomes: Sequence[Outcome], found: Sequence[tuple[str, str, str, bool]], lead: str) -> str:
    """The study as a page."""
    axes = ("vq", "mq", "ta", "accuracy_colour", "accuracy_motion", "accuracy_shape", "strangeness", "manifold",
            "background", "frechet")  # fmt: skip
    head = ["arm", *axes, "recovery of ta", "GSB against the teacher", "token-forwards", "training, s"]
    rows = []
    for outcome in outcomes:
        verdict = outcome.verdict
        gsb, kept = verdict.gsb["held-out voters"], verdict.recovery.get("ta")
        rows.append([
            outcome.arm.name, *(f"{verdict.scores[axis].mean:.2f}" for axis in axes),
            f"{kept.mean:.2f} [{kept.low:.2f}, {kept.high:.2f}]" if kept else "–",
            f"{gsb.net:+.2f} [{gsb.low:+.2f}, {gsb.high:+.2f}]", f"{verdict.token_forwards:,}",
            " + ".join(f"{seconds:.0f}" for seconds in outcome.seconds.values()) or "–",
        ])  # fmt: skip
    judged = [[arm, criterion, told, "pass" if passed else "**fail**"] for arm, criterion, told, passed in found]
    parts = (lead, markdown_table(head, rows), markdown_table(["arm", "criterion", "found", ""], judged))
    return "\n\n".join(parts) + "\n"


def _conclude(arguments: argparse.Namespace, examiner: Examiner, outcomes: Sequence[Outcome]) -> int:
    found = checks(outcomes)
    lead = (
        f"{len(examiner.prompts)} held-out prompts, {examiner.config.samples} clips each; GSB against the teacher by "
        "held-out voters on the same prompts and noise, with 95 % intervals over prompts."
    )
    facts: dict[str, Any] = {
        "demo": str(arguments.demo), "seed": examiner.seed, "prompts": len(examiner.prompts),
        "samples": examiner.config.samples, "overrides": list(arguments.overrides),
        "arms": [dataclasses.asdict(outcome) for outcome in outcomes], "checks": found,
        "versions": hardware.versions(), "hardware": hardware.hardware(),
    }  # fmt: skip
    replace_file(arguments.out / "study.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
    replace_file(arguments.out / "study.md", markdown(outcomes, found, lead))
    passed = sum(check[-1] for check in found)
    say(f"{arguments.out}/study.md and study.json are written; {passed} of {len(found)} acceptance checks pass")
    return 0


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
