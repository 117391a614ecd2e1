"""The rewriter's GRPO in two gloo processes against one: the same answers, rewards, gradients and weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from safetensors.torch import load_file, save_file
from tiny_enhance import make_taught_model
from tiny_rewriting import CUT, GROUP, Screen, apart, chosen_requests, make_task, plant, well_formed
from two_processes import in_two_processes

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import TrainingError
from reelforge.engine.rewards.scoring import ScoringConfig
from reelforge.engine.rl.advantage import Advantages, Fusion
from reelforge.engine.rl.rewriting import RewritingTask
from reelforge.engine.train.state import OptimizerConfig, TrainState

BATCH, STEPS = 3, 4  # rank 0 has one group, rank 1 has two; two updates a rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model")


def prepared(folder: Path, what: str) -> RewritingTask:
    """A task in which the second rank's groups, in one process the last two, are of some kind in the first rollout."""
    task = make_task(folder, Screen(unscored=["lost"]), updates=2, batch=BATCH, rows=2)
    second = chosen_requests(task)[1:]
    if what == "all cut":
        plant(task, dict.fromkeys(second, [CUT] * GROUP))
    elif what == "uncounted":
        plant(task, {request: [well_formed(request)] * GROUP for request in second})
    elif what == "missing":
        plant(task, {request: [well_formed("lost")] * GROUP for request in second})
    return task


class Told(Fusion):
    """Remembers the tables of rewards."""

    def __call__(self, rewards: Tensor, wanted: Tensor | None = None) -> Advantages:
        self.tables = [*getattr(self, "tables", []), rewards.clone()]
        return super().__call__(rewards, wanted)


def train(task: RewritingTask) -> dict[str, Tensor]:
    """Rewards and gradients of every step, and what is left."""
    task.fusion, gradients = Told(task.fusion.config, task.axes), []

    def observe(parts: Sequence[Tensor]) -> float:
        gradients.append(torch.cat([part.flatten() for part in parts]).clone())
        return 1.0

    state = TrainState(
        dict(task.language.model.named_parameters()), OptimizerConfig(lr=1e-3, warmup_steps=0), STEPS, pace=observe
    )
    for step in range(STEPS):
        state.optimizer_step(task.losses(step))
    distributed.check_replicas(state.parameters)
    weights = torch.cat([weight.detach().flatten() for weight in state.parameters.values()])
    own = torch.tensor([float(row.counted) for row in task._rows])
    return {"rewards": torch.stack(task.fusion.tables), "gradients": torch.stack(gradients), "weights": weights,
            "running": task.fusion.running, "tokens": torch.tensor(task._tokens), "own": own}  # fmt: skip


@pytest.mark.parametrize("what", ["as drawn", "all cut", "uncounted", "missing"])
def test_two_ranks_are_one_process(folder, tmp_path, what):
    """Also where one of them has nothing to learn from: it gives zeros, and waits for nobody."""

    def work(rank: int) -> None:
        save_file(train(prepared(folder, what)), tmp_path / f"{rank}.safetensors")

    one = train(prepared(folder, what))
    assert in_two_processes(work, tmp_path) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert (len(first.pop("own")), len(second.pop("own")), len(one.pop("own"))) == (GROUP, 2 * GROUP, 3 * GROUP)
    for name in one:
        assert torch.equal(first[name].nan_to_num(1e9), second[name].nan_to_num(1e9)), name
    lost = one["rewards"][0].isnan()
    assert lost[:, 0].sum() == 0 and (first["rewards"].isnan() == one["rewards"].isnan()).all()
    assert lost.any() == (what in ("all cut", "missing"))
    torch.testing.assert_close(first["rewards"], one["rewards"], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert first["tokens"] == one["tokens"] > 0
    assert apart(first["gradients"][0], one["gradients"][0]) < 3e-6, "nothing has drifted yet"
    assert max(apart(ours, theirs) for ours, theirs in zip(first["gradients"], one["gradients"], strict=True)) < 1e-4
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=2e-5)
    torch.testing.assert_close(first["running"], one["running"], rtol=1e-6, atol=0)


def test_ranks_write_different_answers(folder, tmp_path):
    """Each its own groups', which together are one process'."""

    def rollout(task: RewritingTask) -> Tensor:
        list(task.losses(0))
        rows = [[*row.answer.ids, *[0] * 40][:40] for row in task._rows]
        return torch.tensor(rows)

    def work(rank: int) -> None:
        save_file({"ids": rollout(prepared(folder, "as drawn"))}, tmp_path / f"{rank}.safetensors")

    assert in_two_processes(work, tmp_path) == [0, 0]
    parts = [load_file(tmp_path / f"{rank}.safetensors")["ids"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), rollout(prepared(folder, "as drawn")))


@pytest.mark.parametrize("what", ["missing", "cut", "gap"])
def test_what_ends_one_rank_ends_both(folder, tmp_path, what):
    """By the same sentence, and before a step."""
    words = {"missing": "lack a score", "cut": "was cut at", "gap": "log-probabilities"}[what]

    def work(rank: int) -> int:
        task = prepared(folder, "missing")
        task.filming.scoring.config = ScoringConfig(missing_limit=0.1 if what == "missing" else 1.0)
        if what == "cut":
            plant(task, dict.fromkeys(task.requests, [CUT] * GROUP))
        if what == "gap" and rank:
            real = task.write
            task.write = lambda asked: [dataclasses.replace(each, logp=each.logp - 0.01) for each in real(asked)]
        before = [weight.detach().clone() for weight in task.language.model.parameters()]
        try:
            train(task)
        except TrainingError as error:
            kept = all(map(torch.equal, before, task.language.model.parameters()))
            return 6 if kept and words in error.what else 3
        return 2

    assert in_two_processes(work, tmp_path) == [6, 6]
