"""Models side by side: each clip is what ``generate`` makes, scored once, never lost, made again when it must be."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("av")

import tomli_w
import torch
from tiny_enhance import REQUESTS, make_language_model
from tiny_rlhf import PROMPTS, config_of
from two_processes import in_two_processes

from reelforge.bench.judge import filming, judging, results
from reelforge.bench.judge.config import JudgeConfig
from reelforge.bench.judge.results import Results, StageResult
from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError, Interrupted, TrainingError
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.engine.model.generator import Generator, Job, decode_uint8, load_served, resolve
from reelforge.stages import rlhf
from reelforge.stages.cli import main

BRIGHT, DIM = "planted_scorers:Bright", "planted_scorers:Dim"
GUIDED = {"name": "guided", "settings": ["guidance_scale=3"], "against": ["base"]}


@pytest.fixture
def judged(tmp_path: Path, model_folder: Path) -> Callable[..., JudgeConfig]:
    """A recipe of two columns on three prompts; ``changes`` are its keys, ``columns`` without their models."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    (tmp_path / "requests.txt").write_text("\n".join(REQUESTS[:3]) + "\n")

    def config(**changes: object) -> JudgeConfig:
        table = {
            "output": str(tmp_path / "judged"),
            "prompts": str(tmp_path / "prompts.txt"),
            "voters": [BRIGHT],
            "batch_size": 2,
            "columns": [{"name": "base"}, GUIDED],
            "device": "cpu",
            **changes,
        }
        table["columns"] = [{"model": str(model_folder), **column} for column in table["columns"]]
        return configuration.build(JudgeConfig, table)

    return config


def outcome(config: JudgeConfig) -> Results:
    assert judging.run(config) == config.output / "report.html"
    return results.read(config.output / "results.json")


def stage(found: Results, name: str) -> StageResult:
    return next(stage for stage in found.stages if stage.name == name)


def facts(config: JudgeConfig) -> dict[str, dict]:
    """What every clip's file says."""
    root = config.output / "scores"
    return {str(path.relative_to(root)): json.loads(path.read_text()) for path in sorted(root.rglob("*.json"))}


def stamps(config: JudgeConfig) -> dict[str, int]:
    files = [path for kind in ("clips", "scores") for path in (config.output / kind).rglob("*.*")]
    return {str(path.relative_to(config.output)): path.stat().st_mtime_ns for path in files}


def renewed(config: JudgeConfig) -> set[str]:
    """Clips that another call makes."""
    before = stamps(config)
    judging.run(config)
    after = stamps(config)
    return {name for name in after if after[name] != before.get(name) and name.startswith("clips")}


# --- what it measures ---


def test_a_clip_is_what_generate_makes_and_its_score_is_of_its_pixels(judged, model_folder: Path) -> None:
    config = judged(samples=2, seed=5)
    found = outcome(config)
    folder = load_served(model_folder, None, None, torch.float32, torch.device("cpu"))
    settings = resolve(load_generation_defaults(model_folder), ["guidance_scale=3"])
    generator = Generator(folder, settings, 5)
    jobs = [Job(prompt, member) for prompt in PROMPTS[:3] for member in range(2)]
    frames = np.concatenate([decode_uint8(folder.codec, generator.latents(jobs[i : i + 2])) for i in (0, 2, 4)])
    levels = frames.astype(np.float64).mean((1, 2, 3, 4)) / 255
    told = [each["scores"]["bright"] for name, each in facts(config).items() if name.startswith("guided")]
    assert told == pytest.approx(levels.tolist(), abs=1e-6) and len(set(told)) == 6
    assert stage(found, "guided").scores["bright"].mean == pytest.approx(levels.mean(), abs=1e-6)
    for place, clip in enumerate(sorted((config.output / "clips/guided").iterdir())):
        assert clip.name == f"{place // 2:04d}-{place % 2}.mp4"
        # An untrained model's clips are noise, which x264 blurs: each is still far nearer to its own than to another.
        away = np.abs(frames.astype(int) - read_video(clip).frames).mean((1, 2, 3, 4))
        assert away.argmin() == place and away[place] < 0.6 * np.delete(away, place).min()
    assert stage(found, "guided").nfe == generator.num_evaluations == 2 * stage(found, "base").nfe
    assert (found.prompts, found.clips, found.seed) == (3, 6, 5)


