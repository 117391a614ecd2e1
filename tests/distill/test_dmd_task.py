"""The task's student turn: its gradient is the whole clip's, and a replay of something else ends the run."""

import math

import pytest
import torch
from tiny_causal import FEW_STEPS, SCHEDULE, SIZE, gradients, shake, texts, tiny_causal
from torch import Tensor

from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.distill import trainer
from reelforge.engine.distill.dmd import DmdConfig, dmd_losses
from reelforge.engine.distill.self_forcing import Rollout, replay, roll_out
from reelforge.engine.distill.trainer import REPLAY_TOLERANCE, DmdTask, RolloutConfig, Student
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.train.loop import LoopConfig

STUDENTS_STEP = 1  # with one step of the critic before it


def make_task(
    net: WanTransformer,
    pattern: tuple[int, ...] = (1, 2),
    judged: int = 3,
    rows: int = 2,
    precision: str = "fp32",
    rollout: RolloutConfig | None = None,
) -> DmdTask:
    dtype = net.proj_out.weight.dtype
    critic, teacher = (tiny_causal(seed, dtype).requires_grad_(False) for seed in (2, 3))
    train = LoopConfig(batch_size=2, micro_batch_size=rows, precision=precision, seed=3)
    student, how = Student(net, FEW_STEPS, pattern, (3, judged, *SIZE)), rollout or RolloutConfig("per_chunk")
    return DmdTask(
        student, critic, teacher, texts(4, dtype), (11, 12, 13), DmdConfig(critic_steps=1), how, SCHEDULE, train
    )


def backward(task: DmdTask) -> tuple[float, Tensor]:
    total = 0.0
    for loss in task.losses(STUDENTS_STEP):
        loss.backward()
        total += loss.item()
    return total, gradients(task.student.model)


@pytest.mark.parametrize(("pattern", "judged"), [((1, 2), 3), ((2, 1, 2), 3), ((3,), 3)], ids=str)
def test_the_chunks_add_up_to_the_judged_clip(pattern: tuple[int, ...], judged: int, monkeypatch) -> None:
    """One backward of the whole clip's surrogate; of a longer rollout the newest frames alone, by their chunks."""
    task, seen = make_task(tiny_causal(), pattern, judged), {}

    def directed(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        seen["x"], (seen["g"], finite) = x, distributed(x, *others)
        return seen["g"], finite

    def rolled(*arguments: object, **options: object) -> Rollout:
        seen["rollout"] = roll_out(*arguments, **options)
        return seen["rollout"]

    distributed = trainer.distribution_gradient
    monkeypatch.setattr(trainer, "distribution_gradient", directed)
    monkeypatch.setattr(trainer, "roll_out", rolled)
    total, gradient = backward(task)

    text = task.text[task._prompts(STUDENTS_STEP, range(2))]
    again = [replay(task.student.model, seen["rollout"], state, text, FEW_STEPS) for state in seen["rollout"].exits]
    clip = torch.cat(again, dim=2)[:, :, -judged:]
    assert torch.equal(clip.detach(), seen["x"])
    expected = dmd_losses(clip, seen["g"]).mean()
    expected.backward()
    wanted = gradients(task.student.model)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


NOISY = ContextConfig(noise=0.1)


@pytest.mark.parametrize("rollout", [RolloutConfig("random"), RolloutConfig("per_chunk", context=NOISY)], ids=str)
def test_the_gradient_does_not_depend_on_the_micro_batch(rollout: RolloutConfig) -> None:
    (whole, gradient), (split, same) = (
        backward(make_task(tiny_causal(), rows=rows, rollout=rollout)) for rows in (2, 1)
    )
    assert split == pytest.approx(whole, rel=1e-5)
    assert (same - gradient).norm() < 1e-5 * gradient.norm() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", ["none", "weights", "text"])
def test_a_replay_of_something_else_ends_the_run(precision: str, fault: str, monkeypatch) -> None:
    """Weights that move between rollout and replay, or another prompt's text; without a fault the two agree here bit
    for bit, whatever the precision."""
    net = tiny_causal(dtype=torch.float32)
    task = make_task(net, precision=precision)
    other = texts(6, torch.float32)[4:]
    if fault == "text":

        def swapped(model, rolled, state, _, grid):
            return replay(model, rolled, state, other, grid)

        monkeypatch.setattr(trainer, "replay", swapped)
    for number, _ in enumerate(task.losses(STUDENTS_STEP)):
        if fault == "weights" and number == 0:
            shake(net, 0.1, seed=7)
    if fault == "none":
        facts = task.describe(range(1))
        assert facts["replay_gap"] == 0.0 < REPLAY_TOLERANCE[precision] and facts["dropped"] == 0.0
        assert task.describe(range(1)) == {}
        return
    with pytest.raises(TrainingError, match="Rollout and replay differ by"):
        task.describe(range(1))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_a_replay_that_is_not_finite_spoils_its_step_and_hides_no_gap(order: tuple[int, int], monkeypatch) -> None:
    """Its loss is not finite, which the optimizer's guard sees; the other chunk's gap is judged as ever."""
    task, factors = make_task(tiny_causal(dtype=torch.float32)), [(torch.nan, 1.5)[place] for place in order]
    monkeypatch.setattr(trainer, "replay", lambda *arguments: replay(*arguments) * factors.pop(0))
    losses = [loss.item() for loss in task.losses(STUDENTS_STEP)]
    assert [math.isfinite(loss) for loss in losses] == [bool(place) for place in order]
    with pytest.raises(TrainingError, match=r"differ by \d"):
        task.describe(range(1))


def test_a_student_that_cycles_meets_every_exit(monkeypatch) -> None:
    """Whatever number of critic's steps lies between: here one, and four exits."""
    task, seen = make_task(tiny_causal(dtype=torch.float32), rollout=RolloutConfig("cycle")), []

    def watched(*arguments: object, **options: object) -> Rollout:
        seen.append(arguments[5])
        return roll_out(*arguments, **options)

    monkeypatch.setattr(trainer, "roll_out", watched)
    for step in range(8):
        next(task.losses(step))
    assert seen[1::2] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_videos_that_go_on_stay_in_step_with_a_student_that_learns() -> None:
    """Three rollouts of the same videos; between the student's two turns its weights change."""
    net = tiny_causal(dtype=torch.float32)
    task = make_task(net, rollout=RolloutConfig("per_chunk", segments=4))
    for step in range(4):
        list(task.losses(step))
        shake(net, 0.05, seed=step)
    assert task.describe(range(4))["replay_gap"] < 1e-5
    assert task._decoder is None


def test_a_clip_that_begins_within_a_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="newest 3 of 4 latent frames do not begin with a chunk"):
        make_task(tiny_causal(), pattern=(2, 2), judged=3)


def test_videos_that_go_on_are_not_cut_into_micro_batches() -> None:
    with pytest.raises(ConfigError, match=r"train.micro_batch_size = 2"):
        make_task(tiny_causal(), rows=1, rollout=RolloutConfig(segments=2))
