"""RLHF runs that are stopped, killed, spread over processes or started from different files."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from planted_scorers import Bright
from tiny_model import make_model_folder
from tiny_rlhf import PROMPTS, TOY_REWARDS, config_of, lines, newest, watched, weights

from reelforge.engine.core.errors import DataError, ReelforgeError, TrainingError
from reelforge.engine.core.metrics import read_jsonl
from reelforge.engine.model.folder import load_codec
from reelforge.engine.rl import origin
from reelforge.engine.rl.recipe import RlhfConfig
from reelforge.engine.rl.trainer import GrpoTask
from reelforge.stages import rlhf

STEPS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def config(root: Path, model: Path, **changes: object) -> RlhfConfig:
    """Two rewards, a momentum and a running scale to lose; two updates a rollout; checkpoints that fall between."""
    root.mkdir(exist_ok=True)
    settings = {
        "rewards": [TOY_REWARDS, "planted_scorers:Bright"],
        "updates_per_rollout": 2,
        "train__steps": STEPS,
        "train__checkpoint_every": 3,
        "train__keep_last": 5,
        "loss__kl__weight": 0.01,
    }
    return config_of(root, model, **(settings | changes))


def in_child(work: Callable[[], object]) -> int:
    """Start it in a forked process; returns its id. The exit status is that of the command line."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except ReelforgeError as error:
            code = error.exit_code
        finally:
            if code == 1:
                traceback.print_exc()
            os._exit(code)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Weights, average, moments, running scales and counters, bit for bit."""
    mine, other = newest(ours), newest(theirs)
    assert mine.step == other.step == STEPS
    assert "fusion_running" in mine.groups["counters"]
    for group, tensors in other.groups.items():
        assert mine.groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(mine.groups[group][name], tensor), (group, name)
    exported = weights(ours / "transformer")
    assert all(torch.equal(exported[name], value) for name, value in weights(theirs / "transformer").items())


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    rlhf.run(config(root, model))
    return root / "run"


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bright.score

    def score(self: Bright, videos: torch.Tensor, prompts: list[str]) -> object:
        time.sleep(0.02)
        return real(self, videos, prompts)

    monkeypatch.setattr(Bright, "score", score)


def signal_after(step: int, mine: RlhfConfig, number: signal.Signals, delay_s: float) -> int:
    """Run or continue in a child, signal it ``delay_s`` after that step; its exit status."""
    child = in_child(lambda: rlhf.run(mine))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(line["step"] >= step for line in lines(mine.output)):
        time.sleep(0.002)
    time.sleep(delay_s)
    os.kill(child, number)
    return exit_status(child)


def test_checkpoints_lie_between_iterations(whole):
    steps = {line["step"] for line in read_jsonl(whole / "metrics.jsonl")}
    assert steps == set(range(1, STEPS + 1))
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006", "step-00000008"]  # 3 would have cut an iteration


def test_a_signalled_run_stops_between_iterations_and_continues_exactly(model, whole, tmp_path, monkeypatch):
    slowly(monkeypatch)
    chance, stopped = random.Random(0), 0
    for step in (1, 4, 5):
        mine = config(tmp_path / str(step), model)
        status = signal_after(step, mine, signal.SIGTERM, chance.uniform(0, 0.1))
        assert status in (0, 130)
        if status == 130:
            stopped += 1
            events = [event for event in read_jsonl(mine.output / "events.jsonl") if event["event"] == "stopped"]
            assert events and all(event["step"] % 2 == 0 and event["signal"] == "SIGTERM" for event in events)
        rlhf.run(mine)
        assert_same_end(mine.output, whole)
    assert stopped >= 2, "the signals came too late to test anything"


def test_a_killed_run_continues_exactly(model, whole, tmp_path, monkeypatch):
    slowly(monkeypatch)
    chance, killed = random.Random(1), 0
    mine = config(tmp_path / "mine", model)
    for step in (1, 3, 5, 6):  # before the first checkpoint, within an iteration, after one
        killed += signal_after(step, mine, signal.SIGKILL, chance.uniform(0, 0.1)) == -signal.SIGKILL
    assert killed >= 3, "the kills came too late to test anything"
    rlhf.run(mine)
    assert_same_end(mine.output, whole)
    steps = [line["step"] for line in lines(mine.output)]
    assert steps == list(range(1, STEPS + 1))


# --- several processes ---


def in_two_processes(work: Callable[[int], object], store: Path) -> list[int]:
    def rank_work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        work(rank)
        dist.destroy_process_group()

    children = [in_child(lambda rank=rank: rank_work(rank)) for rank in range(2)]
    return [exit_status(child) for child in children]


def test_two_ranks_do_what_one_does(model, tmp_path):
    held_out = {"scorers": ["planted_scorers:Dim"], "max_fall": 100.0}
    configs = {}
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        # Batches are others, and so is rounding: one step, in fp32, on a reward that does not amplify it.
        changes = {"updates_per_rollout": 1, "train__steps": 1, "rewards": ["planted_scorers:Bright"]}
        changes |= {"rollout__path": {"sample_precision": "fp32"}}
        configs[name] = config(root, model, held_out=watched(root, **held_out), **changes)
    rlhf.run(configs["one"])
    assert in_two_processes(lambda rank: rlhf.run(configs["two"]), tmp_path / "store") == [0, 0]
    one, two = configs["one"].output, configs["two"].output
    moments = newest(two).groups["adam"]
    for name, value in newest(one).groups["adam"].items():
        assert (moments[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    for ours, theirs in zip(lines(two, "held_out"), lines(one, "held_out"), strict=True):
        assert ours["step"] == theirs["step"] and ours["held_out"].keys() == theirs["held_out"].keys()
        for axis, facts in theirs["held_out"].items():
            assert ours["held_out"][axis]["mean"] == pytest.approx(facts["mean"], rel=1e-3, abs=1e-4), axis
    for ours, theirs in zip(lines(two, "reward"), lines(one, "reward"), strict=True):
        for axis, facts in theirs["reward"].items():
            assert ours["reward"][axis]["mean"] == pytest.approx(facts["mean"], rel=1e-3, abs=1e-3), axis
    shown = [sorted(path.name for path in out.glob("samples/*/*")) for out in (one, two)]
    assert shown[0] == shown[1] and "sheet.webp" in shown[0]


@pytest.mark.parametrize("what", ["prompts", "recipe"])
def test_ranks_that_start_from_different_files_are_refused(model, tmp_path, what):
    """On rank 1 only, as on a node with a stale copy."""
    roots = [tmp_path / str(rank) for rank in range(2)]
    configs = [config(root, model, train__seed=rank * (what == "recipe")) for rank, root in enumerate(roots)]
    if what == "prompts":
        (roots[1] / "prompts.txt").write_text("\n".join([*PROMPTS[:-1], "another one"]))

    def work(rank: int) -> None:
        try:
            rlhf.run(configs[rank])
        except TrainingError as error:
            (tmp_path / f"words{rank}").write_text(error.what)
            raise

    assert in_two_processes(work, tmp_path / "store") == [3, 3]
    said = {(tmp_path / f"words{rank}").read_text() for rank in range(2)}
    assert said == {f"Rank 1 differs from rank 0 in the {what}."}


def test_ranks_that_hold_different_weights_are_refused(model, tmp_path):
    """A bit that the origin's sample does not look at: the sums of all weights do."""
    mine = config(tmp_path / "run", model)

    def work(rank: int) -> None:
        if rank == 1:
            real = rlhf.build

            def build(*arguments: object) -> object:
                parts = real(*arguments)
                parts.task.policy.model.blocks[0].ffn.net[2].weight.data[0, 1] += 1.0
                return parts

            rlhf.build = build
        try:
            rlhf.run(mine)
        except TrainingError as error:
            (tmp_path / f"words{rank}").write_text(error.what)
            raise

    assert in_two_processes(work, tmp_path / "store") == [3, 3]
    assert "ffn.net.2.weight differs between ranks" in (tmp_path / "words0").read_text()


