"""Self-forcing cycles: their arithmetic, what is checked and timed, the records, the unattended run and the command."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("av")

from tiny_model import make_model_folder

from reelforge.bench import (
    distill_backward,
    distill_cycle,
    distill_records,
    distill_run,
    distill_world,
    h200,
    quick,
    supervise,
    worker,
)
from reelforge.bench.cases import case as sizes
from reelforge.bench.cases.case import Shape
from reelforge.bench.distill_backward import Checks
from reelforge.bench.distill_cost import Layout, Network
from reelforge.bench.distill_cycle import Bench
from reelforge.bench.distill_plan import CRITIC_TURN, STUDENT_TURN, plan
from reelforge.bench.distill_world import World
from reelforge.bench.miniature import Case
from reelforge.bench.records import OURS, Record, parse, validate
from reelforge.bench.rl_arms import FULL
from reelforge.bench.rl_training import saved_bytes
from reelforge.bench.session import Session
from reelforge.bench.stamps import Sampler as ClockSampler
from reelforge.bench.supervise import Folder, Outcome
from reelforge.bench.worker import Job
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
BATCH, CHUNKS, STEPS = 2, 2, 4


def made(layers: int = 2) -> World:
    case = Case("tiny", {**CONFIG, "num_layers": layers}, (BATCH, 16, 4, 4, 4), 6)
    return distill_world.from_case(case, chunk_frames=2)


@pytest.fixture
def world() -> World:
    return made()


@pytest.fixture
def clocks() -> Iterator[ClockSampler]:
    with ClockSampler("not watched") as found:
        yield found


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "chunks", "whole"),
    [
        ("1.3B", 30, {0: 16.2, 1: 20.2, 2: 24.3, 3: 28.3, 4: 32.3, 5: 36.4, 6: 40.4}, 283),
        ("14B", 40, {0: 131.8, 3: 185.6, 6: 239.5}, 1676),
    ],
)
def test_chunks_and_clips_at_published_shapes(name: str, layers: int, chunks: dict[int, float], whole: float) -> None:
    """Figures of the specification's cost model, in TFLOP."""
    network = Network(Shape(name, *sizes.MODELS[name], 32760), layers)
    layout = Layout((3,) * 7, 1560)
    found = layout.chunks(network)
    assert {number: found[number] / 1e12 for number in chunks} == pytest.approx(chunks, abs=0.06)
    assert (layout.whole(network) - layout.text(network)) / 1e12 == pytest.approx(whole, abs=0.6)


def counted(world: World, part: str) -> float:
    """Of torch's own counter, which sees every product of the network."""
    exits, towards = distill_backward.exits_of(world), distill_backward.direction(world)
    rolled = distill_backward.rolled(world, exits)
    work = {
        "rollout": lambda: distill_backward.rolled(world, exits),
        "replay": lambda: distill_backward.replayed_backward(world, rolled, towards),
        "joint": lambda: distill_backward.joint_backward(world, exits, towards),
        "whole": lambda: world.teacher(rolled.x0, torch.full((BATCH,), 500.0), world.text[:-1]),
    }
    with FlopCounterMode(display=False) as counter:
        work[part]()
    return counter.get_total_flops()


@pytest.mark.parametrize("part", ["rollout", "replay", "joint", "whole"])
def test_the_arithmetic_counts_what_a_layer_multiplies(part: str) -> None:
    """The difference of two depths is a layer's: embeddings and head are in neither."""
    difference = counted(made(3), part) - counted(made(2), part)
    world = made(1)
    layout, exits = world.layout, distill_backward.exits_of(world)
    student, _, teacher = distill_records.networks(world)
    both = layout.rollout(student, exits) + sum(layout.replays(student))
    expected = {
        "rollout": layout.rollout(student, exits),
        "replay": sum(layout.replays(student)),
        "joint": both / layout.extra(student, exits),
        "whole": layout.whole(teacher),
    }
    assert difference == pytest.approx(expected[part])


def test_the_engines_forecast_counts_the_same(world: World) -> None:
    own, planned = distill_records.flops(Bench(world)).parts, plan(world).flops
    text = 2 * world.layout.text(distill_records.networks(world)[0])  # of two rollouts, which the forecast leaves out
    assert own["rollout"] - text == pytest.approx(planned["rollout"])
    assert own["teacher"] == pytest.approx(planned["teacher"]) and own["replay"] == pytest.approx(planned["replay"])
    assert own["critic"] + own["critic_score"] == pytest.approx(planned["critic"])


def test_checkpointing_costs_the_forward_again(world: World) -> None:
    before = distill_records.flops(Bench(world)).parts
    world.student.model.gradient_checkpointing = world.critic.gradient_checkpointing = True
    after = distill_records.flops(Bench(world)).parts
    assert after["replay"] == pytest.approx(before["replay"] * 4 / 3)
    assert after["critic"] == pytest.approx(before["critic"] * 4 / 3) and after["teacher"] == before["teacher"]


