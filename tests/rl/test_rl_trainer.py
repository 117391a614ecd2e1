"""GRPO end to end on a reward that can be computed: what it raises, what stops it, and what must not move."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError, TrainingError
from reelforge.engine.flow import sde
from reelforge.engine.flow.sde import NoiseRate
from reelforge.engine.io import checkpoint
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.advantage import Advantages, Fusion, FusionConfig
from reelforge.engine.rl.loss import KlConfig, LossConfig
from reelforge.engine.rl.plan import Group, PlanConfig, Planner, evaluations
from reelforge.engine.rl.policy import PathConfig
from reelforge.engine.rl.prompts import PromptSet
from reelforge.engine.rl.trainer import GrpoTask, outranks
from reelforge.engine.train.state import OptimizerConfig, TrainState

NAN = math.nan
CPU = torch.device("cpu")
PLAN = PlanConfig(group_size=4, steps=(0, 4))


class Judge:
    """Scores by a function of (clips, prompts)."""

    def __init__(self, score: Callable[[Tensor, Sequence[str]], Tensor], axis: str = "vq") -> None:
        self.axes, self.function = (axis,), score

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {self.axes[0]: Scores.of(self.function(videos, prompts))}


def brightness(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    return videos.flatten(1).mean(1)


def make_task(
    parts,
    model,
    *judges: Judge,
    plan: PlanConfig = PLAN,
    groups: int = 4,
    updates: int = 1,
    lr: float = 3e-3,
    rollout_groups: int = 3,
    rate: NoiseRate | None = None,
    fusion: FusionConfig | None = None,
    loss: LossConfig | None = None,
    path: PathConfig | None = None,
    missing_limit: float = 0.1,
    overlap: bool = False,
    rewards: Sequence[tuple[str, ...]] = (),
    **policy: object,
) -> tuple[GrpoTask, TrainState]:
    """A run's parts, as the stage builds them; "frames" are the latents themselves."""
    scoring = Scoring(
        judges or [Judge(brightness)],
        lambda latents: latents,
        ScoringConfig(missing_limit=missing_limit, overlap=overlap),
    )
    prompts = PromptSet(tuple(f"prompt {n}" for n in range(parts.prompts)), tuple(rewards) or ((),) * parts.prompts)
    task = GrpoTask(
        parts.policy(model, path, **policy), parts.sampler(plan, rate),
        Planner(plan, 5, parts.prompts, groups, parts.num_steps), scoring,
        Fusion(fusion or FusionConfig(), scoring.axes), prompts, loss or LossConfig(), updates, rollout_groups,
    )  # fmt: skip
    optimizer = OptimizerConfig(lr=lr, warmup_steps=0, weight_decay=0.1, ema_decay=0.5)
    carried = {"fusion_running": task.fusion.running, **task.pace.carried}
    return task, TrainState(dict(model.named_parameters()), optimizer, 100, carried, task.pace)


def steps(task: GrpoTask, state: TrainState, count: int) -> list[dict]:
    """The facts of each of the next steps."""
    facts = []
    for _ in range(count):
        state.optimizer_step(task.losses(state.step))
        facts.append(task.describe(range(state.step - 1, state.step)))
    return facts


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": tensor.detach().clone()
        for group, tensors in state.groups().items()
        for name, tensor in tensors.items()
    }


def changed(before: dict[str, Tensor], state: TrainState) -> set[str]:
    after = snapshot(state)
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


# -- it works ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_reward_rises(parts, tiny, sign: float) -> None:
    """Clips of fixed noises brighten, or darken, by more than one deviation in 25 iterations."""
    model = tiny()
    task, state = make_task(parts, model, Judge(lambda videos, prompts: sign * brightness(videos, prompts)))

    def held_out() -> Tensor:
        task.policy.prepare(range(8))
        groups = [group for number in (900, 901) for group in task.planner.iteration(number)]
        return brightness(task.sampler.run(task.policy, groups, range(8), 900, CPU).latents, ())

    before = held_out()
    facts = steps(task, state, 25)
    gain = sign * (held_out() - before)
    assert gain.mean() > before.std() and gain.min() > 0
    assert all(fact["ratio"] == 1.0 and fact["kl"] == 0.0 for fact in facts)
    first, last = (sum(fact["reward"]["vq"]["mean"] for fact in part) / 5 for part in (facts[:5], facts[-5:]))
    assert last - first > 1


def test_shuffled_advantages_teach_nothing(parts, tiny) -> None:
    """Same steps, same sizes, no direction: what is left of the gain is a fraction."""
    gains = {}
    for shuffled in (False, True):
        model = tiny()
        task, state = make_task(parts, model, fusion=FusionConfig(shuffled=shuffled))
        facts = steps(task, state, 25)
        gains[shuffled] = facts[-1]["reward"]["vq"]["mean"] - facts[0]["reward"]["vq"]["mean"]
    assert gains[False] > 3 * abs(gains[True])


