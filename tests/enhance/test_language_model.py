"""The language model's folder: made, saved, loaded, refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, UMT5Config, UMT5EncoderModel

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.enhance.completions import complete
from reelforge.engine.enhance.dialogue import TAGS, Dialogue, DialogueConfig
from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig

CONFIG, CORPUS = TinyLanguageModelConfig(64, 1, 320, 64), ["a red ball", "two dogs", "b"] * 50
MAKE = f"""
import sys
from pathlib import Path
from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig
made = LanguageModel.create({CONFIG}, {CORPUS}, 7, Path(sys.argv[1]))
LanguageModel.load(made.folder).save(Path(sys.argv[1] + "-saved"))
"""


def weights(language: LanguageModel) -> dict[str, torch.Tensor]:
    return language.model.state_dict()


def logits(language: LanguageModel) -> torch.Tensor:
    ids = torch.tensor([language.tokenizer("a red ball rolls", add_special_tokens=False).input_ids])
    with torch.no_grad():
        return language.model(ids).logits


# --- made ---


def test_weights_are_a_function_of_the_seed(make) -> None:
    state = torch.get_rng_state()
    first = make(seed=3)
    torch.rand(100)
    again, other = make(seed=3), make(seed=4)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert not torch.equal(logits(first), logits(other))
    torch.set_rng_state(state)


def test_making_one_leaves_torchs_global_state_alone(make) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(before, torch.get_rng_state())


def test_another_process_makes_the_same_files_and_draws_no_bars(tmp_path) -> None:
    """Tokenizer and weights, byte by byte, whatever the hash seed and the threads; neither making, saving nor loading
    writes on the screen."""
    here, there = tmp_path / "here", tmp_path / "there"
    LanguageModel.create(CONFIG, CORPUS, 7, here)
    settings = {"PYTHONHASHSEED": "5", "RAYON_NUM_THREADS": "4", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MAKE, there], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
    names = sorted(path.name for path in here.iterdir())
    assert names == sorted(path.name for path in there.iterdir())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)


def test_the_tokenizer_keeps_any_text_and_holds_each_mark_as_one_token(language) -> None:
    tokenizer = language.tokenizer
    for text in ("A red  ball,\n\tx² 1.5!", "赤いボール 👩\u200d🚀", "\x00\ufffd \u202e", "a" * 500):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    for mark in (*TAGS, "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|pad|>"):
        assert len(tokenizer(mark, add_special_tokens=False).input_ids) == 1
    assert language.ends == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    assert language.room == 256
    assert len(tokenizer) == language.model.config.vocab_size <= 320


# --- saved and loaded ---


def test_a_saved_one_says_the_same(make, tmp_path) -> None:
    made = make()
    made.save(tmp_path / "copy")
    loaded = LanguageModel.load(tmp_path / "copy")
    assert torch.equal(logits(loaded), logits(made))
    assert loaded.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    prompt = [Dialogue(DialogueConfig(system=""), one.tokenizer).ask("a red ball") for one in (made, loaded)]
    assert prompt[0] == prompt[1]
    assert complete(made, prompt, 20, [1, 2])[0].ids == complete(loaded, prompt, 20, [1, 2])[0].ids
    assert (loaded.ends, loaded.room) == (made.ends, made.room)


def test_it_is_plain_transformers(make, tmp_path) -> None:
    """Model, tokenizer, chat template and how to end: what a folder held before comes out of a save unchanged."""
    made = make()
    path = made.folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_k": 20, "do_sample": True}))
    LanguageModel.load(made.folder).save(tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy", local_files_only=True)
    how = model.generation_config
    assert (how.temperature, how.top_k, how.do_sample) == (0.6, 20, True)
    assert how.eos_token_id == tokenizer.eos_token_id == made.ends[0]
    turn = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        == "<|user|>hi<|end|><|assistant|>"
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.tensor([[5, 6, 7]])).logits, made.model(torch.tensor([[5, 6, 7]])).logits)


def test_precision_is_chosen_on_loading(folder) -> None:
    assert LanguageModel.load(folder, torch.bfloat16).model.dtype == torch.bfloat16
    assert LanguageModel.load(folder).model.dtype == torch.float32


def test_the_fingerprint_is_of_the_files(make, tmp_path) -> None:
    first, other = make(seed=1), make(seed=2)
    shutil.copytree(first.folder, tmp_path / "copy")
    assert LanguageModel.load(tmp_path / "copy").fingerprint == first.fingerprint != other.fingerprint
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert LanguageModel.load(tmp_path / "copy").fingerprint != first.fingerprint


def test_a_frozen_copy_does_not_follow(make) -> None:
    made = make()
    copied, before = made.frozen_copy(), logits(made)
    with torch.no_grad():
        made.model.model.norm.weight.mul_(2)
    assert not any(weight.requires_grad for weight in copied.parameters())
    assert torch.equal(copied(torch.tensor([[5]])).logits, copied(torch.tensor([[5]])).logits)
    assert not torch.equal(logits(made), before)
    made.model = copied
    assert torch.equal(logits(made), before)


# --- ends and padding ---


@pytest.mark.parametrize(
    "own, tokenizers, ends",
    [
        (0, "<|end|>", (0,)),
        ([0, 3], "<|end|>", (0, 3)),
        ([3, 4], "<|end|>", (0, 3, 4)),  # an instruction-tuned model ends a turn with its tokenizer's mark
        (None, "<|end|>", (0,)),
        ([], "<|end|>", (0,)),
        (3, None, (3,)),
    ],
)
def test_both_the_tokenizers_end_and_the_models_count(folder, tmp_path, own, tokenizers, ends) -> None:
    shutil.copytree(folder, tmp_path / "model")
    edit(tmp_path / "model" / "generation_config.json", eos_token_id=own)
    edit(tmp_path / "model" / "config.json", eos_token_id=own)
    edit(tmp_path / "model" / "tokenizer_config.json", eos_token=tokenizers)
    assert LanguageModel.load(tmp_path / "model").ends == ends


@pytest.mark.parametrize("pad", [None, "<|new|>"])
def test_a_pad_token_that_is_missing_or_unknown_to_the_model_does_not_matter(language, tmp_path, pad) -> None:
    """Rows of different length are answered as with one."""
    shutil.copytree(language.folder, tmp_path / "model")
    edit(tmp_path / "model" / "tokenizer_config.json", pad_token=pad)
    edit(tmp_path / "model" / "config.json", pad_token_id=None)
    bare = LanguageModel.load(tmp_path / "model")
    assert bare.tokenizer.pad_token_id in (None, len(language.tokenizer))
    prompts = [[5, 6, 7, 8, 9], [10]]
    answers = [[a.ids for a in complete(one, prompts, 12, [1, 2])] for one in (bare, language)]
    assert answers[0] == answers[1]


# --- refused ---


def edit(path: Path, **values: object) -> None:
    """Keys of a JSON file, None taking one out."""
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (table | values).items() if value is not None}))


def no_end(folder: Path) -> None:
    for file, key in (
        ("generation_config", "eos_token_id"),
        ("config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ):
        edit(folder / f"{file}.json", **{key: None})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(
        {name: value for name, value in load_file(path).items() if "model.norm" not in name}, path, {"format": "pt"}
    )


FAULTS = {
    "no end": (no_end, "no end-of-text token"),
    "pickle": (pickled, "does not load"),
    "a weight is missing": (without_a_weight, r"has no weights \['model.norm.weight'\]"),
    "weights are cut": (lambda f: (f / "model.safetensors").write_bytes(bytes(8)), "does not load"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "does not load"),
    "another width": (lambda f: edit(f / "config.json", hidden_size=96), "does not load"),
    "another depth": (lambda f: edit(f / "config.json", num_hidden_layers=5), "does not load"),
    "a word for a width": (lambda f: edit(f / "config.json", hidden_size="wide"), "does not load"),
    "unknown model": (lambda f: edit(f / "config.json", model_type="own"), "does not load"),
    "no config": (lambda f: (f / "config.json").unlink(), "does not load"),
    "config is cut": (lambda f: (f / "config.json").write_text('{"model'), "does not load"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        r"does not load \(it has no tokenizer\)",
    ),
    "tokenizer is cut": (lambda f: (f / "tokenizer.json").write_text('{"ver'), "does not load"),
    "tokenizer of another kind": (lambda f: (f / "tokenizer.json").write_text("{}"), "does not load"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_none_is_refused(folder, tmp_path, fault: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spoil, sentence = FAULTS[fault]
    spoil(tmp_path / "model")
    with pytest.raises(ConfigError, match=sentence) as caught:
        LanguageModel.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_code_in_a_folder_does_not_run(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    edit(tmp_path / "model" / "config.json", model_type="own", auto_map={"AutoConfig": "own.C"})
    with pytest.raises(ConfigError, match="does not load"):
        LanguageModel.load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_no_folder_at_all(tmp_path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match="does not load.*Name a local folder"):
            LanguageModel.load(place)


def test_a_text_encoder_is_no_language_model(folder, tmp_path) -> None:
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, tmp_path / "encoder")
    with pytest.raises(ConfigError, match="does not load.*causal language model"):
        LanguageModel.load(tmp_path / "encoder")