def test_changes_are_paired_and_votes_are_of_voters_alone(judged) -> None:
    config = judged(samples=2, rewards=[DIM])
    found = outcome(config)
    base, guided = found.stages
    told = facts(config)
    change = [told[f"guided/{p:04d}-{m}.json"]["scores"]["bright"] - told[f"base/{p:04d}-{m}.json"]["scores"]["bright"]
              for p in range(3) for m in range(2)]  # fmt: skip
    assert guided.scores["bright"].change.mean == pytest.approx(np.mean(change), abs=1e-9)
    assert base.scores["bright"].change is None and base.gsb == ()
    (vote,) = guided.gsb
    assert vote.reference == "base" and vote.voters == ("bright",) and vote.good + vote.same + vote.bad == 6
    assert guided.scores["dim"].target and not guided.scores["bright"].target
    assert found.self_check.reference == "base" and found.self_check.same == 3, "half of its own pairs tie"


def test_the_same_model_under_another_name_is_no_better(judged) -> None:
    found = outcome(judged(columns=[{"name": "base"}, {"name": "again", "against": ["base"]}]))
    (vote,) = stage(found, "again").gsb
    assert (vote.good, vote.same, vote.bad, vote.net) == (0, 6, 0, 0.0)
    assert stage(found, "again").scores["bright"].change.mean == 0


def test_requests_are_scored_as_they_were_asked_and_share_their_noise(judged, tmp_path: Path) -> None:
    """An untrained rewriter answers out of form, so its column is given the requests themselves."""
    language = make_language_model(tmp_path / "language")
    columns = [
        {"name": "captions"},
        {"name": "raw", "asked": "requests"},
        {"name": "PE", "asked": "rewritten", "against": ["raw"]},
    ]
    config = judged(columns=columns, requests=str(tmp_path / "requests.txt"), rewriter=str(language), samples=1)
    found, told = outcome(config), facts(config)
    for place in range(3):
        raw, rewritten = told[f"raw/{place:04d}-0.json"], told[f"pe/{place:04d}-0.json"]
        assert raw["request"] == rewritten["request"] == REQUESTS[place] == rewritten["prompt"]
        assert raw["scores"] == rewritten["scores"]
        assert told[f"captions/{place:04d}-0.json"]["request"] == PROMPTS[place]
    assert "3 of 3 requests stay as they are" in stage(found, "PE").note
    assert stage(found, "raw").scores["bright"].change is None, "compared among requests alone"
    assert stage(found, "PE").scores["bright"].change.mean == 0
    page = (config.output / "report.html").read_text()
    assert all(words in page for words in ("In users&#39; words", REQUESTS[0], PROMPTS[0]))
    assert {path.name for path in (config.output / "sheets").iterdir()} == {
        "same_prompts_same_noise.webp", "failures_on_prompts.webp", "in_users_words.webp", "failures_on_requests.webp"
    }  # fmt: skip


def test_all_columns_have_one_size(judged, model_folder: Path, tmp_path: Path) -> None:
    """A model of longer clips (a student may be one) is asked for the first one's length, or all for the recipe's."""
    longer = tmp_path / "longer"
    shutil.copytree(model_folder, longer)
    extras = json.loads((longer / "reelforge.json").read_text())
    extras["video"]["num_frames"] = 17
    (longer / "reelforge.json").write_text(json.dumps(extras))
    columns = [{"name": "base"}, {"name": "longer", "model": str(longer)}]
    for changes, frames in (({}, 9), ({"video": {**extras["video"], "num_frames": 5}}, 5)):
        config = judged(columns=columns, samples=1, **changes)
        judging.run(config)
        assert {len(read_video(clip).frames) for clip in (config.output / "clips").rglob("*.mp4")} == {frames}


