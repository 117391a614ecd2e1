"""A rewriter's trainings that are stopped, killed, continued from something else, or never had a chance."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
import torch
from two_processes import in_two_processes

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from planted_scorers import Failing
from tiny_enhance import REQUESTS, config_of, make_taught_model, measured, recipe_table, same_weights
from tiny_model import make_model_folder
from tiny_rlhf import lines, newest

from reelforge.engine.core.errors import DataError, Interrupted, StorageError, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.rl.cold_start import ColdStartTask
from reelforge.engine.rl.rewriting import RewritingTask
from reelforge.stages import enhance
from reelforge.stages.cli import main
from reelforge.stages.enhance_config import EnhanceConfig

TASKS = {"cold_start": ColdStartTask, "grpo": RewritingTask}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def config(root: Path, language: Path, model: Path, **changes: object) -> EnhanceConfig:
    """With a look at every checkpoint."""
    root.mkdir(exist_ok=True)
    (root / "held_out.txt").write_text("a cyan circle, up\n")
    return config_of(root, language, model, grpo__held_out={"requests": str(root / "held_out.txt")}, **changes)


@pytest.fixture(scope="module")
def whole(language, model, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    mine = config(tmp_path_factory.mktemp("whole"), language, model)
    enhance.run(mine)
    return mine.output


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Weights, averages, moments, running scales, counters, metrics and the rewriters of both phases, bit for bit."""
    for phase in TASKS:
        mine, other = newest(ours / phase), newest(theirs / phase)
        assert mine.step == other.step and mine.groups.keys() == other.groups.keys()
        assert ("fusion_running" in other.groups["counters"]) == (phase == "grpo")
        for group, tensors in other.groups.items():
            assert mine.groups[group].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(mine.groups[group][name], tensor), (phase, group, name)
        assert measured(ours / phase) == measured(theirs / phase)
        assert same_weights(ours / phase / "rewriter", theirs / phase / "rewriter")
    shown = [
        {path.relative_to(root): path.read_text() for path in root.glob("grpo/samples/*/*")} for root in (ours, theirs)
    ]
    assert shown[0] == shown[1] and shown[0]


def signal_at(patch: pytest.MonkeyPatch, phase: str, steps: list[int], number: signal.Signals) -> None:
    """The process signals itself when a step (from 0) of a phase has made its first loss; each step once."""
    left, real = list(steps), TASKS[phase].losses

    def losses(self: object, step: int) -> Iterator[torch.Tensor]:
        for loss in real(self, step):
            if step in left:
                left.remove(step)
                os.kill(os.getpid(), number)
            yield loss

    patch.setattr(TASKS[phase], "losses", losses)


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- stopped and killed ---


@pytest.mark.parametrize(("phase", "steps", "ends"), [("cold_start", [0, 3], [1, 4]), ("grpo", [0, 3], [2, 4])])
def test_a_stopped_run_continues_exactly(language, model, whole, tmp_path, monkeypatch, phase, steps, ends):
    """An iteration of two updates goes on to its end."""
    mine = config(tmp_path / "mine", language, model)
    with monkeypatch.context() as patch:
        signal_at(patch, phase, steps, signal.SIGTERM)
        for _ in ends:
            with pytest.raises(Interrupted, match="Stopped by SIGTERM after step"):
                enhance.run(mine)
        enhance.run(mine)
    assert [event["step"] for event in read_jsonl(mine.output / phase / "events.jsonl")] == ends
    assert_same_end(mine.output, whole)


@pytest.mark.parametrize("phase", TASKS)
def test_a_killed_run_continues_exactly(language, model, whole, tmp_path, monkeypatch, phase):
    """Before the first checkpoint, and after it within an iteration."""
    mine = config(tmp_path / "mine", language, model)
    for step in (1, 4 if phase == "cold_start" else 5):
        with monkeypatch.context() as patch:
            signal_at(patch, phase, [step], signal.SIGKILL)
            assert in_child(lambda: enhance.run(mine)) == -signal.SIGKILL
    enhance.run(mine)
    assert_same_end(mine.output, whole)


@pytest.mark.parametrize("moment", ["the headers", "a rewriter's files", "a rewriter's settings", "its renaming"])
def test_a_run_that_is_killed_between_its_parts_goes_on(language, model, whole, tmp_path, monkeypatch, moment):
    """Half a rewriter is none."""
    mine = config(tmp_path / "mine", language, model)
    saved = LanguageModel.save

    def save(self: LanguageModel, folder: Path) -> None:
        saved(self, folder)
        die()

    with monkeypatch.context() as patch:
        if moment == "the headers":
            patch.setattr(enhance, "replace_file", die)
        elif moment == "a rewriter's files":
            patch.setattr(LanguageModel, "save", save)
        elif moment == "a rewriter's settings":
            patch.setattr("reelforge.engine.enhance.rewriter.write_json", die)
        else:
            patch.setattr("reelforge.engine.core.files.Path.rename", die)
        assert in_child(lambda: enhance.run(mine)) == -signal.SIGKILL
    assert not (mine.output / "cold_start/rewriter").exists()
    enhance.run(mine)
    assert_same_end(mine.output, whole)


