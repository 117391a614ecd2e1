"""A rewriter's first lessons against cross-entropies made by hand, one unpadded pair at a time in fp64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from two_processes import in_two_processes

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from safetensors.torch import load_file, save_file
from tiny_enhance import PAIRS, dialogue_of, make_language_model, tiny_pairs

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.rl.cold_start import ColdStartTask
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig, TrainState

BATCH = 5  # of six pairs; odd, so that ranks have parts of two and three


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("language") / "model")


def make_task(language: LanguageModel, rows: int = BATCH, batch: int = BATCH, **words: object) -> ColdStartTask:
    train = LoopConfig(batch_size=batch, micro_batch_size=rows, precision="fp32", seed=4)
    return ColdStartTask(language, dialogue_of(language, **words), tiny_pairs(), train)


def weights(language: LanguageModel) -> dict[str, Tensor]:
    return dict(language.model.named_parameters())


def gradients(language: LanguageModel, losses: list[Tensor]) -> tuple[float, Tensor]:
    """Sum of losses, and the gradient as one vector."""
    total = torch.stack(losses).sum()
    parts = torch.autograd.grad(total, list(weights(language).values()))
    return total.item(), torch.cat([part.flatten() for part in parts])


def close(ours: Tensor, theirs: Tensor, relative: float) -> bool:
    return (ours - theirs).norm() <= relative * theirs.norm()


def by_hand(language: LanguageModel, step: int) -> Tensor:
    """Mean over the batch's answer tokens; the dialogue spelt out, every pair alone."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    chosen = [int(rng.generator("pairs", 4, place // 6).permutation(6)[place % 6])
              for place in range(step * BATCH, (step + 1) * BATCH)]  # fmt: skip
    for request, thought, caption in (PAIRS[place] for place in chosen):
        asked = f"<|user|>{request}<|end|><|assistant|><think>"
        answer = f"{thought}</think> <answer>{caption}</answer><|end|>"
        before, after = (language.tokenizer(text, add_special_tokens=False).input_ids for text in (asked, answer))
        logits = language.model(torch.tensor([before + after])).logits[0]
        total = total + F.cross_entropy(logits[len(before) - 1 : -1], torch.tensor(after), reduction="sum")
        count += len(after)
    return total / count


@pytest.mark.parametrize("step", [0, 1, 7])
def test_the_loss_is_cross_entropy_on_answers_alone(folder, step):
    """The task in fp32 and padded; of tokens, not of pairs; epochs reshuffled."""
    exact = LanguageModel.load(folder, torch.float64)
    value, gradient = gradients(exact, [by_hand(exact, step)])
    language = LanguageModel.load(folder)
    found, ours = gradients(language, list(make_task(language).losses(step)))
    assert found == pytest.approx(value, rel=1e-6)
    assert close(ours.double(), gradient, 1e-5)


def test_padding_contributes_nothing(folder):
    """Whatever the id it is made of, to the last bit of the gradient."""
    found = []
    for pad in (None, 7):
        language = LanguageModel.load(folder)
        language.pad = language.pad if pad is None else pad
        found.append(gradients(language, list(make_task(language).losses(0))))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_add_up(folder, rows):
    language = LanguageModel.load(folder, torch.float64)
    whole, split = list(make_task(language).losses(1)), list(make_task(language, rows).losses(1))
    assert len(whole) == 1 and len(split) == -(-BATCH // rows)
    assert close(gradients(language, split)[1], gradients(language, whole)[1], 1e-6)


def test_two_ranks_add_up_to_one_process(folder, tmp_path):
    """Of two and three pairs; each rank's part is its own."""

    def work(rank: int) -> None:
        language = LanguageModel.load(folder)
        total, gradient = gradients(language, list(make_task(language, 2).losses(1)))
        save_file({"gradient": gradient, "total": torch.tensor(total)}, tmp_path / f"{rank}.safetensors")

    assert in_two_processes(work, tmp_path) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    language = LanguageModel.load(folder)
    total, gradient = gradients(language, list(make_task(language, 2).losses(1)))
    assert (first["total"] + second["total"]).item() == pytest.approx(total, rel=1e-6)
    assert close(first["gradient"] + second["gradient"], gradient, 1e-6)
    assert not close(first["gradient"], second["gradient"], 0.1)


def test_the_lessons_are_learnt(folder):
    """Six pairs by heart; other weights, and no other loss than that of the start."""
    language = LanguageModel.load(folder)
    task = make_task(language, 6, 6)
    state = TrainState(weights(language), OptimizerConfig(lr=1e-2, warmup_steps=3, ema_decay=0.0), 40)
    start = sum(loss.item() for loss in task.losses(0))
    for step in range(40):
        state.optimizer_step(task.losses(step))
    end = sum(loss.item() for loss in task.losses(40))
    assert start == pytest.approx(torch.tensor(float(len(language.tokenizer))).log().item(), rel=0.1)
    assert end < 0.3 * start


def test_an_answer_that_would_be_cut_is_refused(folder):
    """At the longest answer's length it is learnt, one token below nothing is."""
    language = LanguageModel.load(folder)
    longest = max(len(answer) for answer in make_task(language).answers)
    make_task(language, max_new_tokens=longest)
    with pytest.raises(DataError, match=f"takes {longest} tokens") as refused:
        make_task(language, max_new_tokens=longest - 1)
    assert f"max_new_tokens is {longest - 1}: raise it" in refused.value.hint


def test_a_request_that_leaves_no_room_is_refused(folder):
    language = LanguageModel.load(folder)
    longest = max(len(request) for request in make_task(language).requests)
    make_task(language, max_new_tokens=160 - longest)
    with pytest.raises(DataError, match="and its answer take 161 tokens, and the language model has room for 160"):
        make_task(language, max_new_tokens=161 - longest)


def test_more_ranks_than_pairs_in_a_batch(folder, monkeypatch):
    language = LanguageModel.load(folder)
    monkeypatch.setattr("reelforge.engine.core.distributed.world_size", lambda: BATCH + 1)
    with pytest.raises(ConfigError, match="A global batch of 5 leaves some of 6 processes idle"):
        list(make_task(language).losses(0))