def test_an_adapter_is_merged_and_its_run_is_told(judged, model_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "rlhf"
    root.mkdir()
    lora = {"rank": 2, "alpha": 64.0, "targets": ["to_q", "to_v"]}
    adapter = rlhf.run(config_of(root, model_folder, lora=lora, optimizer__lr=0.1)).weights
    column = {"name": "aligned", "adapter": str(adapter), "metrics": [str(adapter.parent / "metrics.jsonl")]}
    config = judged(columns=[{"name": "base"}, column])
    aligned = stage(outcome(config), "aligned")
    folder = load_served(model_folder, None, adapter, torch.float32, torch.device("cpu"))
    generator = Generator(folder, resolve(load_generation_defaults(model_folder), []), 0)
    frames = decode_uint8(folder.codec, generator.latents([Job(PROMPTS[0], 0)]))
    assert facts(config)["aligned/0000-0.json"]["scores"]["bright"] == pytest.approx(frames.mean() / 255, abs=1e-4)
    assert aligned.scores["bright"].change.mean != 0
    assert aligned.steps == 2 and aligned.seconds_train > 0


# --- nothing is lost, nothing is made twice ---


def test_a_second_call_films_nothing(judged) -> None:
    config = judged()
    judging.run(config)
    page = (config.output / "results.json").read_bytes()
    assert renewed(config) == set()
    assert (config.output / "results.json").read_bytes() == page


@pytest.mark.parametrize("damage", ["no clip", "no scores", "half a file", "a list", "another's"])
def test_a_clip_that_is_not_whole_is_made_again(judged, damage: str) -> None:
    config = judged()
    judging.run(config)
    before = facts(config)
    clip, scores = (config.output / kind / f"base/0001-1.{end}" for kind, end in (("clips", "mp4"), ("scores", "json")))
    if damage == "no clip":
        clip.unlink()
    elif damage == "no scores":
        scores.unlink()
    else:
        other = (config.output / "scores/base/0000-0.json").read_text()
        scores.write_text({"half a file": other[:40], "a list": "[1]", "another's": other}[damage])
    assert renewed(config) == {"clips/base/0001-1.mp4"}
    for name, each in facts(config).items():
        assert each["scores"] == pytest.approx(before[name]["scores"], abs=1e-6), name


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"columns": [{"name": "base"}, {**GUIDED, "settings": ["guidance_scale=2"]}]}, {"guided"}),
        ({"seed": 1}, {"base", "guided", "base-second-noise"}),
        ({"voters": [DIM]}, {"base", "guided", "base-second-noise"}),
        ({"batch_size": 1}, set()),
        ({"columns": [{"name": "base"}, GUIDED, {"name": "third"}]}, {"third"}),
    ],
)
def test_what_decides_a_clip_makes_it_anew(judged, changes: dict, anew: set[str]) -> None:
    judging.run(judged())
    assert {Path(name).parts[1] for name in renewed(judged(**changes))} == anew


def test_more_samples_keep_the_first_ones(judged) -> None:
    judging.run(judged(samples=1))
    assert {Path(name).name[-5] for name in renewed(judged(samples=2))} == {"1"}