def test_a_disk_that_refuses_the_rewriter_loses_nothing(language, model, whole, tmp_path, monkeypatch):
    mine = config(tmp_path / "mine", language, model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left on device"):
        patch.setattr(LanguageModel, "save", full)
        enhance.run(mine)
    assert not list((mine.output / "cold_start").glob("*rewriter*"))
    enhance.run(mine)
    assert_same_end(mine.output, whole)


# --- several processes ---


@pytest.mark.parametrize("phase", TASKS)
def test_two_ranks_do_what_one_does(language, model, tmp_path, phase):
    """A step of either phase, on uneven parts of a batch: Adam has seen the same gradient."""
    (other,) = TASKS.keys() - {phase}
    changes = {f"{phase}__train__batch_size": 3, f"{phase}__train__steps": 1, "grpo__updates_per_rollout": 1}
    changes |= {"grpo__rewards": ["planted_scorers:Bright"], other: None}
    if phase == "cold_start":
        changes = {name: value for name, value in changes.items() if not name.startswith("grpo__")}
    configs = [config_of(tmp_path / name, language, model, **changes) for name in ("one", "two")]
    enhance.run(configs[0])
    assert in_two_processes(lambda rank: enhance.run(configs[1]) and 0, tmp_path) == [0, 0]
    moments, theirs = (newest(each.output / phase).groups["adam"] for each in configs)
    assert moments.keys() == theirs.keys() and len(moments) > 30
    for name, value in theirs.items():
        assert (moments[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    (ours,), (one,) = (lines(each.output / phase) for each in configs)
    assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert (configs[1].output / phase / "rewriter/rewriter.json").exists()


def test_ranks_that_start_from_different_files_are_refused(language, model, tmp_path):
    """On rank 1 only, as on a node with a stale copy."""
    configs = [config(tmp_path / str(rank), language, model) for rank in range(2)]
    (tmp_path / "1/requests.txt").write_text("\n".join([*REQUESTS[:-1], "another one"]))

    def work(rank: int) -> int:
        try:
            enhance.run(configs[rank])
        except TrainingError as error:
            return 6 if "Rank 1 differs from rank 0 in the prompts" in error.what else 3
        return 2

    assert in_two_processes(work, tmp_path) == [6, 6]
    assert not configs[0].output.exists() and not configs[1].output.exists()


# --- continued from something else ---


def recipe_file(root: Path, language: Path, model: Path, **changes: object) -> str:
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, language, model, **changes)))
    return str(path)


def shaken(folder: Path) -> None:
    """Other weights under the same name."""
    made = LanguageModel.load(folder)
    made.model.lm_head.weight.data += 0.01
    made.save(folder)


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def stopped(language, model, tmp_path, monkeypatch) -> Path:
    """A run that was stopped in its second phase; language model, generator and recipe lie beside it."""
    shutil.copytree(language, tmp_path / "language")
    shutil.copytree(model, tmp_path / "model")
    recipe_file(tmp_path, tmp_path / "language", tmp_path / "model")
    with monkeypatch.context() as patch:
        signal_at(patch, "grpo", [2], signal.SIGTERM)
        assert main(["enhance", str(tmp_path / "recipe.toml")]) == 130
    return tmp_path


def refused(root: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> str:
    """The sentence; nothing of the run has changed."""
    before = {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["enhance", str(root / "recipe.toml"), *(word for each in sets for word in ("--set", each))]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and ("continue with" in said[1].lower() or "put back" in said[1].lower())
    assert before == {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}
    return said[0]


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("cold_start.optimizer.lr=0.5", "cold_start.optimizer.lr = 0.003, now it is 0.5"),
        ("cold_start.identity=0.5", "cold_start.identity = 0.1, now it is 0.5"),
        ("dialogue.turn=Say: {request}", "dialogue.turn = '{request}', now it is 'Say: {request}'"),
        ("grpo.groups.group_size=4", "grpo.groups.group_size = 3, now it is 4"),
        ("grpo.loss.kl=0.1", "grpo.loss.kl = 0.005, now it is 0.1"),
        ("grpo.rewards=['planted_scorers:Bright']", "grpo.rewards"),
        ("grpo.sampling=['num_steps=3']", "grpo.sampling"),
        ("structure.words=[5, 12]", "structure.words = [6, 12], now it is [5, 12]"),
        ("grpo.updates_per_rollout=1", "grpo.updates_per_rollout = 2, now it is 1"),
    ],
)
def test_a_changed_recipe_is_refused(stopped, capsys, setting, what):
    assert f"was started with {what}" in refused(stopped, capsys, setting)


