"""Pipelines that are stopped, killed, tampered with, continued with another recipe or spread over processes."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("av")

import torch
from tiny_enhance import make_taught_model
from tiny_model import TINY_VIDEO, make_model_folder
from tiny_pipeline import LORA, STAGES, run, transformers, write
from torch import Tensor
from two_processes import in_two_processes

from reelforge.bench.toy import render
from reelforge.engine.data.latents import LatentCache
from reelforge.engine.model.codec import ReelforgeCodec
from reelforge.engine.train.loop import Hooks, TrainLoop
from reelforge.stages.pipeline import Pipeline

TRAINS = ("sft", "rlhf", "cold_start", "grpo", "causal_init", "self_forcing")  # loops, by their label
STAGE_OF = dict(zip(TRAINS, ("sft", "rlhf", "enhance", "enhance", "distill", "distill"), strict=True))
SHORT = {"enhance": None, "distill": None}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base model, clips and language model."""
    root = tmp_path_factory.mktemp("parts")
    render.write_flawed(root / "clips", 24, seed=0, rates=render.CLEAN, spec=TINY_VIDEO)
    return make_model_folder(root / "model"), root / "clips", make_taught_model(root / "language")


@pytest.fixture(scope="module")
def recipe_in(parts: tuple[Path, Path, Path]) -> Callable[..., Path]:
    """Writes a recipe into a folder: all weights by fine-tuning, an adapter by RLHF."""
    return lambda root, **changes: write(root, *parts, **({"rlhf__lora": LORA} | changes))


