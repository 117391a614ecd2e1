"""Arms of an RLHF iteration: what each computes, counts and keeps, and the records that its times become."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelforge.bench import (
    h200,
    quick,
    rl_arms,
    rl_iteration,
    rl_records,
    rl_run,
    rl_training,
    rl_world,
    supervise,
    worker,
)
from reelforge.bench.cases import case as sizes
from reelforge.bench.records import OURS, Record, parse, validate
from reelforge.bench.rl_arms import CHAIN, COLLAPSED, FLASH, FULL, INDEPENDENT, SHARED, Arm, Setting
from reelforge.bench.rl_cost import Calls
from reelforge.bench.rl_iteration import Bench, Round, Split, compare, expected, pipeline
from reelforge.bench.rl_world import Level, World
from reelforge.bench.session import Session
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.supervise import Folder, Outcome
from reelforge.bench.worker import Job
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.model.codec import CodecConfig, ReelforgeCodec
from reelforge.engine.model.folder import GenerationDefaults, ModelFolder
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rl.loss import LossConfig
from reelforge.engine.rl.rollout import Decision
from reelforge.stages.cli import main

CPU = torch.device("cpu")
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
SETTING = Setting(4, 5, (0, 4), 2)


def made(*, adapted: bool = False) -> World:
    return rl_world.from_config("tiny", CONFIG, (16, 3, 4, 4), 6, CPU, adapted=adapted)


@pytest.fixture
def world() -> World:
    return made()


@pytest.fixture
def clocks() -> Iterator[ClockSampler]:
    with ClockSampler("not watched") as found:
        yield found


# -- what an arm computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("arm", CHAIN, ids=lambda arm: arm.name)
def test_every_arm_has_the_gradient_of_the_reference_loop(arm: Arm, adapted: bool) -> None:
    world = made(adapted=adapted)
    assert rl_training.gradient_error(world, SETTING, arm, FLASH) < 1e-5


def test_a_lost_member_changes_the_gradient(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rl_arms.apart
    monkeypatch.setattr(rl_training, "apart", lambda decision: list(whole(decision))[1:])
    assert rl_training.gradient_error(world, SETTING, COLLAPSED, FLASH) > 0.1


def rolled(world: World, arm: Arm) -> tuple[rl_arms.Watched, Sequence[Decision], rl_arms.Policy]:
    roller, actor = rl_arms.sampler(world, arm, SETTING), rl_arms.policy(world, arm)
    groups = SETTING.planner(arm, len(world.prompts)).iteration(0)[:1]
    actor.prepare([groups[0].prompt])
    return roller, roller.run(actor, groups, [0], 0, CPU).decisions, actor


def test_members_apart_have_the_gradient_of_the_whole_off_policy_and_clipped_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    roller, (whole,), actor = rolled(world, COLLAPSED)
    with torch.no_grad():
        world.model.proj_out.weight.mul_(3.0)
    together = rl_training.gradient(world, actor, roller, [whole])
    one_by_one = rl_training.gradient(world, actor, roller, list(rl_arms.apart(whole)))
    assert (together - one_by_one).norm() < 1e-5 * one_by_one.norm()
    monkeypatch.setattr(rl_training, "LossConfig", lambda: LossConfig(clip="none"))
    free = rl_training.gradient(world, actor, roller, [whole])
    assert 0.01 < (together - free).norm() / free.norm() < 0.99, "some members were clipped"


def test_apart_is_what_the_shared_arm_trains_on(world: World) -> None:
    _, (whole,), _ = rolled(world, COLLAPSED)
    _, members, _ = rolled(world, SHARED)
    assert len(whole.x) == 1 and whole.offsets.tolist() == [0, 4]
    assert len(members) == 4 and all(part.offsets.tolist() == [0, 1] and len(part.x) == 1 for part in members)
    assert torch.equal(torch.cat([part.keys for part in members]), whole.keys)
    assert torch.cat([part.members for part in members]).tolist() == whole.members.tolist()
    assert all(torch.equal(part.velocity, whole.velocity) and part.path == whole.path for part in members)


class Counted:
    """Rows that pass through a network, and calls, with and without gradient."""

    def __init__(self, model: WanTransformer) -> None:
        self.rows: Counter[bool] = Counter()
        self.calls: Counter[bool] = Counter()
        self._hook = model.register_forward_pre_hook(self._see)

    def _see(self, _: object, arguments: tuple[Tensor, ...]) -> None:
        self.rows[torch.is_grad_enabled()] += len(arguments[0])
        self.calls[torch.is_grad_enabled()] += 1


@pytest.mark.parametrize("arm", CHAIN, ids=lambda arm: arm.name)
def test_an_iteration_takes_the_forwards_that_the_arithmetic_counts(world: World, arm: Arm) -> None:
    bench = Bench(world, SETTING, [arm])
    counted = Counted(world.model)
    rl_iteration.iterate(bench.tasks[arm.name], bench.state, 0, CPU)
    layout, steps = SETTING.layout(arm), [g.stochastic[0] for g in bench.tasks[arm.name].planner.iteration(0)]
    decisions = layout.distinct_noise * len(steps)
    assert sum(steps) == 3, "a mirrored pair"
    assert counted.rows[False] == 2 * (sum(map(layout.evaluations, steps)) - decisions)
    assert counted.rows[True] == 2 * (decisions + layout.trained * len(steps))
    calls = decisions + layout.trained * len(steps)
    assert counted.calls[True] == (2 * calls if arm.plain else calls), "guidance in two calls, or in one"


def test_arms_of_a_round_share_prompts_and_steps(world: World) -> None:
    bench = Bench(world, SETTING, CHAIN)
    plans = {arm.name: [(g.prompt, g.stochastic) for g in bench.tasks[arm.name].planner.iteration(3)] for arm in CHAIN}
    assert len({tuple(plan) for plan in plans.values()}) == 1


# -- times -------------------------------------------------------------------------------------------------------------


class Slow(Level):
    """A reward that takes its time."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        time.sleep(0.05)
        return super().score(videos, prompts)