def test_rewards_reach_their_samples(parts, tiny) -> None:
    """Each place of the table holds the score of its prompt's, its member's clip, in any batches, overlapped or not."""
    tables = []
    for rollout_groups, overlap in ((1, False), (3, True), (8, False)):
        judge = Judge(lambda videos, prompts: brightness(videos, ()) + 10 * torch.tensor([int(p[-1]) for p in prompts]))
        task, state = make_task(parts, tiny(), judge, groups=6, rollout_groups=rollout_groups, overlap=overlap)
        table = spy(task)
        next(task.losses(0))
        tables.append(table.seen[0][0])
    groups = task.planner.iteration(0)
    task.policy.prepare([group.prompt for group in groups])
    alone = [task.sampler.run(task.policy, [group], [0], 0, CPU).latents for group in groups]
    expected = torch.stack([brightness(x0, ()) + 10 * g.prompt for x0, g in zip(alone, groups, strict=True)])
    for table in tables:
        torch.testing.assert_close(table[0], expected.double(), rtol=0, atol=1e-5)
    assert len(set(tables[0][0].flatten().tolist())) == 6 * 4


class Spy:
    """A fusion that remembers what it was handed and what it made of it."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion, self.config = fusion, fusion.config
        self.seen: list[tuple[Tensor, Tensor | None, Advantages]] = []

    def __call__(self, rewards: Tensor, wanted: Tensor | None = None) -> Advantages:
        self.seen.append((rewards.clone(), wanted, self.fusion(rewards, wanted)))
        return self.seen[-1][2]


def spy(task: GrpoTask) -> Spy:
    """Put one in."""
    task.fusion = Spy(task.fusion)
    return task.fusion


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_facts_of_an_iteration(parts, tiny, scale: float) -> None:
    task, state = make_task(parts, tiny(), path=PathConfig(scale), loss=LossConfig(kl=KlConfig(weight=0.1)),
                            reference=tiny().requires_grad_(False))  # fmt: skip
    (facts,) = steps(task, state, 1)
    groups = task.planner.iteration(0)
    assert facts["nfe"] == sum(evaluations(group, PLAN, 5) for group in groups) * (2 if scale == 3.0 else 1)
    lambda_ = sde.sde_lambda(task.sampler.grid, range(5), task.sampler.rate)
    chosen = [group.trained[0] for group in groups]
    total = sum(4 / lambda_[k].item() for k in chosen)
    assert facts["lambda_weight"] == {str(k): pytest.approx(1 / lambda_[k].item() / total) for k in range(5)}, (
        "of every step; those that are not trained this time too"
    )
    assert facts["counted_share"] == 1 and facts["missing_share"] == 0 and facts["gradient_cosine"] is None
    assert facts["kl_reference"] < 1e-10 and facts["clipped_low"] == facts["clipped_high"] == 0
    assert all(facts[name] >= 0 for name in ("rollout_s", "decode_s", "score_s", "wait_s", "train_s"))
    (second,) = steps(task, state, 1)
    assert -1 <= second["gradient_cosine"] <= 1 and second["kl_reference"] > 1e-9


def test_several_trained_steps_share_one_unit_of_weight(parts, tiny) -> None:
    """Half of the stochastic steps, another half for every prompt: weights and KL shares sum to 1 over the trained."""
    plan = PlanConfig(group_size=4, steps=(0, 4), stochastic="all", trained_share=0.5)
    task, _ = make_task(parts, tiny(), plan=plan, groups=7)
    found = task._roll_out(0)
    members = [(decision.step, member) for decision in found.decisions for member in decision.members.tolist()]
    assert len(members) == 7 * 4 * 2
    assert sum(found.targets.weights[k].item() for k, _ in members) == pytest.approx(1)
    assert sum(found.targets.kl_share[member].item() for _, member in members) == pytest.approx(1)


def test_several_updates_a_rollout(parts, tiny) -> None:
    """Against the stored velocities: ratios are 1 at the first, and from the second on they are not."""
    task, state = make_task(parts, tiny(), updates=3)
    tables = spy(task)
    facts = steps(task, state, 6)
    assert len(tables.seen) == 2 and ["nfe" in fact for fact in facts] == [True, False, False] * 2
    for place, fact in enumerate(facts):
        assert (fact["ratio"] == 1.0 and fact["kl"] == 0.0) == (place % 3 == 0)
    assert facts[2]["kl"] > facts[1]["kl"] > 0
    assert task._current is None, "states and velocities are not kept until the next rollout"
    again, fresh = make_task(parts, tiny(), updates=3)
    fresh.step = 1
    with pytest.raises(AssertionError, match="start of an iteration"):
        next(again.losses(fresh.step))


def test_a_continued_run_is_the_uninterrupted_one(parts, tiny, tmp_path) -> None:
    """Bit for bit: weights, moments, average, running reward scale."""
    task, state = make_task(parts, tiny(), updates=2)
    steps(task, state, 4)
    checkpoint.save(tmp_path, state.step, state.groups(), {}, "cafe")
    steps(task, state, 4)
    again, continued = make_task(parts, tiny(7), updates=2)
    continued.restore(checkpoint.load(tmp_path / "step-00000004"))
    steps(again, continued, 4)
    assert changed(snapshot(state), continued) == set()
    assert again.fusion.running.item() == task.fusion.running.item() > 0


# -- what must not move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["alike", "missing"])
def test_nothing_to_learn_moves_nothing(parts, tiny, fate: str) -> None:
    """All rewards equal, or none there: weights, moments and average keep their bits; counters go on."""
    nothing = {"alike": 0.3, "missing": NAN}[fate]
    speaks = [True]
    judge = Judge(lambda v, p: brightness(v, p) if speaks[0] else torch.full((len(v),), nothing))
    loss = LossConfig(kl=KlConfig(weight=0.1))
    reference = tiny().requires_grad_(False)
    task, state = make_task(parts, tiny(), judge, missing_limit=1.0, loss=loss, reference=reference)
    steps(task, state, 2)
    before, (good, bad) = snapshot(state), state.meter.sums[[0, 3]].tolist()
    speaks[0] = False
    (facts,) = steps(task, state, 1)
    assert changed(before, state) == {"counters/meter"}
    assert (state.step, *state.meter.sums[[0, 3]].tolist()) == (3, good + 1, bad)
    assert facts["counted_share"] == 0 and facts["lambda_weight"] == {} and facts["ratio"] == 0.0
    assert (facts["zero_std_share"], facts["missing_share"]) == ((1, 0) if fate == "alike" else (0, 1))
    speaks[0] = True
    steps(task, state, 1)
    assert any(name.startswith("weights/") for name in changed(before, state))


class Part:
    """Some groups of a planner's first iteration."""

    seed = 5

    def __init__(self, planner: Planner, slots: Sequence[int]) -> None:
        self.groups = [planner.iteration(0)[slot] for slot in slots]

    def iteration(self, number: int) -> list[Group]:
        return self.groups

    def share(self, number: int, rank: int, world_size: int) -> list[int]:
        return list(range(len(self.groups)))