@pytest.fixture(scope="module")
def whole(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's directory."""
    root = tmp_path_factory.mktemp("whole")
    assert run(recipe_in(root)) == 0
    return root / "run"


def assert_same_end(ours: Path, theirs: Path, stages: Sequence[str] = STAGES) -> None:
    """Latents, weights of all models and of the rewriter bit for bit, and the models' hashes on record."""
    mine, other = transformers(ours), transformers(theirs)
    assert mine.keys() == {*stages} - {"cache"}
    for stage, tensors in mine.items():
        assert tensors.keys() == other[stage].keys()
        assert all(torch.equal(tensor, other[stage][name]) for name, tensor in tensors.items()), stage
    caches = [LatentCache.open(root / "cache") for root in (ours, theirs)]
    assert caches[0].ids == caches[1].ids
    assert torch.equal(*(cache.latents(range(len(cache))) for cache in caches))
    hashes, known = ({name: facts["fingerprint"] for name, facts in record(root).items()} for root in (ours, theirs))
    assert hashes.keys() == {"base", *stages}
    assert all(hashes[name] == known[name] for name in hashes if name != "cache")  # which may be in more parts


def record(output: Path) -> dict[str, dict]:
    return json.loads((output / "pipeline.json").read_text())


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- stopped and killed ---


def signal_within(patch: pytest.MonkeyPatch, place: str, number: signal.Signals) -> None:
    """The process signals itself once: in the second step of the loop of that label, or over the third batch."""
    left = [True]

    def fire() -> None:
        if left:
            left.clear()
            os.kill(os.getpid(), number)

    if place == "cache":
        encode, batches = ReelforgeCodec.encode, []

        def encoded(self: ReelforgeCodec, pixels: Tensor) -> Tensor:
            batches.append(pixels)
            if len(batches) == 3:
                fire()
            return encode(self, pixels)

        patch.setattr(ReelforgeCodec, "encode", encoded)
        return
    fit = TrainLoop.fit

    def fitted(self: TrainLoop, hooks: Hooks) -> None:
        def losses(step: int) -> Iterator[Tensor]:
            for loss in hooks.losses(step):
                if self.label == place and step == 1:
                    fire()
                yield loss

        fit(self, dataclasses.replace(hooks, losses=losses))

    patch.setattr(TrainLoop, "fit", fitted)


def test_a_pipeline_that_is_stopped_in_every_stage_ends_as_if_it_had_not_been(
    recipe_in, whole, tmp_path, monkeypatch, capsys
):
    recipe, output = recipe_in(tmp_path), tmp_path / "run"
    for place in ("cache", *TRAINS):
        with monkeypatch.context() as patch:
            signal_within(patch, place, signal.SIGTERM)
            assert run(recipe) == 130
        said = capsys.readouterr().err.strip().splitlines()[-2:]
        assert "Run the same command to continue." in said[1]
        if place != "cache":
            assert f"stopped: Stage {STAGE_OF[place]}: Stopped by SIGTERM after step " in said[0]
        done = STAGES.index(STAGE_OF.get(place, "cache"))
        assert list(record(output)) == ["base", *STAGES[:done]]
    assert run(recipe) == 0
    assert_same_end(output, whole)


def killed(moment: str, recipe: Path) -> int:
    """Exit status of a forked pipeline that kills itself at that moment; 1 if the moment did not come."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at(stage: str, real: Callable) -> Callable:
        return lambda self, name, *facts: die() if name == stage else real(self, name, *facts)

    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        before, _, stage = moment.partition(" ")
        if before == "in":
            signal_within(patch, stage, signal.SIGKILL)
        elif before == "filling":  # its model folder, which must not be there before it is whole
            patch.setattr("reelforge.engine.model.folder._save_defaults", die)
        elif before == "merging":
            patch.setattr(Pipeline, "_finish", die_at(stage, Pipeline._finish))
        elif before == "recording":
            patch.setattr(Pipeline, "_note", die_at(stage, Pipeline._note))
        else:
            patch.setattr(Pipeline, f"_{stage}", die)
        try:
            run(recipe)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


MOMENTS = (
    "recording base", "in cache", "recording cache", "in sft", "merging sft", "filling sft", "recording sft", "in rlhf",
    "merging rlhf", "before enhance", "in cold_start", "in grpo", "recording enhance", "in causal_init",
    "in self_forcing", "recording distill",
)  # fmt: skip


def test_a_pipeline_that_is_killed_within_and_between_stages_ends_as_if_it_had_not_been(recipe_in, whole, tmp_path):
    recipe = recipe_in(tmp_path)
    for moment in MOMENTS:
        assert killed(moment, recipe) == -signal.SIGKILL, moment
    assert run(recipe) == 0
    assert_same_end(tmp_path / "run", whole)


# --- a stage that fails ---


def test_a_stage_that_fails_is_named_and_keeps_the_earlier_ones(recipe_in, whole, tmp_path, capsys):
    """The prompts are put right in the recipe, and the pipeline goes on; what was fine-tuned is not made again."""
    output = tmp_path / "run"
    assert run(recipe_in(tmp_path, rlhf__prompts="nowhere.txt", **SHORT)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "error: Stage rlhf: Prompts nowhere.txt cannot be read" in said[0] and "one prompt a line" in said[1]
    assert list(record(output)) == ["base", "cache", "sft"]
    earlier = files(output / "sft") | files(output / "sft_model") | files(output / "cache")
    assert run(recipe_in(tmp_path, **SHORT)) == 0
    assert earlier.items() <= files(output).items()
    assert_same_end(output, whole, STAGES[:3])


# --- tampered with ---


@pytest.fixture(scope="module")
def finished(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's recipe; whoever changes what it left puts it back."""
    recipe = recipe_in(tmp_path_factory.mktemp("finished"))
    assert run(recipe) == 0
    return recipe


def refused(recipe: Path, capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """What a call says that is refused and changes nothing."""
    before = files(recipe.parent / "run")
    capsys.readouterr()
    assert run(recipe) == 2
    assert files(recipe.parent / "run") == before
    what, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    return what, hint


def flip(path: Path) -> None:
    """Change the last byte. Weights may be linked from other models, which stay as they are."""
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.unlink()
    path.write_bytes(payload)


TAMPERED = {
    "cache/shard-00000.safetensors": ("cache", "run/cache"),
    "sft_model/transformer/diffusion_pytorch_model.safetensors": ("sft", "run/sft_model"),
    "sft_model/vae/diffusion_pytorch_model.safetensors": ("sft", "run/sft_model"),
    "rlhf_model/transformer/diffusion_pytorch_model.safetensors": ("rlhf", "run/rlhf_model"),
    "enhance/grpo/rewriter/model.safetensors": ("enhance", "run/enhance/grpo/rewriter"),
    "distill/model/transformer/diffusion_pytorch_model.safetensors": ("distill", "run/distill/model"),
}


@pytest.mark.parametrize("path", TAMPERED)
def test_an_artefact_with_another_byte_is_named(finished, capsys, path):
    stage, artefact = TAMPERED[path]
    file = finished.parent / "run" / path
    payload = file.read_bytes()
    flip(file)
    what, hint = refused(finished, capsys)
    assert f"{finished.parent / artefact} has changed since stage {stage} left it" in what
    assert "Put it back, or remove it" in hint
    file.write_bytes(payload)
    assert run(finished) == 0


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "reelforge.json"])
def test_a_model_that_is_sampled_in_another_way_is_named(finished, capsys, name):
    file = finished.parent / "run/sft_model" / name
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"flow_shift": 7.0, "num_steps": 5}))
    assert "sft_model has changed since stage sft left it" in refused(finished, capsys)[0]
    file.write_text(text)
    assert run(finished) == 0