def test_a_split_adds_up_and_scoring_counts_where_it_is_waited_for(world: World, clocks: ClockSampler) -> None:
    bench = Bench(replace(world, scorers=[Slow()]), SETTING, [SHARED, FULL])
    first, found = bench.rounds(2, time.monotonic() + 60, clocks)  # the first one also scores clips alone
    serial, beside = (found.splits[arm.name] for arm in (SHARED, FULL))
    for split in (serial, beside):
        assert split.score >= 2 * 0.05 and min(split.prefix, split.branches, split.train) > 0
    shown = serial.prefix + serial.branches + serial.decode + serial.score + serial.train + serial.rest
    assert serial.wait == 0 and serial.total == pytest.approx(shown)
    shown = beside.prefix + beside.branches + beside.wait + beside.train + beside.rest
    assert beside.wait >= 0.05 and beside.total == pytest.approx(shown), "the last group's scores hide behind nothing"
    assert first.steps != found.steps or sum(first.steps) == sum(found.steps)


def test_what_shares_nothing_has_no_prefix(world: World, clocks: ClockSampler) -> None:
    (found,) = Bench(world, SETTING, [INDEPENDENT]).rounds(1, 0.0, clocks)
    assert found.splits["independent"].prefix == 0 < found.splits["independent"].branches


def test_rounds_end_at_the_deadline_but_not_before_the_first(world: World, clocks: ClockSampler) -> None:
    bench = Bench(world, SETTING, [COLLAPSED])
    assert len(list(bench.rounds(3, time.monotonic(), clocks))) == 1
    assert len(list(bench.rounds(3, time.monotonic() + 60, clocks))) == 3


def test_scoring_beside_rollouts() -> None:
    assert pipeline([2.0, 2.0, 2.0], 1.0) == 7.0, "two of three hide behind a rollout"
    assert pipeline([1.0, 1.0, 1.0], 3.0) == 10.0, "scoring is the longer: only the first rollout shows"
    assert pipeline([1.0], 2.0) == 3.0


