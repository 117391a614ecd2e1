"""Distillation runs that are stopped, killed, continued from something else, or never had a chance."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w
import torch
from tiny_distill import CONSISTENCY, DMD, ODE, OPTIMIZER, config_of, make_teacher, recipe_table
from tiny_model import TINY_TRANSFORMER, make_model_folder
from tiny_rlhf import PROMPTS, lines, newest, weights

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError, Interrupted, StorageError, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.distill import trainer
from reelforge.engine.distill.init_trainer import InitTask
from reelforge.engine.distill.trainer import DmdTask
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.stages import distill
from reelforge.stages.cli import main
from reelforge.stages.distill_config import DistillConfig

RHYTHM = {"log_every": 1, "checkpoint_every": 4, "keep_last": 9}
LONG = DMD["train"] | RHYTHM
RUNS = {
    # Checkpoints after steps 4, 8 and 9: within a cycle of three, and at the end of one.
    "self_forcing": DMD | {"train": LONG | {"steps": 9}},
    "causal_init": CONSISTENCY | {"train": LONG | {"steps": 6}, "optimizer": OPTIMIZER | {"ema_decay": 0.9}},
    # Videos of two steps: checkpoints after 4, 8 and 12.
    "streaming": DMD | {"train": LONG | {"steps": 12}, "rollout": {"segments": 2, "exit_policy": "per_chunk"}},
}
STOPS = {"self_forcing": [1, 3, 6], "causal_init": [1, 3, 4], "streaming": [1, 3, 8]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return make_teacher(make_model_folder(root / "tiny"), root / "teacher")


def config(root: Path, teacher: Path, name: str, **changes: object) -> DistillConfig:
    phase = "self_forcing" if name == "streaming" else name
    return config_of(root, teacher, previews=0, **{phase: RUNS[name]}, **changes)


@contextmanager
def exits_of_every_step() -> Iterator[list[list[int]]]:
    """Filled as steps are rolled out."""
    exits: list[list[int]] = []
    real = trainer.exit_steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "exit_steps", lambda *facts: exits.append(real(*facts)) or exits[-1])
        yield exits


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Callable[[str], tuple[Path, list[list[int]]]]:
    """Uninterrupted runs and their exits, by name."""
    done: dict[str, tuple[Path, list[list[int]]]] = {}

    def run(name: str) -> tuple[Path, list[list[int]]]:
        if name not in done:
            mine = config(tmp_path_factory.mktemp(name), teacher, name)
            with exits_of_every_step() as exits:
                distill.run(mine)
            done[name] = mine.output, exits
        return done[name]

    return run


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Weights, critic, averages, moments, counters and metrics of the only phase, bit for bit."""
    (phase,) = {"self_forcing", "causal_init"} & {path.name for path in theirs.iterdir()}
    mine, other = newest(ours / phase), newest(theirs / phase)
    assert mine.step == other.step and mine.groups.keys() == other.groups.keys()
    assert {"weights", "ema", "adam", "counters"} <= other.groups.keys()
    assert ("critic_adam" in other.groups) == (phase == "self_forcing")
    for group, tensors in other.groups.items():
        assert mine.groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(mine.groups[group][name], tensor), (group, name)
    exported = weights(ours / "model/transformer")
    assert all(torch.equal(exported[name], value) for name, value in weights(theirs / "model/transformer").items())
    measured = [[{k: v for k, v in line.items() if k != "step_s"} for line in lines(root / phase, "step")]
                for root in (ours, theirs)]  # fmt: skip
    assert measured[0] == measured[1]


def signal_at(patch: pytest.MonkeyPatch, steps: list[int], number: signal.Signals) -> None:
    """The process signals itself when a step (from 0) has made its first loss; each step once."""
    left = list(steps)
    for task in (DmdTask, InitTask):
        real = task.losses

        def losses(self: object, step: int, real: Callable = real) -> Iterator[torch.Tensor]:
            for loss in real(self, step):
                if step in left:
                    left.remove(step)
                    os.kill(os.getpid(), number)
                yield loss

        patch.setattr(task, "losses", losses)


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- stopped and killed ---


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_continues_exactly(teacher, whole, tmp_path, monkeypatch, name):
    """With the exits that each step took; a video that goes on is not cut."""
    output, uninterrupted = whole(name)
    mine = config(tmp_path, teacher, name)
    with monkeypatch.context() as patch, exits_of_every_step() as exits:
        signal_at(patch, STOPS[name], signal.SIGTERM)
        for _ in STOPS[name]:
            with pytest.raises(Interrupted):
                distill.run(mine)
        distill.run(mine)
    assert exits == uninterrupted and (name == "causal_init") == (exits == [])
    assert_same_end(mine.output, output)
    (events,) = mine.output.glob("*/events.jsonl")
    stopped = [event["step"] for event in read_jsonl(events)]
    assert stopped == ([2, 4, 10] if name == "streaming" else [step + 1 for step in STOPS[name]])


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_continues_exactly(teacher, whole, tmp_path, monkeypatch, name):
    """Before the first checkpoint, and after it within a cycle or a video."""
    mine = config(tmp_path, teacher, name)
    for step in (1, 5):
        with monkeypatch.context() as patch:
            signal_at(patch, [step], signal.SIGKILL)
            assert in_child(lambda: distill.run(mine)) == -signal.SIGKILL
    distill.run(mine)
    assert_same_end(mine.output, whole(name)[0])