def test_a_changed_artefact_is_not_built_upon(recipe_in, whole, tmp_path, capsys):
    recipe, output = recipe_in(tmp_path, rlhf__prompts="nowhere.txt", **SHORT), tmp_path / "run"
    assert run(recipe) == 2 and (output / "sft_model").exists()
    recipe_in(tmp_path, **SHORT)
    file = output / "sft_model/transformer/diffusion_pytorch_model.safetensors"
    payload = file.read_bytes()
    flip(file)
    assert "sft_model has changed" in refused(recipe, capsys)[0]
    assert not (output / "rlhf").exists()
    file.write_bytes(payload)
    assert run(recipe) == 0
    assert_same_end(output, whole, STAGES[:3])


def test_what_was_removed_is_made_again(finished, whole):
    output = finished.parent / "run"
    for name in ("cache", "sft_model", "rlhf_model", "enhance/grpo/rewriter", "distill/model"):
        shutil.rmtree(output / name)
    assert run(finished) == 0
    assert_same_end(output, whole)
    (output / "pipeline.json").unlink()
    assert run(finished) == 0
    assert_same_end(output, whole)


def test_another_base_model_is_refused(finished, parts, capsys):
    base = parts[0]
    weights, codec = (base / name / "diffusion_pytorch_model.safetensors" for name in ("transformer", "vae"))
    for file in (weights, codec):
        payload = file.read_bytes()
        flip(file)
        what, hint = refused(finished, capsys)
        assert f"{base} has changed since this pipeline was started" in what
        assert hint.strip() == "Put it back, or choose another output."
        file.write_bytes(payload)
    shutil.move(base, base.parent / "moved")
    what, hint = refused(finished, capsys)
    assert f"{base} is no folder." in what and "model folder" in hint
    shutil.move(base.parent / "moved", base)
    assert run(finished) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sft": 3}', '{"sft": {}}', "\x00", '{"base": {"seconds": 0}}'])
def test_a_damaged_record_is_one_sentence(finished, whole, capsys, text):
    path = finished.parent / "run/pipeline.json"
    known = path.read_text()
    path.write_text(text)
    what, hint = refused(finished, capsys)
    assert f"{path} is damaged." in what and "Remove it" in hint
    path.unlink()
    assert run(finished) == 0
    assert_same_end(path.parent, whole)
    path.write_text(known)


# --- another recipe ---

OTHER = {
    "another rate": {"sft__optimizer__lr": 2e-3},
    "other clips": {"cache__video": {"num_frames": 5, "height": 16, "width": 16, "fps": 16.0}},
    "another reward": {"rlhf__rewards": ["planted_scorers:Dim"]},
    "a rewriter that dares more": {"enhance__grpo__groups": {"group_size": 3, "temperature": 2.0}},
    "other steps": {"distill__denoising_steps": [1000.0]},
    "no student": {"distill": None},
    "no fine-tuning": {"cache": None, "sft": None},
}