# -- checks ------------------------------------------------------------------------------------------------------------


def test_the_checks_pass_and_see_steps_of_their_own(world: World) -> None:
    assert len(set(distill_backward.exits_of(world))) == CHUNKS, "chunks leave at different steps"
    world.student.model.proj_out.weight.grad = torch.ones_like(world.student.model.proj_out.weight)  # an earlier run's
    found = distill_backward.check(world)
    assert found.deterministic and found.gradient_error < 1e-5 and found.replay_gap < 1e-4


def test_a_replay_that_forgets_the_past_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = distill_backward.replay

    def forgetful(model, rolled, state, *rest):
        return replay(model, rolled, replace(state, chunks_before=0), *rest)

    monkeypatch.setattr(distill_backward, "replay", forgetful)
    found = distill_backward.check(world)
    assert found.gradient_error > 1e-3 and found.replay_gap > 1e-3


def test_a_rollout_that_does_not_repeat_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled = distill_backward.rolled

    def drifting(*arguments: object) -> object:
        found = rolled(*arguments)
        return replace(found, x0=found.x0 + 1e-7 * torch.rand(()))

    monkeypatch.setattr(distill_backward, "rolled", drifting)
    assert not distill_backward.check(world).deterministic


@pytest.mark.parametrize(
    ("checks", "gate"),
    [
        (Checks(1e-6, 1e-6, True), "pass"),
        (Checks(1e-3, 1e-6, True), "fail"),
        (Checks(1e-6, 1e-2, True), "fail"),
        (Checks(float("nan"), 1e-6, True), "fail"),
        (Checks(1e-6, 1e-6, False), "fail"),
    ],
)
def test_every_check_can_close_the_gate(world: World, checks: Checks, gate: str) -> None:
    assert distill_records.judged(world, checks).gate == gate


def test_a_replay_keeps_one_chunk_of_what_the_joint_graph_keeps(world: World) -> None:
    found = distill_backward.compare(world, 1)
    exits, model = distill_backward.exits_of(world), world.student.model
    calls = distill_backward.replayed_chunks(world, distill_backward.rolled(world, exits))
    chunks = [saved_bytes(call, model) for call in calls]
    assert found.replayed_bytes == max(chunks) and found.joint_bytes == pytest.approx(sum(chunks), rel=0.02)
    assert found.layers == 2 and 1 < found.expected < 2 and found.replayed_peak is None
    assert all(parameter.grad is None for parameter in model.parameters())


# -- cycles ------------------------------------------------------------------------------------------------------------


def test_seconds_are_booked_where_they_are_spent(world: World, clocks: ClockSampler) -> None:
    """Calls that sleep show in their own part; nothing is booked twice, so the rest is never negative."""
    pause = {world.teacher: (0.0, 0.05), world.critic: (0.07, 0.06), world.student.model: (0.08, 0.01)}
    for model, seconds in pause.items():
        model.register_forward_pre_hook(
            lambda *_, seconds=seconds: time.sleep(seconds[0 if torch.is_grad_enabled() else 1])
        )
    (found,) = Bench(world).rounds(1, 0.0, clocks, OURS)
    split = found.split
    calls = 2 * (CHUNKS * STEPS + CHUNKS - 1)
    assert split.rollout >= 0.01 * calls and split.teacher >= 0.05
    assert split.critic_score >= 0.06 and split.critic >= 0.07
    assert len(found.chunks) == CHUNKS and min(found.chunks) >= 0.08 and sum(found.chunks) == split.replay
    parts = split.rollout + split.teacher + split.critic_score + split.replay + split.critic
    assert split.rest >= 0 and split.total == pytest.approx(parts + split.rest)


def test_cycles_take_turns_and_end_at_the_deadline(world: World, clocks: ClockSampler) -> None:
    bench = Bench(world)
    assert len(list(bench.rounds(3, time.monotonic(), clocks, OURS))) == 1
    assert len(list(bench.rounds(2, time.monotonic() + 60, clocks, OURS))) == 2
    assert bench.state.student.step == bench.state.critic.step == 3


def test_the_plan_is_of_the_worlds_own_parts(world: World) -> None:
    planned = plan(world)
    for who, model in (("student", world.student.model), ("critic", world.critic), ("teacher", world.teacher)):
        assert planned.always[f"{who}: weights"][0] == sum(weight.nbytes for weight in model.parameters())
    assert {*STUDENT_TURN, *CRITIC_TURN} == planned.moments.keys()
    cycle = distill_cycle.Cycle(distill_cycle.Split(*[1.0] * 7), (1.0,), planned.total("critic"), 2 * planned.peak)
    text = distill_records.memory_text(planned, [cycle])
    assert text.splitlines()[2].split()[-1] == f"{2 * planned.peak / max(map(planned.total, STUDENT_TURN)):.3f}"