def test_weights_that_part_during_training_are_found_at_the_checkpoint(model, tmp_path):
    mine = config(tmp_path / "run", model, updates_per_rollout=1, train__checkpoint_every=2)

    def work(rank: int) -> None:
        real = GrpoTask.losses

        def losses(self: GrpoTask, step: int) -> object:
            if rank == 1 and step == 1:
                next(iter(self.policy.model.parameters())).data.mul_(1.01)
            return real(self, step)

        GrpoTask.losses = losses
        rlhf.run(mine)

    assert in_two_processes(work, tmp_path / "store") == [3, 3]
    assert not (mine.output / "checkpoints/step-00000002").exists()


# --- the origin ---


def test_the_origin_sees_what_matters(model, tmp_path):
    parts = rlhf.build(config(tmp_path / "a", model), torch.device("cpu"))
    task = parts.task
    parameters = list(task.policy.model.parameters())
    codec = load_codec(model).fingerprint
    known = origin.origin(task.prompts, task.sampler.grid, parameters, codec)
    assert known == parts.origin and all(len(value) == 15 for value in known.values())
    for parameter in parameters[:3]:
        parameter.data += 1e-3
        changed = origin.origin(task.prompts, task.sampler.grid, parameters, codec)
        assert changed["weights"] != known["weights"] and changed["prompts"] == known["prompts"]
        known = changed
    with pytest.raises(DataError, match="this run was started, the prompts changed"):
        origin.check_continued(known | {"prompts": "0"}, known)
    origin.check_continued(known, known)