def split(total: float, decode: float = 1.0, score: float = 2.0, rest: float = 0.5) -> Split:
    return Split(0.0, 0.0, decode, score, 0.0, 0.0, rest, total)


def test_expectations_and_ratios_by_hand(world: World) -> None:
    bench = Bench(world, replace(SETTING, steps=(1, 2)), (FLASH, SHARED, COLLAPSED, FULL))
    calls = {True: Calls(2.0, 1.0, 5.0, 20.0), False: Calls(1.0, 1.0, 4.0, 10.0)}
    totals = {"flash": 300.0, "shared": 150.0, "collapsed": 100.0, OURS: 90.0}
    found = [Round((1, 1), {name: split(total) for name, total in totals.items()}, calls)] * 2
    # Of a group: 4 steps of 4 states in one call, and the decision's 4 states one by one.
    flash = expected(bench, FLASH, found[0])
    assert flash.branches == 2 * (4 * 6 + 4 * 5) and flash.train == 2 * 4 * 20
    assert flash.total == 88 + 160 + 3.0 + 0.5
    # Shared: one prefix step of a state, the decision, three steps of 4 states.
    shared = expected(bench, SHARED, found[0])
    assert shared.prefix == 2 * (2 + 4) and shared.branches == 2 * 3 * 5 and shared.train == 2 * 4 * 10
    collapsed = expected(bench, COLLAPSED, found[0])
    assert collapsed.train == 2 * 10 and collapsed.total == 12 + 30 + 20 + 3.0 + 0.5
    beside = expected(bench, FULL, found[0])
    assert beside.wait == 1.5 and beside.total == collapsed.total - 1.5, "one of two groups' scores is hidden"
    ratio = compare(bench, found, COLLAPSED, SHARED)
    assert ratio.measured.median == 1.5 and ratio.expected == shared.total / collapsed.total
    assert ratio.forwards == pytest.approx((2 * (1 + 1 + 3 * 4) + 4 * 6) / (2 * (1 + 1 + 3 * 4) + 6))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_saved_bytes_of_a_known_graph() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(5, 8)
    assert rl_training.saved_bytes(lambda: layer(x), layer) == 4 * 40, "its input; the weight is no activation"
    assert rl_training.saved_bytes(lambda: layer(x) * layer(x).exp(), layer) == 3 * 4 * 40, "x once, and both factors"


@pytest.mark.parametrize("adapted", [False, True])
def test_a_collapsed_step_keeps_a_groups_share_of_memory(adapted: bool) -> None:
    world = made(adapted=adapted)
    one, eight = (rl_training.peak(world, COLLAPSED, states) for states in (1, 8))
    assert isinstance(one, rl_training.Peak) and isinstance(eight, rl_training.Peak)
    assert 7.5 < eight.saved / one.saved <= 8 and one.allocated is None


# -- records -----------------------------------------------------------------------------------------------------------


def session(rounds: int) -> Session:
    return replace(Session.open(CPU, rated=False), rounds=rounds)


def test_records_are_valid_but_for_the_clocks_of_a_cpu(world: World) -> None:
    told = list(rl_records.events(session(5), Bench(world, SETTING, (FLASH, FULL)), time.monotonic() + 60))
    records = [parse(event["record"]) for event in told if "record" in event]
    assert all(isinstance(record, Record) for record in records)
    for record in records:
        assert [why for why in validate(record) if "clock stamps" not in why] == []
    by_name = {(record.workload.op, record.identity.arm): record for record in records}
    flash, ours = by_name["rl_iteration", "flash"], by_name["rl_iteration", OURS]
    assert ours.workload.label == "tiny 12 G 4 T 5 k 0-3 P 2" and ours.workload.batch == 8
    assert ours.derived.bound == rl_records.EXPECTED and ours.derived.floor_us > 0
    assert ours.derived.ratio_vs["flash"].median > 1 and ours.quality.gate == "pass"
    assert ("rl_prefix", OURS) in by_name and ("rl_prefix", "flash") not in by_name
    units = flash.workload.flops / world.forward_flops, ours.workload.flops / world.forward_flops
    assert units == pytest.approx((2 * (40 + 3 * 8), 2 * (25 + 3 * 2)))  # in twos: branches of guidance
    page = told[-1]["page"]
    assert "flash / ours" in page and "the same calls at G 8, T 20, K 10" in page and "kept for backward" in page