@pytest.mark.parametrize("case", OTHER)
def test_another_recipe_is_refused_in_the_same_folder(finished, recipe_in, capsys, case):
    other = recipe_in(finished.parent, **OTHER[case])
    what, hint = refused(other, capsys)
    assert f"{finished.parent / 'run'} holds a run with another config" in what
    assert "Choose another output" in hint
    recipe_in(finished.parent)
    assert run(finished) == 0


def test_what_decides_nothing_may_change(finished, recipe_in, tmp_path, whole):
    """Rhythm, previews, what is watched, the place of a file."""
    shutil.copy(finished.parent / "prompts.txt", tmp_path / "same.txt")
    free = {
        "sft__train__log_every": 2, "rlhf__train__checkpoint_every": 3, "distill__previews": 0,
        "enhance__grpo__train__keep_last": 1, "rlhf__prompts": str(tmp_path / "same.txt"), "sft__device": "auto",
    }  # fmt: skip
    assert run(recipe_in(finished.parent, **free)) == 0
    assert_same_end(finished.parent / "run", whole)
    recipe_in(finished.parent)


# --- several processes ---

SMOOTH = {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5, "eps": 1e-3}  # where a gradient is 0 but for rounding
OPTIMIZERS = ("sft", "rlhf", "enhance__cold_start", "enhance__grpo", "distill__causal_init", "distill__self_forcing")
SPREAD = {
    **{f"{phase}__optimizer": SMOOTH for phase in OPTIMIZERS},
    "distill__self_forcing__critic_optimizer": SMOOTH | {"ema_decay": 0.0},
    "rlhf__rewards": ["planted_scorers:Bright"],
    "rlhf__rollout__path": {"sample_precision": "fp32"},
}


def test_two_ranks_run_the_pipeline_as_one_process(recipe_in, parts, tmp_path):
    """Micro-batches are the ranks' shares, so fine-tuning is the same bit for bit; later, batches are cut otherwise."""
    one, two = (recipe_in(tmp_path / name, **SPREAD) for name in ("one", "two"))
    assert run(one) == 0
    assert in_two_processes(lambda rank: run(two), tmp_path) == [0, 0]
    ours, theirs = (transformers(recipe.parent / "run") for recipe in (two, one))
    assert ours.keys() == theirs.keys() == {"sft", "rlhf", "enhance", "distill"}
    before = {"rlhf": theirs["sft"], "distill": theirs["rlhf"]}
    for stage, tensors in theirs.items():
        for name, tensor in tensors.items():
            atol = 0 if stage == "sft" else 1e-6
            torch.testing.assert_close(ours[stage][name], tensor, rtol=0, atol=atol, msg=f"{stage} {name}")
        if stage in before:
            assert max((tensor - before[stage][name]).abs().max() for name, tensor in tensors.items()) > 1e-4, stage
    assert list(record(two.parent / "run")) == ["base", *STAGES]


def test_ranks_that_do_not_keep_pace_agree_on_what_is_recorded(recipe_in, tmp_path):
    """The second rank reads the record late, when the first could already have written to it."""
    recipe = recipe_in(tmp_path, rlhf=None, enhance=None, distill=None)

    def work(rank: int) -> int:
        if rank == 1:
            known = Pipeline._known
            Pipeline._known = lambda self: time.sleep(0.3) or known(self)
        return run(recipe)

    assert in_two_processes(work, tmp_path) == [0, 0]
    assert list(record(tmp_path / "run")) == ["base", "cache", "sft"]


def test_both_ranks_refuse_a_changed_artefact(finished, capsys, tmp_path):
    file = finished.parent / "run/sft_model/transformer/diffusion_pytorch_model.safetensors"
    payload = file.read_bytes()
    flip(file)
    assert in_two_processes(lambda rank: run(finished), tmp_path) == [2, 2]
    file.write_bytes(payload)