def test_silent_groups_are_as_if_they_were_not_there(parts, tiny) -> None:
    """The gradient of an iteration with a flat and a missing group is that of the other two alone."""
    model = tiny()
    planner = make_task(parts, model)[0].planner
    fates = {f"prompt {planner.iteration(0)[slot].prompt}": fate for slot, fate in ((0, 0.0), (3, NAN))}

    def score(videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return brightness(videos, prompts) * torch.tensor([fates.get(prompt, 1.0) for prompt in prompts])

    gradients = []
    for slots in (range(4), (1, 2)):
        task, _ = make_task(parts, model, Judge(score), missing_limit=0.5, rollout_groups=1)
        task.planner = Part(planner, slots)
        model.zero_grad()
        for loss in task.losses(0):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_too_many_missing_rewards_stop_the_run(parts, tiny) -> None:
    """With the scorer's last words; weights, moments and step as they were, and again when it is asked again."""
    broken = [False]

    def score(videos: Tensor, prompts: Sequence[str]) -> Tensor:
        if broken[0]:
            raise ValueError("out of paper")
        return brightness(videos, prompts)

    task, state = make_task(parts, tiny(), Judge(score))
    steps(task, state, 2)
    before, broken[0] = snapshot(state), True
    for _ in range(2):
        with pytest.raises(TrainingError, match="100% of .* out of paper"):
            steps(task, state, 1)
        assert changed(before, state) == set() and state.step == 2
    broken[0] = False
    steps(task, state, 1)
    assert state.step == 3


def test_a_few_missing_rewards_do_not(parts, tiny) -> None:
    """A NaN counts for nobody; the metrics say how many there were."""
    judge = Judge(lambda v, p: torch.where(torch.arange(len(v)) == 1, NAN, brightness(v, p)))
    task, state = make_task(parts, tiny(), judge, missing_limit=0.5, rollout_groups=1)
    (facts,) = steps(task, state, 1)
    assert facts["missing_share"] == 0.25 and facts["counted_share"] == 0.75
    assert facts["ratio"] == 1.0 and state.meter.sums[3] == 0


def test_a_planted_fault_stops_before_the_step(parts, tiny) -> None:
    """Weights that move between rollout and training: nothing is learnt from ratios that are wrong."""
    model = tiny()
    task, state = make_task(parts, model)
    steps(task, state, 1)

    def after_the_rollout():
        losses = task.losses(state.step)
        first = next(losses)
        model.proj_out.bias.data += 1e-3
        yield first
        yield from losses

    moments = {name: tensor for name, tensor in snapshot(state).items() if name.startswith(("adam/", "ema/"))}
    with pytest.raises(TrainingError, match="before any update"):
        state.optimizer_step(after_the_rollout())
    assert not changed(moments, state) & moments.keys() and state.step == 1


# -- settings ---------------------------------------------------------------------------------------------------------


def test_prompts_learn_from_the_reward_they_are_for(parts, tiny) -> None:
    """Odd prompts are for brightness, even ones for the first element."""
    judges = Judge(brightness), Judge(lambda videos, prompts: 100 * videos.flatten(1)[:, 0], "ta")
    rewards = [("vq",) if n % 2 else ("ta",) for n in range(8)]
    task, _ = make_task(parts, tiny(), *judges, rewards=rewards, groups=8)
    tables = spy(task)
    next(task.losses(0))
    rewards, wanted, advantages = tables.seen[0]
    prompts = [group.prompt for group in task.planner.iteration(0)]
    assert wanted.tolist() == [[p % 2 == 1 for p in prompts], [p % 2 == 0 for p in prompts]]
    for slot, prompt in enumerate(prompts):
        own = rewards[0 if prompt % 2 else 1, slot]
        assert torch.equal(advantages.values[0, slot].argsort(), own.argsort())


@pytest.mark.parametrize(
    ("rate", "steps_range", "step"),
    [(NoiseRate("dance", 0.0), (1, 3), 1), (NoiseRate("cps", 0.7), (0, 5), 4), (NoiseRate("cps", 0.0), (0, 2), 0)],
)
def test_a_step_without_noise_is_refused(parts, tiny, rate: NoiseRate, steps_range: tuple[int, int], step: int) -> None:
    with pytest.raises(ConfigError, match=f"adds no noise at step {step} of plan.steps"):
        make_task(parts, tiny(), rate=rate, plan=PlanConfig(group_size=4, steps=steps_range))


def test_a_gate_needs_rewards_to_compare(parts, tiny) -> None:
    gated = LossConfig(kl=KlConfig(weight=1.0, gate="outranks"))
    with pytest.raises(ConfigError, match="there is 1 after fusion"):
        make_task(parts, tiny(), loss=gated)
    two = (Judge(brightness), Judge(brightness, "ta"))
    with pytest.raises(ConfigError, match="there is 1 after fusion"):
        make_task(parts, tiny(), *two, loss=gated, fusion=FusionConfig(rule="sum", scale="batch"))


def test_the_gate_pulls_whom_the_first_reward_overrates(parts, tiny) -> None:
    gated = LossConfig(kl=KlConfig(weight=1.0, gate="outranks"))
    judges = Judge(brightness), Judge(lambda videos, prompts: -brightness(videos, prompts), "ta")
    task, _ = make_task(parts, tiny(), *judges, loss=gated, reference=tiny().requires_grad_(False),
                        fusion=FusionConfig(scale="group", normalise_batch=False))  # fmt: skip
    advantages = Fusion(FusionConfig(scale="group"), ["vq", "ta"])
    rewards = torch.tensor([[[1.0, 2, 3, 4], [4, 3, NAN, 1]], [[4.0, 3, 2, 1], [1, 2, 3, 4]]])
    found = task._targets(task.planner.iteration(0)[:2], advantages(rewards))
    assert (found.kl_share * 7).view(2, 4).tolist() == [
        [0, 0, pytest.approx(1), pytest.approx(1)],
        [pytest.approx(1), 0, 0, 0],
    ]


def test_outranks_by_hand() -> None:
    first = [0.1, 0.9, 0.5, 0.5]  # ranks 0, 3, 1.5, 1.5
    second = [5.0, 6.0, 1.0, 7.0]  # 1, 2, 0, 3
    third = [2.0, 2.0, 2.0, 9.0]  # 1, 1, 1, 3
    found = outranks(torch.tensor([[first], [second], [third]]).double())
    assert found.tolist() == [[False, True, True, False]]
    tied = outranks(torch.tensor([[[1.0, 2, 3, 4]], [[7.0] * 4]]))
    assert tied.tolist() == [[False, False, True, True]]  # 0 to 3 against 1.5 for each
    missing = outranks(torch.tensor([[first], [[NAN] * 4], [[2.0, 2.0, NAN, 9.0]]]).double())
    assert missing.tolist() == [[False, True, False, False]]  # 1, 1, none, 2 of what is there
    assert not outranks(torch.tensor([[[NAN] * 4], [second]]).double()).any()
