"""The rewriter's GRPO: a whole iteration's gradient against one by hand, and who takes part in it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tiny_enhance import REQUESTS, make_taught_model
from tiny_rewriting import (
    BATCH,
    CUT,
    GROUP,
    Screen,
    Snapshot,
    advantages_by_hand,
    apart,
    chosen_requests,
    gradient_by_hand,
    gradient_of,
    make_task,
    plant,
    rewards_by_hand,
    shake,
    well_formed,
    written,
)

from reelforge.engine.core.errors import ConfigError, DataError, TrainingError
from reelforge.engine.rl.advantage import FusionConfig
from reelforge.engine.rl.rewriting import RewritingConfig, RewritingTask
from reelforge.engine.train.state import OptimizerConfig, TrainState

GOOD = [well_formed(f"a {colour} circle moving to the left on {ground}")
        for colour, ground in (("red", "black"), ("green", "grey"), ("red", "a navy background"))]  # fmt: skip
BROKEN = ("so</think> a red circle", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model")


def state_of(task: RewritingTask, steps: int = 4, **optimizer: float) -> TrainState:
    config = OptimizerConfig(**({"lr": 3e-3, "warmup_steps": 0} | optimizer))
    return TrainState(dict(task.language.model.named_parameters()), config, steps)


def by_hand(task: RewritingTask, groups: list, now: Snapshot, drawn: Snapshot | None = None) -> tuple:
    """Loss and gradient of the rollout that just was, from rewards on."""
    requests = chosen_requests(task)
    advantages = advantages_by_hand(rewards_by_hand(task, requests, groups))
    return gradient_by_hand(task, requests, groups, advantages, now, drawn)


def scripted(task: RewritingTask, *groups: list) -> None:
    plant(task, dict(zip(chosen_requests(task), groups, strict=False)))


# --- an iteration ---


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_the_gradient_of_an_iteration(folder, temperature, rows):
    """Drawn answers, the screen's rewards, the default fusion; whatever the micro-batches."""
    task = make_task(folder, rows=rows, temperature=temperature)
    groups, now = written(task), Snapshot.of(task)
    loss, gradient = gradient_of(task)
    value, expected = by_hand(task, groups, now)
    assert loss == pytest.approx(value, rel=1e-5) and apart(gradient, expected) < 1e-5
    facts = task.describe(range(1))
    assert facts["ratio"] == 1 and facts["kl_reference"] > 1e-3 and facts["sampling_gap"] < 1e-5
    assert facts["counted_share"] == 1 and len({answer.ids for group in groups for answer in group}) > GROUP


def test_a_second_update_is_against_the_words_as_they_were_drawn(folder):
    """One rollout, stored log-probabilities; the clip bites."""
    task = make_task(folder, updates=2, moved=0.002)
    groups, drawn, state = written(task), Snapshot.of(task), state_of(task, lr=1e-3)
    state.optimizer_step(task.losses(0))
    now = Snapshot.of(task)
    loss, gradient = gradient_of(task, 1)
    value, expected = by_hand(task, groups, now, drawn)
    assert loss == pytest.approx(value, rel=1e-4) and apart(gradient, expected) < 1e-4
    assert apart(by_hand(task, groups, now)[1], expected) > 0.1, "old log-probabilities matter"
    first, second = task._facts[-2:]
    assert abs(second["ratio"] - 1) > 1e-3 and second["clipped_low"] + second["clipped_high"] > 0.01
    assert len(groups) == BATCH and "sampling_gap" not in second and first["clipped_low"] == 0
    state.optimizer_step(task.losses(2))
    assert len(groups) == 2 * BATCH, "the third step begins another rollout"


def test_without_a_pull_there_is_no_reference(folder):
    """The loss is that of a pull which is next to none."""
    none, little = make_task(folder, kl=0.0), make_task(folder, kl=1e-9)
    assert none.reference is None and little.reference is not None
    assert apart(gradient_of(none)[1], gradient_of(little)[1]) < 1e-6