@pytest.mark.parametrize(
    "what", ["pairs", "prompts", "language model", "generator's weights", "generator's schedule",
             "generator's steps", "generator's words", "generator's codec"],
)  # fmt: skip
def test_changed_files_are_refused(stopped, capsys, language, model, what):
    """And taken again once they are what they were."""
    kept = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and "run" not in path.parts[-3:]}
    folder = stopped / "model"
    if what == "pairs":
        path = stopped / "pairs.jsonl"
        path.write_text(path.read_text().replace("navy", "black"))
    elif what == "prompts":
        (stopped / "requests.txt").write_text("\n".join([*REQUESTS[:-1], "cyan box, right"]))
    elif what == "language model":
        shaken(stopped / "language")
    elif what == "generator's weights":
        weights = folder / "transformer/diffusion_pytorch_model.safetensors"
        payload = bytearray(weights.read_bytes())
        payload[-2] ^= 1
        weights.write_bytes(payload)
    elif what == "generator's schedule":
        edited(folder / "scheduler/scheduler_config.json", flow_shift=5.0)
    elif what == "generator's steps":
        edited(folder / "reelforge.json", num_steps=3)
    elif what == "generator's words":
        edited(folder / "text_encoder/config.json", seed=1)
    else:
        (weights,) = (folder / "vae").glob("*.safetensors")
        payload = bytearray(weights.read_bytes())
        payload[-2] ^= 1
        weights.write_bytes(payload)
    noun = "the generator" if what.startswith("generator") else f"the {what}"
    assert f"Since this run was started, {noun} changed" in refused(stopped, capsys)
    for path, payload in kept.items():
        path.write_bytes(payload)
    assert main(["enhance", str(stopped / "recipe.toml")]) == 0


def test_what_does_not_decide_the_weights_may_change(stopped, whole, capsys):
    """Where things lie, how often is reported and watched, and for how long a scorer is waited for."""
    for name in ("language", "model", "pairs.jsonl", "requests.txt"):
        shutil.move(stopped / name, stopped / f"moved-{name}")
    (stopped / "moved-requests.txt").write_text("\n\n".join(REQUESTS) + "\n\n")  # the same requests
    (stopped / "watched.txt").write_text("a cyan circle, up\n")
    free = {
        "language_model": stopped / "moved-language", "grpo.generator": stopped / "moved-model",
        "cold_start.pairs": stopped / "moved-pairs.jsonl", "grpo.requests": stopped / "moved-requests.txt",
        "device": "auto", "grpo.train.keep_last": 9, "grpo.train.checkpoint_every": 1, "grpo.scoring.timeout_s": 60.0,
        "grpo.scoring.missing_limit": 0.9, "grpo.held_out.requests": stopped / "watched.txt",
    }  # fmt: skip
    sets = [f"{name}={value}" for name, value in free.items()]
    assert main(["enhance", str(stopped / "recipe.toml"), *(word for each in sets for word in ("--set", each))]) == 0
    assert same_weights(stopped / "run/grpo/rewriter", whole / "grpo/rewriter")
    assert [line["step"] for line in lines(stopped / "run/grpo", "held_out")] == [6]
    assert "grpo.optimizer.lr = 0.001, now it is 0.5" in refused(stopped, capsys, "grpo.optimizer.lr=0.5")


# --- rewards that go away ---


def test_a_scorer_that_breaks_down_ends_the_run_and_it_goes_on(language, model, tmp_path, monkeypatch):
    """With its words; mended, the run ends where it would have ended."""
    changes = {"grpo__rewards": ["planted_scorers:Failing"], "grpo__train__checkpoint_every": 1}
    mine, other = (config_of(tmp_path / name, language, model, **changes) for name in ("mine", "other"))
    monkeypatch.setattr(Failing, "good", 1 + 3)  # the first batch is scored again, clip by clip
    with pytest.raises(TrainingError, match="100% of the iteration's samples lack a score.*reward server is down"):
        enhance.run(mine)
    assert [line["step"] for line in lines(mine.output / "grpo")] == [1, 2]
    monkeypatch.setattr(Failing, "good", 10**6)
    assert same_weights(enhance.run(mine).rewriter, enhance.run(other).rewriter)


def test_pairs_that_vanish_during_a_run_are_named(language, model, tmp_path, monkeypatch):
    mine = config(tmp_path / "mine", language, model)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, "cold_start", [2], signal.SIGTERM)
        enhance.run(mine)
    (tmp_path / "mine/pairs.jsonl").unlink()
    with pytest.raises(DataError, match="pairs.jsonl cannot be read"):
        enhance.run(mine)
    assert newest(mine.output / "cold_start").step == 3