@pytest.mark.parametrize("moment", ["pairs", "the weights of a phase", "the model folder"])
def test_a_run_that_is_killed_between_its_parts_goes_on(teacher, tmp_path, monkeypatch, moment):
    phases = {"causal_init": ODE, "self_forcing": DMD}
    whole, mine = (config_of(tmp_path / name, teacher, **phases) for name in ("whole", "mine"))
    distill.run(whole)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("reelforge.engine.distill.pairs.PART", 4)
        if moment == "pairs":
            real, made = distill.build.__globals__["trajectory"], []
            patch.setitem(
                distill.build.__globals__, "trajectory", lambda *a: die() if made else made.append(0) or real(*a)
            )
        else:
            patch.setattr(distill, "save_transformer" if "phase" in moment else "derive_model_folder", die)
        assert in_child(lambda: distill.run(mine)) == -signal.SIGKILL
        if moment == "pairs":
            assert len(list((mine.output / "pairs").glob("*/shard-*.json"))) == 1
        patch.undo()
        patch.setattr("reelforge.engine.distill.pairs.PART", 4)
        distill.run(mine)
    theirs = weights(whole.output / "model/transformer")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(mine.output / "model/transformer").items())


# --- what disturbs a run without ending it ---


def test_a_picture_that_cannot_be_written_does_not_end_the_run(teacher, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise StorageError("00.mp4 cannot be written (No space left on device).", "Free some space.")

    monkeypatch.setattr(distill, "write_video", full)
    assert distill.run(config_of(tmp_path, teacher, self_forcing=DMD)).model.exists()
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["rollout", "replay"])
def test_a_sample_that_is_not_finite_teaches_nothing(teacher, tmp_path, monkeypatch, where):
    """Not finite in the rollout, it is left out; in the replay, its gradient is lost and the step is skipped."""
    roll_out, replay, replayed = trainer.roll_out, trainer.replay, []

    def rolled(*facts: object, **named: object) -> object:
        found = roll_out(*facts, **named)
        if where == "rollout":
            found.x0[1, 0, 0, 0, 0] = float("nan")
        return found

    def again(*facts: object) -> torch.Tensor:
        replayed.append({name: value.clone() for name, value in facts[0].state_dict().items()})
        broken = torch.tensor([float("nan") if where == "replay" and len(replayed) == 1 else 1.0, 1, 1, 1])
        return replay(*facts) * broken.view(-1, 1, 1, 1, 1)

    monkeypatch.setattr(trainer, "roll_out", rolled)
    monkeypatch.setattr(trainer, "replay", again)
    monkeypatch.setattr(DmdTask, "_critic_losses", lambda self, *_: iter([self.critic.proj_out.weight.sum() * 0]))
    mine = config_of(tmp_path, teacher, self_forcing=DMD)
    distill.run(mine)
    first, second = lines(mine.output / "self_forcing", "dropped")
    before, after = replayed[0], replayed[3]  # of the first and the second turn's first chunks
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert (first["dropped"], first["skipped"], moved) == ((0.25, 0, True) if where == "rollout" else (0, 1, False))
    assert ("sample_rms" in first) == (where == "replay") and second["skipped"] == 0
    assert all(value.isfinite().all() for value in newest(mine.output / "self_forcing").groups["weights"].values())


def test_a_rollout_that_the_replay_does_not_repeat_ends_the_run(teacher, tmp_path, monkeypatch):
    real = trainer.replay

    def replay(*facts: object) -> torch.Tensor:
        return real(*facts) * 1.01

    monkeypatch.setattr(trainer, "replay", replay)
    with pytest.raises(TrainingError, match="Rollout and replay differ by 0.0.* of the samples' size, more than 0.001"):
        distill.run(config_of(tmp_path, teacher, self_forcing=DMD))


# --- continued from something else ---


def run_cli(root: Path, model: Path, **changes: object) -> int:
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, model, **changes)))
    return main(["distill", str(path)])