# -- records -----------------------------------------------------------------------------------------------------------


def session(rounds: int) -> Session:
    return replace(Session.open(CPU, rated=False), rounds=rounds)


def test_records_are_valid_but_for_the_clocks_of_a_cpu(world: World) -> None:
    told = list(distill_records.events(session(5), world, FULL, time.monotonic() + 60))
    records = [parse(event["record"]) for event in told if "record" in event]
    assert all(isinstance(record, Record) for record in records)
    for record in records:
        assert [why for why in validate(record) if "clock stamps" not in why] == []
    by_op = {record.workload.op: record for record in records}
    assert by_op.keys() == {"distill_cycle", *(f"distill_{part}" for part in distill_records.PARTS if part != "total")}
    cycle = by_op["distill_cycle"]
    assert cycle.workload.label == "tiny 16 teacher tiny chunk 2 N 4 B 2" and cycle.workload.batch == BATCH
    assert cycle.derived.tflops == pytest.approx(cycle.workload.flops / cycle.timing.median_us / 1e6)
    assert cycle.quality.gate == "pass" and cycle.quality.max_abs < 1e-4
    page = told[-1]["page"]
    for words in ("replay of chunk", "planned", "the same bit for bit", "replayed / joint", "with 5 critic steps"):
        assert words in page


def test_a_cycle_that_computes_something_else_is_no_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_records, "check", lambda world: Checks(0.3, 0.0, True))
    told = distill_records.events(session(1), world, FULL, 0.0)
    records = [parse(event["record"]) for event in told if "record" in event]
    assert records and all(record.quality.gate == "fail" for record in records)


# -- the unattended run ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "MODELS", quick.MODELS)
    monkeypatch.setattr(quick, "shrink", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the quick run is for a machine without a GPU")
def test_a_quick_job_measures_random_weights_and_is_not_repeated(small: None, tmp_path: Path) -> None:
    told = list(worker.run(Job("distill", "14B", quick=True, budget_s=60), CPU))
    records = [parse(event["record"]) for event in told if "record" in event]
    assert {record.identity.arm for record in records} == {OURS}
    assert {record.workload.model for record in records} == {"1.3B"} and records[-1].timing.rounds == 5
    assert {record.workload.label for record in records} == {distill_run.measured("14B", small=True).label}
    with Folder(tmp_path) as folder:
        for record in records:
            folder.append(record)
    assert not list(worker.run(Job("distill", "14B", quick=True, resume=str(folder.records)), CPU))


def test_what_breaks_under_our_kernels_runs_under_plain_ones(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, begun = [], []
    monkeypatch.setattr(distill_records, "events", lambda session, world, arm, deadline: ran.append(arm.name) or ())
    lost = replace(session(1), wants=lambda case, arm: arm != OURS, begin=lambda record: begun.append(record))
    assert not list(distill_run.events(lost, "1.3B", 60.0, small=True))
    assert ran == ["plain"] and [record.identity.arm for record in begun] == ["plain"]
    assert not list(distill_run.events(replace(lost, wants=lambda case, arm: False), "1.3B", 60.0, small=True))
    assert ran == ["plain"], "both took their processes with them"


def test_the_section_asks_for_both_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []
    monkeypatch.setattr(supervise, "run", lambda job, *_, **options: asked.append(job) or Outcome(True, 0, 0))
    with Folder(tmp_path) as folder:
        h200.SECTIONS["distill"].work(h200.Run(folder, False, False, interpreted=False), time.monotonic() + 60)
    assert [(job.kind, job.family) for job in asked] == [("distill", "1.3B"), ("distill", "14B")]
    assert distill_run.measured("14B").name == "distill_cycle 1.3B 32760 teacher 14B chunk 3 N 4 B 1"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "miniature")


def test_the_command_measures_a_model_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "distill.jsonl"
    command = ["bench", "distill", "--model", folder, "--batch", 2, "--rounds", 1, "--out", out]
    assert main([*map(str, command)]) == 0
    text = capsys.readouterr().err
    assert "miniature 12 teacher miniature chunk 1 N 4 B 2, 1 cycles" in text and "MB kept for backward" in text
    assert len(out.read_text().splitlines()) == len(distill_records.PARTS)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--teacher", "1.3B"], "There is no CUDA device"),
        (["--model", "nowhere"], "nowhere"),
        (["--chunk-frames", "2"], "3 latent frames do not split into chunks of 2"),
        (["--batch", "0"], "The batch is 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "--teacher" in arguments:
        pytest.skip("this machine has a GPU")
    model = [] if {"--teacher", "--model"} & {*arguments} else ["--model", str(folder)]
    assert main(["bench", "distill", *model, *arguments]) == 2
    assert what in capsys.readouterr().err