def test_answers_depend_on_their_names_alone(folder):
    """Not on what is drawn beside them; other iterations write others."""
    found = []
    for rows in (64, 1, 4):
        task = make_task(folder, sample_rows=rows)
        groups = written(task)
        gradient_of(task)
        found.append([[answer.ids for answer in group] for group in groups])
        gradient_of(task, 1)
        assert [answer.ids for answer in groups[BATCH]] != found[-1][0]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("common", "draws"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_noises_are_shared_or_not_and_never_come_again(folder, common, draws):
    """Within a group as asked for; a request that is drawn again in a later iteration gets other noise."""
    task, used = make_task(folder, common_noise=common, draws=draws, requests=REQUESTS[:2]), set()
    for iteration in range(3):
        gradient_of(task, iteration)
        for request in REQUESTS[:2]:
            takes = [take for take in task.filming.calls[-1] if take.request == request]
            assert len(takes) == (GROUP + 1) * draws
            members = [{take.noise for take in takes[n * draws : (n + 1) * draws]} for n in range(GROUP + 1)]
            assert all(len(noises) == draws for noises in members)
            here = set().union(*members)
            assert len(here) == draws * (1 if common else GROUP + 1)
            assert not {(request, noise) for noise in here} & used
            used |= {(request, noise) for noise in here}


def test_rewards_of_several_draws_are_averaged(folder):
    task = make_task(folder, draws=3)
    gradient_of(task)
    requests = chosen_requests(task)
    mean = task.describe(range(1))["original"]
    for place, axis in enumerate(("vq", "ta")):
        shown = [values[place] for take, values in task.filming.known.items() if take.prompt == take.request]
        assert len(shown) == 3 * len(requests) and mean[axis] == pytest.approx(np.mean(shown))


# --- who takes part ---


def test_equal_rewards_move_nothing(folder):
    """Every answer says the request: one video, one score, no advantage, and no step of Adam's momentum."""
    task = make_task(folder)
    state = state_of(task)
    state.optimizer_step(task.losses(0))
    before = {name: weight.clone() for name, weight in state.parameters.items()}
    plant(task, {request: [well_formed(request)] * GROUP for request in chosen_requests(task, 1)})
    loss, gradient = gradient_of(task, 1)
    assert loss == 0 and not gradient.any()
    state.optimizer_step(task.losses(1))
    assert all(torch.equal(state.parameters[name], weight) for name, weight in before.items())
    facts = task.describe(range(2, 3))
    assert facts["copied"] > 0 and len(set(task.filming.calls[-1])) == BATCH


def test_a_missing_reward_takes_its_member_out(folder):
    """The others' gradient is what it would be without it, whatever it says."""
    found = []
    for prompt in ("a lost circle", "something quite different that is lost, too"):
        task = make_task(folder, Screen(unscored=["a lost circle", "something quite different that is lost, too"]))
        scripted(task, [GOOD[0], well_formed(prompt), GOOD[1]], GOOD)
        groups, now = written(task), Snapshot.of(task)
        found.append(gradient_of(task)[1])
        assert apart(found[-1], by_hand(task, groups, now)[1]) < 1e-5
        table = rewards_by_hand(task, chosen_requests(task), groups)
        assert np.isnan(table[0]).tolist() == [[False, True, False, False], [False] * 4]
        assert [row.counted for row in task._rows] == [True, False, True] + [True] * 3
        assert task.describe(range(1))["missing_share"] == pytest.approx(1 / 24)
    assert apart(*found) < 1e-6


def test_a_malformed_answer_is_filmed_as_the_request(folder):
    """Its words count against it, its pictures are the request's, and its tokens learn from that."""
    task = make_task(folder)
    scripted(task, [BROKEN, GOOD[0], GOOD[1]], GOOD)
    groups, now, request = written(task), Snapshot.of(task), chosen_requests(task)[0]
    _, gradient = gradient_of(task)
    assert [take.prompt for take in task.filming.calls[0]][:4] == [
        request, "a red circle moving to the left on black", "a green circle moving to the left on grey", request
    ]  # fmt: skip
    table = rewards_by_hand(task, chosen_requests(task), groups)
    assert (table[:2, 0, 0] == table[:2, 0, 3]).all()
    parts = task.structure.parts(request, request)
    assert table[2, 0, 3] - table[2, 0, 0] == pytest.approx(2 / len(parts)), "tags: 1 of the request, -1 of the answer"
    assert apart(gradient, by_hand(task, groups, now)[1]) < 1e-5
    advantages = advantages_by_hand(table)[0]
    assert task._rows[0].advantage == pytest.approx(advantages[0]) and advantages[0] < advantages[3]
    facts = task.describe(range(1))
    assert (facts["malformed"], facts["cut"]) == (pytest.approx(1 / 6), 0)


def test_a_cut_answer_takes_no_part(folder):
    """Neither in the gradient nor in the group's mean; nor is it called malformed."""
    task = make_task(folder)
    scripted(task, [CUT, GOOD[0], GOOD[1]], GOOD)
    groups, now = written(task), Snapshot.of(task)
    _, gradient = gradient_of(task)
    assert [row.counted for row in task._rows] == [False] + [True] * 5
    assert apart(gradient, by_hand(task, groups, now)[1]) < 1e-5
    facts = task.describe(range(1))
    assert (facts["malformed"], facts["cut"]) == (0, pytest.approx(1 / 6))


def test_all_cut_ends_the_run(folder):
    task = make_task(folder)
    scripted(task, *[[CUT] * GROUP] * BATCH)
    with pytest.raises(TrainingError, match="Every answer of iteration 0 was cut at 40 tokens") as ended:
        list(task.losses(0))
    assert "dialogue.max_new_tokens" in ended.value.hint


def test_the_request_is_a_member_without_tokens(folder):
    """It anchors the mean: a group of one word's rewrites learns from what the request itself got."""
    task = make_task(folder)
    scripted(task, [GOOD[0]] * GROUP, GOOD)
    groups, now = written(task), Snapshot.of(task)
    _, gradient = gradient_of(task)
    requests = chosen_requests(task)
    assert len(task._rows) == BATCH * GROUP and all(row.counted for row in task._rows)
    assert apart(gradient, by_hand(task, groups, now)[1]) < 1e-5
    without = rewards_by_hand(task, requests, groups)
    without[:, :, GROUP] = np.nan
    other = gradient_by_hand(task, requests, groups, advantages_by_hand(without), now)[1]
    assert apart(gradient, other) > 0.1


def test_shuffled_advantages_are_anothers(folder):
    """The control of the ablation: the same values, handed to other answers."""
    found = []
    for shuffled in (False, True):
        task = make_task(folder, fusion=FusionConfig(shuffled=shuffled))
        gradient_of(task)
        found.append([row.advantage for row in task._rows])
    assert found[0] != found[1]
    assert len({round(a, 9) for a in found[0]} & {round(a, 9) for a in found[1]}) >= len(found[0]) - BATCH


# --- what stops a run ---


@pytest.mark.parametrize("fault", ["temperature", "weights", "template"])
def test_a_policy_that_is_not_the_one_that_wrote_is_caught(folder, fault):
    """Before the step is taken."""
    task = make_task(folder)
    real, state = task.write, state_of(task)

    def write(asked: list) -> list:
        found = real(asked)
        if fault == "temperature":
            task.config = dataclasses.replace(task.config, temperature=1.1)
        elif fault == "weights":
            shake(task, 1e-3, seed=1)
            before.update({name: weight.clone() for name, weight in state.parameters.items()})
        else:
            task.dialogue.config = dataclasses.replace(task.dialogue.config, system="Be brief.")
        return found

    task.write, before = write, {name: weight.clone() for name, weight in state.parameters.items()}
    with pytest.raises(TrainingError, match="Answers were drawn with log-probabilities .* off the training forward's"):
        state.optimizer_step(task.losses(0))
    assert all(torch.equal(state.parameters[name], weight) for name, weight in before.items())


def test_log_probabilities_that_are_no_numbers_are_caught(folder):
    task = make_task(folder)
    task.language.model.model.norm.weight.data[0] = float("nan")
    scripted(task, GOOD, GOOD)
    with pytest.raises(TrainingError, match="log-probabilities nan off"):
        list(task.losses(0))


def test_too_many_missing_rewards_end_the_run(folder):
    task = make_task(folder, Screen(unscored=["a red circle moving to the left on black"]), missing_limit=0.2)
    scripted(task, GOOD, GOOD)
    with pytest.raises(TrainingError, match=r"25% of the iteration's samples lack a score \(vq of 25%\)"):
        list(task.losses(0))


def test_facts_are_json_when_nothing_has_a_score(folder):
    """JSON has no NaN; nothing is learnt."""
    task = make_task(folder, Screen(unscored=REQUESTS))
    scripted(task, *[[BROKEN] * GROUP] * BATCH)
    loss, gradient = gradient_of(task)
    assert loss == 0 and not gradient.any()
    facts = json.loads(json.dumps(task.describe(range(1)), allow_nan=False))
    assert facts["original"]["vq"] is None and facts["original"]["ta"] is not None and facts["counted_share"] == 0


# --- what is refused before a run ---


def test_settings_that_cannot_train(folder):
    with pytest.raises(ConfigError, match="group_size is 1"):
        RewritingConfig(group_size=1)
    for name in ("temperature", "draws", "sample_rows"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            RewritingConfig(**{name: 0})
    with pytest.raises(ConfigError, match='fusion.rule is "separate"'):
        make_task(folder, fusion=FusionConfig(rule="separate"))
    with pytest.raises(ConfigError, match='"running" keeps a scale per reward'):
        make_task(folder, fusion=FusionConfig(rule="sum"))
    with pytest.raises(DataError, match="'ball ball ball.* and its answer take .* room for 160"):
        make_task(folder, requests=["a dot", "ball " * 200])