def shaken(folder: Path) -> None:
    """Other weights under the same name."""
    model = load_transformer(folder / "transformer")
    torch.nn.init.normal_(model.proj_out.weight)
    shutil.rmtree(folder / "transformer")
    save_transformer(model, folder / "transformer")


def test_a_run_continues_from_what_it_was_started_with_only(teacher, tmp_path, monkeypatch, capsys):
    model, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (model, student):
        shutil.copytree(teacher, folder)
    base = {"student": str(student), "previews": 0, "self_forcing": RUNS["self_forcing"]}
    whole = config_of(tmp_path / "whole", model, **base)
    distill.run(whole)
    root = tmp_path / "mine"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, [4], signal.SIGTERM)
        distill.run(config_of(root, model, **base))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def refused(model: Path = model, **changes: object) -> str:
        capsys.readouterr()
        assert run_cli(root, model, **(base | changes)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 2 and ("continue with" in said[1].lower() or "put back" in said[1].lower())
        return said[0]

    assert "was started with self_forcing.optimizer.lr = 0.001, now it is 0.5" in refused(
        self_forcing__optimizer__lr=0.5
    )
    assert "denoising_steps = [1000.0, 500.0], now it is [1000.0]" in refused(denoising_steps=[1000.0])
    assert "self_forcing.rollout.exit_policy = 'random', now it is 'last'" in refused(
        self_forcing__rollout__exit_policy="last"
    )
    assert "causal_init" in refused(causal_init=ODE)
    (root / "prompts.txt").write_text("\n".join([*PROMPTS[:-1], "another one"]))
    assert "Since this run was started, the prompts changed" in refused()
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")  # the same prompts
    for folder in (model, student):
        shaken(folder)
        assert "the model's weights changed" in refused()
        shutil.rmtree(folder)
        shutil.copytree(teacher, folder)
    kept = {path: path.read_bytes() for path in before if path.name not in ("prompts.txt", "recipe.toml")}
    assert all(before[path] == payload for path, payload in kept.items())
    free = {"previews": 1, "device": "auto", "gradient_checkpointing": True, "self_forcing__train__log_every": 3}
    moved = tmp_path / "moved"
    shutil.move(student, moved)
    assert run_cli(root, teacher, **(base | free | {"student": str(moved)})) == 0
    ended, theirs = newest(root / "run/self_forcing").groups, newest(whole.output / "self_forcing").groups
    assert all(torch.equal(ended[group][name], value) for group in theirs for name, value in theirs[group].items())
    assert "self_forcing.optimizer.lr" in refused(self_forcing__optimizer__lr=0.5)  # a finished one, too


# --- bad input: one sentence, exit status 2, and nothing written ---

BASE = {"causal_init": ODE, "self_forcing": DMD}
LORA = {"rank": 2}
VIDEO = {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0}
BAD = {
    "chunks that do not divide": ({"chunk_frames": 2}, "3 latent frames do not split into chunks", "Use 2 or 4"),
    "chunks of nothing": ({"chunk_frames": 0}, "chunk_frames is 0", "above 0"),
    "a negative first chunk": ({"first_chunk_frames": -1}, "first_chunk_frames is -1", "0 is chunk_frames"),
    "steps that rise": ({"denoising_steps": [500.0, 1000.0]}, "[500.0, 1000.0]", "falling timesteps in (0, 1000]"),
    "steps above the schedule": ({"denoising_steps": [1200.0, 500.0]}, "[1200.0, 500.0]", "falling"),
    "no steps": ({"denoising_steps": []}, "denoising_steps is []", "falling"),
    "half a cycle": ({"self_forcing__train__steps": 7}, "train.steps is 7; a cycle is 2 critic", "Choose 6 or 9."),
    "half a video": ({"self_forcing__rollout__segments": 5}, "6 and rollout.segments 5", "not cut"),
    "segments that the student never sees": (
        {"self_forcing__rollout__segments": 3}, "and never on the others", "no common divisor"),
    "segments in micro-batches": (
        {"self_forcing__rollout__segments": 2, "self_forcing__train__micro_batch_size": 2},
        "a rank's 4 videos are cut into micro-batches of 2", "train.micro_batch_size = 4"),
    "a rollout shorter than the clip": (
        {"self_forcing__rollout__frames": 2}, "The newest 3 of 2 latent frames", "longer than the clip"),
    "a rollout of part of a chunk": (
        {"chunk_frames": 3, "self_forcing__rollout__frames": 4}, "4 latent frames do not split", "Use 3 or 6"),
    "a clip that begins within a chunk": (
        {"chunk_frames": 2, "first_chunk_frames": 1, "self_forcing__rollout__frames": 5},
        "The newest 3 of 5 latent frames do not begin with a chunk ([1, 2, 2])", "without first_chunk_frames"),
    "a bidirectional student in segments": (
        {"few_step": DMD | {"rollout": {"context": {"noise": 0.1}}}}, "few_step.rollout sets", "in one piece"),
    "a critic beside an adapted one": (
        {"critic": "{teacher}", "self_forcing__critic_lora": LORA}, "critic is set beside critic_lora", "leave out"),
    "a cache for regression": ({"causal_init__cache": "somewhere"}, "causal_init.cache is set", "another method"),
    "a cache that is not there": (
        {"causal_init": CONSISTENCY | {"cache": "nowhere"}}, "nowhere/header.json is missing", "Run the stage"),
    "no phase": ({"causal_init": None, "self_forcing": None}, "The recipe has no phase.", "few_step, causal_init"),
    "an unknown key": ({"self_forcing__rollout__exits": 4}, "'self_forcing.rollout.exits'", "exit_policy"),
    "no such prompts": ({"prompts": "nowhere.txt"}, "Prompts nowhere.txt cannot be read", "one prompt a line"),
    "guidance below none": ({"self_forcing__dmd__teacher_guidance": 0.5}, "teacher_guidance is 0.5", "1 is none"),
    "guidance in the other convention": (
        {"causal_init__init": {"teacher_guidance": 0.5}}, "causal_init.teacher_guidance is 0.5", "v_uncond + w"),
    "nothing but noise": ({"self_forcing__rollout__context": {"noise": 1.0}}, "context.noise is 1.0", "0 is clean"),
    "a target that no linear has": (
        {"self_forcing__lora": LORA | {"targets": ["to_x"]}}, "LoRA target 'to_x' names no linear", "Allowed"),
    "a critic's target that no linear has": (
        {"self_forcing__critic_lora": LORA | {"targets": ["to_x"]}}, "LoRA target 'to_x' names no linear", ""),
    "frames that do not fit": ({"video": VIDEO | {"num_frames": 8}}, "num_frames is 8; the codec needs", "Use 5 or 9"),
    "a student of other latents": ({"student": "{latents}"}, "has in_channels = 8, the teacher", "must share"),
    "a critic of other text": ({"critic": "{text}"}, "has text_dim = 20, the teacher", "text encoder"),
    "a teacher of consistency of other latents": (
        {"causal_init": CONSISTENCY | {"teacher": "{latents}"}}, "has in_channels = 8", "must share"),
    "a student for a teacher": ({"teacher": "{student}"}, "is itself sampled chunk by chunk", "`student`"),
    "no teacher": ({"teacher": "nowhere"}, "nowhere", ""),
    "a teacher with a clip that its codec cannot make": ({"teacher": "{longer}"}, "num_frames is 11", "Use 9 or 13"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(teacher, tmp_path_factory) -> dict[str, str]:
    """Models that do not fit."""
    root = tmp_path_factory.mktemp("misfits")
    for name, changes in {"latents": {"in_channels": 8, "out_channels": 8}, "text": {"text_dim": 20}}.items():
        save_transformer(WanTransformer.from_config(TINY_TRANSFORMER | changes), root / name / "transformer")
    for name, key, value in (("student", "chunk_frames", 3), ("longer", "video", VIDEO | {"num_frames": 11})):
        shutil.copytree(teacher, root / name)
        extras = root / name / "reelforge.json"
        extras.write_text(json.dumps(json.loads(extras.read_text()) | {key: value}))
    return {name: str(root / name) for name in ("latents", "text", "student", "longer")} | {"teacher": str(teacher)}


def filled(value: object, folders: dict[str, str]) -> object:
    """``{name}`` to the folder of that name."""
    if isinstance(value, dict):
        return {name: filled(inner, folders) for name, inner in value.items()}
    return value.format(**folders) if isinstance(value, str) else value


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(teacher, folders, tmp_path, capsys, case):
    changes, what, hint = BAD[case]
    table = filled(BASE | changes, folders)
    table = {name: value for name, value in table.items() if value is not None}
    assert run_cli(tmp_path, teacher, **table) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and what in said[0] and hint in said[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["self_forcing", "causal_init"])
def test_a_batch_smaller_than_the_ranks_is_refused_at_once(teacher, tmp_path, monkeypatch, name):
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    monkeypatch.setattr(distributed, "sum_", lambda tensors: None)
    with pytest.raises(ConfigError, match="A global batch of 4 leaves some of 5 processes idle"):
        distill.run(config(tmp_path, teacher, name))
    assert not (tmp_path / "run").exists()
