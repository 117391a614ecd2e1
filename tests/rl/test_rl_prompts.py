"""The prompt set: text and JSON lines, what is wrong with them, whose reward is whose, and the encoding on disk."""

import math
from pathlib import Path

import pytest
import torch

from reelforge.engine.core import rng
from reelforge.engine.core.errors import DataError
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder
from reelforge.engine.rl.prompts import PromptSet, encode_prompts, read_prompts

AXES = ("vq", "mq", "ta")


def write(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_prompt_a_line(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path, "a cat\n\n  a dog, running  \na cat\n{not json}\nein Hund läuft\n"))
    assert found.prompts == ("a cat", "a dog, running", "{not json}", "ein Hund läuft")
    assert found.rewards == ((),) * 4 and found.wanted(AXES) is None


def test_json_lines_with_rewards(tmp_path: Path) -> None:
    lines = (
        '{"prompt": " a cat "}\n\n{"prompt": "a dog", "rewards": ["ta", "vq"]}\n{"prompt": "a cow", "rewards": []}\n'
    )
    found = read_prompts(write(tmp_path, lines, "prompts.jsonl"))
    assert found.prompts == ("a cat", "a dog", "a cow") and found.rewards == ((), ("ta", "vq"), ())
    wanted = found.wanted(AXES)
    assert wanted is not None and wanted.dtype == torch.bool
    assert wanted.T.tolist() == [[True] * 3, [True, False, True], [True] * 3]


def test_a_reward_that_nobody_gives(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path, '{"prompt": "a dog", "rewards": ["ta", "sharpness"]}', "p.jsonl"))
    with pytest.raises(DataError, match="'a dog' asks for reward 'sharpness'") as error:
        found.wanted(AXES)
    assert "vq, mq, ta" in error.value.hint


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("a cat", "is no prompt record"),
        ('{"text": "a cat"}', "is no prompt record"),
        ('["a cat"]', "is no prompt record"),
        ('{"prompt": ""}', "is no prompt record"),
        ('{"prompt": 3}', "is no prompt record"),
        ('{"prompt": "a cat", "rewards": "ta"}', "is no prompt record"),
        ('{"prompt": "a cat", "rewards": null}', "is no prompt record"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path: Path, line: str, what: str) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl:3 " + what) as error:
        read_prompts(write(tmp_path, '{"prompt": "a cow"}\n\n' + line, "p.jsonl"))
    assert '{"prompt": "..."' in error.value.hint


def test_files_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(write(tmp_path, "\n  \n"))
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Katze läuft".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(latin)


def test_noise_is_named_by_the_prompt_not_by_its_place() -> None:
    first, second = PromptSet(("a", "b", "c"), ((),) * 3), PromptSet(("c", "a"), ((),) * 2)
    assert first.ids == [rng.key("prompt:" + prompt) for prompt in "abc"]
    assert second.ids == [first.ids[2], first.ids[0]] and len(set(first.ids)) == 3


class Counting:
    """Loads a real encoder and counts how often."""

    def __init__(self) -> None:
        self.loads = 0

    def __call__(self) -> SeededTextEncoder:
        self.loads += 1
        return SeededTextEncoder(SeededTextConfig(width=8, max_tokens=5))


def test_encoded_once_and_again_when_anything_changes(tmp_path: Path) -> None:
    load, path = Counting(), tmp_path / "text.safetensors"
    text = encode_prompts(load, ["a cat", "a red dog"], "blurry", path)
    encoder = load()
    assert text.shape == (3, 5, 8)
    for row, prompt in zip(text, ["a cat", "a red dog", "blurry"], strict=True):
        (expected,) = encoder.encode([prompt])
        assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()
    assert torch.equal(encode_prompts(load, ["a cat", "a red dog"], "blurry", path), text) and load.loads == 2
    encode_prompts(load, ["a cat", "a red dog"], "bad", path)
    encode_prompts(load, ["a red dog", "a cat"], "bad", path)
    found = encode_prompts(load, ["a red dog"], "bad", path)
    assert load.loads == 5 and found.shape == (2, 5, 8) and math.isfinite(found.sum())
