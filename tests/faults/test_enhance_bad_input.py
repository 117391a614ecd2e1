"""What a rewriter's training refuses: one sentence, one of what to do, exit status 2, and nothing written."""

import shutil
from pathlib import Path

import pytest
import tomli_w

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tiny_enhance import config_of, make_language_model, make_taught_model, recipe_table
from tiny_model import make_model_folder

from reelforge.engine.core import distributed
from reelforge.engine.core.errors import ConfigError
from reelforge.stages import enhance
from reelforge.stages.cli import main

BAD = {
    "no language model": ({"language_model": "nowhere"}, "nowhere is no folder", "nothing is downloaded"),
    "a language model of something else": ({"language_model": "{model}"}, "does not load", "causal language model"),
    "no chat template": ({"language_model": "{plain}"}, "has no chat template", "instruction-tuned"),
    "no pairs": ({"cold_start__pairs": "nowhere.jsonl"}, "nowhere.jsonl cannot be read", "Check the path"),
    "a line that is no pair": ({"cold_start__pairs": "{broken}"}, "broken.jsonl:2 is no pair", '"caption"'),
    "pairs that cover nothing": ({"cold_start__pairs": "{untrue}"}, "holds 1 pairs, and no caption", "min_coverage"),
    "a caption that is too long": ({"dialogue__max_new_tokens": 12}, "takes", "dialogue.max_new_tokens is 12"),
    "no room for an answer": ({"dialogue__max_new_tokens": 150}, "the language model has room for 160", "lower"),
    "a share below none": ({"cold_start__identity": -0.1}, "cold_start.identity is -0.1", "[0, 1]"),
    "a share above all": ({"cold_start__min_coverage": 2.0}, "cold_start.min_coverage is 2.0", "[0, 1]"),
    "no requests": ({"grpo__requests": "nowhere.txt"}, "Prompts nowhere.txt cannot be read", "one prompt a line"),
    "empty requests": ({"grpo__requests": "{empty}"}, "empty.txt holds no prompt", "Write one a line"),
    "a request of a thousand words": ({"grpo__requests": "{long}"}, "'ball ball", "Shorten or leave it out"),
    "no held-out requests": ({"grpo__held_out": {"requests": "nowhere.txt"}}, "nowhere.txt cannot be read", ""),
    "no held-out videos": ({"grpo__held_out": {"requests": "{empty}", "draws": 0}}, "draws is 0", "above 0"),
    "a group of one": ({"grpo__groups__group_size": 1}, "group_size is 1", "at least 2"),
    "half an iteration": ({"grpo__train__steps": 5}, "grpo.train.steps is 5 and updates_per_rollout 2", "multiple"),
    "an unknown scorer": ({"grpo__rewards": ["clop"]}, "There is no scorer 'clop'", "Did you mean 'clip'?"),
    "no scorer": ({"grpo__rewards": []}, "grpo.rewards is empty", "Name a scorer"),
    "a weight for nobody": (
        {"grpo__fusion__weights": [{"axis": "tq", "weight": 1.0}]}, "names 'tq'", "vq, mq, ta, structure"),
    "advantages apart": ({"grpo__fusion__rule": "separate"}, 'fusion.rule is "separate"', '"each"'),
    "a scale of what is summed": ({"grpo__fusion__rule": "sum"}, "keeps a scale per reward", '"each"'),
    "no generator": ({"grpo__generator": "nowhere"}, "nowhere/transformer is no folder", "model folder"),
    "a generator of something else": ({"grpo__generator": "{language}"}, "/transformer is no folder", "model folder"),
    "a generator without a codec": ({"grpo__generator": "{blind}"}, "/vae is no folder", "model folder"),
    "no generator behind a proxy": (
        {"grpo__generator": "nowhere", "grpo__proxy": {"model": "{model}"}}, "nowhere/transformer", ""),
    "no proxy": ({"grpo__proxy": {"model": "nowhere"}}, "nowhere/transformer is no folder", "model folder"),
    "sampled by an unknown key": ({"grpo__sampling": ["num_step=3"]}, "'num_step'", "Did you mean 'num_steps'?"),
    "frames that do not fit": ({"grpo__sampling": ["video.num_frames=8"]}, "num_frames is 8", "Use 5 or 9"),
    "an unknown key": ({"grpo__groups__size": 4}, "Unknown key 'grpo.groups.size'", "group_size"),
    "no phase": ({"cold_start": None, "grpo": None}, "The recipe has no phase", "cold_start, grpo"),
    "a dialogue without the request": ({"dialogue__turn": "Go!"}, "dialogue.turn is 'Go!'", "{request}"),
    "lengths that fall": ({"structure__words": [30, 12]}, "structure.words is [30, 12]", "must grow"),
}  # fmt: skip


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught_model(tmp_path_factory.mktemp("language") / "model", steps=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def wrong(language, model, tmp_path_factory) -> dict[str, str]:
    """Files and folders that are not what they should be, by name."""
    root = tmp_path_factory.mktemp("wrong")
    made = {"model": model, "language": language}
    make_language_model(root / "plain")
    (root / "plain/chat_template.jinja").unlink()
    shutil.copytree(model, root / "blind")
    shutil.rmtree(root / "blind/vae")
    texts = {
        "broken.jsonl": '{"caption": "a red circle"}\n{"caption": 3}\n',
        "untrue.jsonl": '{"request": "blue box", "caption": "a red circle"}\n',
        "empty.txt": "\n  \n",
        "long.txt": "a dot\n" + "ball " * 1000 + "\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    made |= {path.stem: path for path in root.iterdir()}
    return {name: str(path) for name, path in made.items()}


def filled(value: object, wrong: dict[str, str]) -> object:
    """``{name}`` to the path of that name."""
    if isinstance(value, dict):
        return {name: filled(inner, wrong) for name, inner in value.items()}
    return wrong.get(value[1:-1], value) if isinstance(value, str) and value.startswith("{") else value


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(language, model, wrong, tmp_path, capsys, case):
    """Of the second phase, too: nothing is trained before."""
    changes, what, hint = BAD[case]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(tmp_path, language, model, **filled(changes, wrong))))
    assert main(["enhance", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and what in said[0] and hint in said[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", ["cold_start", "grpo"])
def test_a_batch_smaller_than_the_ranks_is_refused_at_once(language, model, tmp_path, monkeypatch, phase):
    mine = config_of(tmp_path, language, model, **{f"{phase}__train__batch_size": 2})
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(enhance, "check_ranks", lambda *_: None)
    with pytest.raises(ConfigError, match="A global batch of 2 leaves some of 3 processes idle"):
        enhance.run(mine)
    assert not mine.output.exists()