def test_an_arm_that_does_not_compute_the_same_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_records, "gradient_error", lambda *arguments: 0.3)
    told = rl_records.events(session(1), Bench(world, SETTING, [COLLAPSED]), 0.0)
    found = [parse(event["record"]) for event in told if "record" in event]
    assert found and all(record.quality.gate == "fail" for record in found)


# -- the unattended run ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "MODELS", quick.MODELS)
    monkeypatch.setattr(quick, "shrink", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the quick run is for a machine without a GPU")
def test_a_quick_job_measures_random_weights_and_is_not_repeated(small: None, tmp_path: Path) -> None:
    told = list(worker.run(Job("rl", "17", quick=True, budget_s=60), CPU))
    records = [parse(event["record"]) for event in told if "record" in event]
    assert {record.identity.arm for record in records} == {"flash", "independent", OURS}
    assert {record.workload.model for record in records} == {"1.3B"} and records[-1].timing.rounds == 5
    with Folder(tmp_path) as folder:
        for record in records:
            folder.append(record)
    assert not list(worker.run(Job("rl", "17", quick=True, resume=str(folder.records)), CPU))


def test_the_section_asks_for_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []
    monkeypatch.setattr(supervise, "run", lambda job, *_, **options: asked.append(job) or Outcome(True, 0, 0))
    with Folder(tmp_path) as folder:
        h200._rl(h200.Run(folder, False, False, interpreted=False), time.monotonic() + 60)
    assert [(job.kind, job.family) for job in asked] == [("rl", "17"), ("rl", "81"), ("rl", "33")]


def test_real_shapes_of_the_unattended_run() -> None:
    assert {frames: rl_run.measured(frames).label for frames in rl_run.SHAPES} == {
        17: "1.3B 7800 G 8 T 20 k 4 P 1",
        33: "1.3B 14040 G 4 T 20 k 4 P 1",
        81: "1.3B 32760 G 4 T 8 k 1 P 1",
    }
    assert all(arms[0] is FLASH and arms[-1] is FULL for _, arms in rl_run.SHAPES.values())


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    codec = ReelforgeCodec(CodecConfig())
    codec.basis.normal_()
    defaults = GenerationDefaults(VideoSpec(9, 16, 16, 16.0), num_steps=4, guidance_scale=2.0, negative_prompt="")
    model = WanTransformer.from_config(CONFIG)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    root = tmp_path_factory.mktemp("models") / "miniature"
    ModelFolder(model, codec, SeededTextEncoder(SeededTextConfig(width=16, max_tokens=12)), defaults).save(root)
    return root


def test_the_command_measures_a_model_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rl.jsonl"
    command = ["bench", "rl", "--model", folder, "--group", 2, "--steps", 4, "--rounds", 1, "--sweep", "--out", out]
    assert main([*map(str, command)]) == 0
    text = capsys.readouterr().err
    assert "miniature 12 G 2 T 4 k 0-1 P 2, 1 rounds" in text and "independent / shared" in text
    assert "G 4 T 4 k 0 P 1" in text and "G 2 T 8 k 0 P 1" in text
    assert {path.suffix for path in tmp_path.iterdir()} >= {".jsonl", ".md"}
    assert len(out.read_text().splitlines()) > 20


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--shape", "1.3B"], "There is no CUDA device"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_the_command_says_what_it_lacks(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "--shape" in arguments:
        pytest.skip("this machine has a GPU")
    assert main(["bench", "rl", *arguments]) != 0
    assert what in capsys.readouterr().err


def test_the_command_names_impossible_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rl", "--model", str(folder), "--group", "1"]) == 2
    assert "group_size is 1" in capsys.readouterr().err
    assert main(["bench", "rl", "--model", str(folder), "--steps", "0"]) == 2
    assert "step" in capsys.readouterr().err