def test_other_weights_make_their_column_anew(judged, model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = judged(columns=[{"name": "base"}, {"name": "mine", "model": str(copy)}])
    judging.run(config)
    weights = next((copy / "transformer").glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    assert {Path(name).parts[1] for name in renewed(config)} == {"mine"}


def test_stopped_and_called_again_it_is_the_same(judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halved = judged(output=str(tmp_path / "whole")), judged()
    judging.run(whole)
    write, written = filming.write_video, iter(range(100))

    def stop_at_the_third(*arguments: object) -> None:
        write(*arguments)
        if next(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(filming, "write_video", stop_at_the_third)
    with pytest.raises(Interrupted, match="SIGTERM"):
        judging.run(halved)
    assert len(stamps(halved)) == 2 * 4 and not (halved.output / "report.html").exists()
    monkeypatch.setattr(filming, "write_video", write)
    judging.run(halved)
    pairs = zip(facts(whole).values(), facts(halved).values(), strict=True)
    assert all(a["scores"] == b["scores"] and a["identity"] == b["identity"] for a, b in pairs)


def test_two_ranks_make_what_one_makes(judged, tmp_path: Path) -> None:
    one, two = judged(output=str(tmp_path / "one"), batch_size=1), judged(output=str(tmp_path / "two"), batch_size=1)
    judging.run(one)
    assert in_two_processes(lambda rank: judging.run(two) and None, tmp_path) == [0, 0]
    assert [each["scores"] for each in facts(one).values()] == [each["scores"] for each in facts(two).values()]
    both = [results.read(config.output / "results.json").stages for config in (one, two)]
    assert [stage.gsb for stage in both[0]] == [stage.gsb for stage in both[1]]


# --- scorers ---


def test_a_silent_scorer_ends_it_at_once(judged) -> None:
    config = judged(voters=["planted_scorers:Raising"], rewards=[BRIGHT])
    with pytest.raises(TrainingError, match=r"2 of 6 clips of 'base' lack a score.*server is down") as caught:
        judging.run(config)
    assert "these clips are made again" in caught.value.hint
    assert len(facts(config)) == 2


def test_clips_without_a_score_are_missing_and_made_again(judged) -> None:
    config = judged(voters=[BRIGHT], rewards=["planted_scorers:Choosy"], scoring={"missing_limit": 1.0}, samples=4)
    found = outcome(config)
    silent = {name for name, each in facts(config).items() if each["scores"]["choosy"] is None}
    told = {row: [name for name in silent if name.startswith(f"{row}/")] for row in ("base", "guided")}
    assert silent and len(silent) < 36
    assert {row.name: row.scores["choosy"].missing for row in found.stages} == {k: len(v) for k, v in told.items()}
    assert {name.replace("clips/", "").replace("mp4", "json") for name in renewed(config)} == silent


# --- recipes ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"columns": [{"name": "a"}, {"name": "a"}]}, "Columns 'a' and 'a' are both filed as 'a'"),
        ({"columns": [{"name": "a+b"}, {"name": "A b"}]}, "Columns 'a.b' and 'A b' are both filed as 'a-b'"),
        ({"columns": [{"name": "a"}, {"name": "a second noise"}]}, "Columns 'a, second noise' and 'a second noise'"),
        ({"columns": [{"name": "a", "against": ["b"]}, {"name": "b"}]}, "'a' is against 'b', which is no column"),
        ({"columns": [{"name": "a"}, {"name": "b", "asked": "requests"}]}, "'b' is asked for requests.*Set requests"),
        ({"columns": [{"name": "a", "asked": "rewritten"}], "requests": "r.txt"}, "'a' is asked for rewritten.*Set re"),
        (
            {"columns": [{"name": "a"}, {"name": "b", "asked": "requests", "against": ["a"]}], "requests": "r.txt"},
            "'b' is asked for requests, 'a' for prompts.*same words",
        ),
        ({"voters": []}, "voters is empty"),
        (
            {"columns": [{"name": "a", "settings": ["video.num_frames=5"]}]},
            "'a' is of a size of its own.*Set video for",
        ),
        ({"samples": 0}, "samples is 0"),
        ({"columns": [{"name": "a", "asked": "reqests"}]}, "asked.*'reqests'.*Did you mean 'requests'"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(judged, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judged(**changes)
    assert_told(told, caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"columns": []}, r"There is no column.*\[\[columns\]\]"),
        ({"voters": [BRIGHT], "rewards": [BRIGHT]}, "axes are bright, bright.*each axis one scorer"),
        ({"voters": ["planted_scorers:Bryght"]}, "Bryght.*cannot be imported"),
        ({"columns": [{"name": "a"}, {"name": "b", "settings": ["guidence_scale=3"]}]}, "guidence_scale.*Did you mean"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_filmed(judged, changes: dict, told: str) -> None:
    config = judged(**changes)
    with pytest.raises(ConfigError) as caught:
        judging.run(config)
    assert_told(told, caught.value)
    assert not list(config.output.rglob("*.mp4"))


def assert_told(pattern: str, error: ConfigError) -> None:
    assert re.search(pattern, f"{error.what} {error.hint}"), (error.what, error.hint)


def test_one_prompt_has_no_interval(judged, tmp_path: Path) -> None:
    config = judged()
    (tmp_path / "prompts.txt").write_text("a red circle\n\na red circle\n")
    with pytest.raises(ConfigError, match="holds 1 prompt"):
        judging.run(config)


def test_the_verb_prints_where_the_page_is(judged, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = configuration.to_table(judged(columns=[{"name": "base"}]))
    recipe = tmp_path / "judge.toml"
    recipe.write_text(tomli_w.dumps(plain(table)))
    assert main(["judge", str(recipe), "--set", "samples=1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "judged/report.html")}
    assert main(["judge", str(recipe), "--set", "sampels=1"]) == 2
    assert "Did you mean 'samples'" in capsys.readouterr().err


def plain(table: dict) -> dict:
    """Without what is not set, which TOML cannot say."""

    def kept(value: object) -> object:
        if isinstance(value, dict):
            return plain(value)
        return [kept(each) for each in value] if isinstance(value, list) else value

    return {name: kept(value) for name, value in table.items() if value is not None}


def entries(root: Path) -> Iterator[str]:
    yield from sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_prompt_is_escaped_on_the_page_and_names_no_file(judged, tmp_path: Path) -> None:
    config = judged(samples=1)
    (tmp_path / "prompts.txt").write_text("../../../<script>alert(1)</script>\n\u05e9\u05dc\u05d5\u05dd\n")
    judging.run(config)
    assert "<script" not in (config.output / "report.html").read_text()
    assert all("script" not in name for name in entries(tmp_path))
