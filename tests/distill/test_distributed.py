"""Two gloo processes against one: the same pairs on disk, the same student, and ranks that differ are refused."""

from pathlib import Path

import pytest
import torch
from tiny_distill import CONSISTENCY, DMD, LOOP, ODE, config_of, make_teacher
from tiny_model import make_model_folder
from tiny_rlhf import PROMPTS, lines, newest, weights
from torch import Tensor
from two_processes import in_two_processes

from reelforge.engine.core.errors import TrainingError
from reelforge.engine.distill import pairs
from reelforge.stages import distill
from reelforge.stages.distill_config import DistillConfig

# An eps above rounding: where a gradient is 0 but for rounding, Adam would walk at full speed.
SMOOTH = {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5, "eps": 1e-3}
HALVES = {"train": {"steps": 6, **LOOP, "micro_batch_size": 2}, "optimizer": SMOOTH}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return make_teacher(make_model_folder(root / "tiny"), root / "teacher")


def by_one_and_by_two(root: Path, teacher: Path, **phases: object) -> tuple[DistillConfig, DistillConfig]:
    """The same recipe in this process and in two; micro-batches of one process are the two ranks' shares."""
    one, two = (config_of(root / name, teacher, **phases) for name in ("one", "two"))
    distill.run(one)
    assert in_two_processes(lambda rank: distill.run(two) and None, root) == [0, 0]
    return one, two


def stored(config: DistillConfig, phase: str) -> dict[str, Tensor]:
    """Everything that a phase's last checkpoint holds."""
    groups = newest(config.output / phase).groups
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def files(root: Path, pattern: str) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob(pattern)}


@pytest.mark.parametrize("method", [ODE, CONSISTENCY], ids=["ode", "consistency"])
def test_two_ranks_initialise_as_one_bit_for_bit(teacher, tmp_path, monkeypatch, method):
    """A sum of two micro-batches is the sum of two ranks, in either order; parts are made by either of them."""
    monkeypatch.setattr(pairs, "PART", 4)
    one, two = by_one_and_by_two(tmp_path, teacher, causal_init=method | HALVES)
    ours, theirs = stored(two, "causal_init"), stored(one, "causal_init")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    made = files(one.output / "pairs", "*/*")
    assert len([name for name in made if name.endswith(".safetensors")]) == 3
    assert made == files(two.output / "pairs", "*/*")
    assert files(one.output, "causal_init/samples/*/*") == files(two.output, "causal_init/samples/*/*")
    assert files(one.output, "model/transformer/*") == files(two.output, "model/transformer/*")


def test_two_ranks_force_themselves_as_one(teacher, tmp_path):
    """Chunks are summed within a rank first: fp32 rounding of the gradients, 1e-6 of a weight over six steps."""
    dmd = DMD | HALVES | {"critic_optimizer": SMOOTH | {"ema_decay": 0.0}}
    one, two = by_one_and_by_two(tmp_path, teacher, self_forcing=dmd)
    ours, theirs = stored(two, "self_forcing"), stored(one, "self_forcing")
    start = weights(teacher / "transformer")
    for name, value in theirs.items():
        group, _, key = name.partition("/")
        if group.endswith(("weights", "ema")):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)
        if group.endswith("weights"):
            assert (value - start[key]).abs().max() > 1e-5, name
    measured = [lines(config.output / "self_forcing", "step") for config in (one, two)]
    for mine, other in zip(*measured, strict=True):
        assert mine.keys() == other.keys()
        for name in ("loss", "critic_loss"):  # of both ranks; the other facts are rank 0's own samples'
            assert mine.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)
    shown = [sorted(path.name for path in c.output.glob("self_forcing/samples/*/*")) for c in (one, two)]
    assert shown[0] == shown[1] == ["00.mp4", "01.mp4"]


def test_a_critics_first_steps_are_the_same_bit_for_bit(teacher, tmp_path):
    """Nothing is summed over chunks there."""
    dmd = DMD | HALVES | {"dmd": {"critic_steps": 1}, "train": HALVES["train"] | {"steps": 2, "checkpoint_every": 1}}
    one, two = by_one_and_by_two(tmp_path, teacher, self_forcing=dmd)
    for config in (one, two):
        assert newest(config.output / "self_forcing").step == 2
    ours, theirs = stored(two, "self_forcing"), stored(one, "self_forcing")
    same = [torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("critic_weights/")]
    assert same and all(same)


@pytest.mark.parametrize("what", ["prompts", "recipe", "model's weights"])
def test_ranks_that_start_from_different_files_are_refused(teacher, tmp_path, what):
    """On rank 1 only, as on a node with a stale copy; nothing is written."""
    other = teacher
    if what == "model's weights":
        other = make_model_folder(tmp_path / "plain")
        model = distill.load_transformer(other / "transformer")
        model.proj_out.weight.data += 0.1
        distill.save_transformer(model, other / "transformer")
        other = make_teacher(other, tmp_path / "other")
    recipes = [{"self_forcing": DMD}, {"self_forcing": DMD, "chunk_frames": 3 if what == "recipe" else 1}]
    configs = [config_of(tmp_path / str(rank), folder, **recipes[rank]) for rank, folder in enumerate((teacher, other))]
    if what == "prompts":
        (tmp_path / "1" / "prompts.txt").write_text("\n".join([*PROMPTS[:-1], "another one"]))

    def work(rank: int) -> int:
        try:
            distill.run(configs[rank])
        except TrainingError as error:
            (tmp_path / f"words{rank}").write_text(error.what)
            return 3
        return 2

    assert in_two_processes(work, tmp_path) == [3, 3]
    said = {(tmp_path / f"words{rank}").read_text() for rank in range(2)}
    assert said == {f"Rank 1 differs from rank 0 in the {what}."}
    assert not any(config.output.exists() for config in configs)
