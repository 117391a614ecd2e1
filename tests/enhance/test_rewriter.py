"""A rewriter at work: what it answers, what it keeps, and that a user's prompt is never lost."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_enhance import REQUESTS, WORDS, make_taught_model

from reelforge.engine.core.errors import CheckpointError, ConfigError, StorageError
from reelforge.engine.enhance import rewriter as module
from reelforge.engine.enhance.completions import Completion, complete
from reelforge.engine.enhance.dialogue import SYSTEM, Dialogue, DialogueConfig
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.rewriter import Enhanced, Rewriter, RewriterConfig, load_rewriter, save_rewriter

DIALOGUE = DialogueConfig(**WORDS)


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> LanguageModel:
    """Answers in form; not to be changed."""
    return LanguageModel.load(make_taught_model(tmp_path_factory.mktemp("taught") / "model"))


@pytest.fixture
def make_rewriter(language) -> Callable[..., Rewriter]:
    """A rewriter on the untrained model, for scripted answers."""

    def make(dialogue: DialogueConfig = DIALOGUE, cache: Path | None = None, **settings: object) -> Rewriter:
        return Rewriter(language, Dialogue(dialogue, language.tokenizer), RewriterConfig(**settings), cache=cache)

    return make


@pytest.fixture
def say(monkeypatch, language) -> Callable[..., list[list[str]]]:
    """Lets the model answer by a table, in form unless told otherwise; returns the batches that it was asked.

    ``say({"a cat": "a cat sleeps"}, finished=True, raw=False)``; a request that is not in the table is not expected.
    """

    def use(table: dict[str, str], finished: bool = True, raw: bool = False) -> list[list[str]]:
        dialogue, batches = Dialogue(DIALOGUE, language.tokenizer), []
        asked = {tuple(dialogue.ask(request)): request for request in table}

        def answer(language, prompts: Sequence[list[int]], *_: object) -> list[Completion]:
            batches.append([asked[tuple(prompt)] for prompt in prompts])
            return [completion(table[request]) for request in batches[-1]]

        def completion(text: str) -> Completion:
            ids = dialogue.encode(text) if raw else dialogue.answer(text, "open")
            ids += [language.ends[0]] if finished else []
            return Completion(tuple(ids), torch.zeros(len(ids)), finished)

        monkeypatch.setattr(module, "complete", answer)
        return batches

    return use


@pytest.fixture
def mute(monkeypatch) -> Callable[[], None]:
    """From here on, asking the model is an error."""

    def refuse(*_: object) -> list[Completion]:
        raise AssertionError("the language model was asked")

    return lambda: monkeypatch.setattr(module, "complete", refuse)


# --- real answers ---


def test_a_taught_model_rewrites(taught) -> None:
    """All in form, none lost, in order; greedy, so twice the same whatever the batches."""
    found = Rewriter(taught, Dialogue(DIALOGUE, taught.tokenizer), RewriterConfig(batch_size=2))(REQUESTS)
    assert [each.request for each in found] == REQUESTS
    assert sum(not each.kept for each in found) >= 3
    assert all(each.prompt == each.request if each.kept else len(each.prompt) > 3 for each in found)
    whole = Rewriter(taught, Dialogue(DIALOGUE, taught.tokenizer), RewriterConfig(batch_size=16))(REQUESTS[::-1])
    assert whole[::-1] == found


def test_above_temperature_zero_words_are_a_function_of_seed_and_request(taught) -> None:
    def answer(seed: int, requests: Sequence[str], batch_size: int) -> list[Enhanced]:
        settings = RewriterConfig(temperature=0.7, seed=seed, batch_size=batch_size)
        return Rewriter(taught, Dialogue(DIALOGUE, taught.tokenizer), settings)(requests)

    found = answer(0, REQUESTS, 16)
    assert answer(0, REQUESTS[::-1], 2)[::-1] == found
    assert answer(1, REQUESTS, 16) != found


def test_an_untrained_model_leaves_the_users_prompts(language) -> None:
    found = Rewriter(language, Dialogue(DIALOGUE, language.tokenizer), RewriterConfig())(REQUESTS)
    assert [each.prompt for each in found] == REQUESTS
    assert {each.kept for each in found} <= {"the answer has more than 40 tokens", "the answer is not in form"}


def test_time_that_is_up_leaves_the_users_prompts(taught) -> None:
    slow = RewriterConfig(timeout_s=1e-6)
    assert Rewriter(taught, Dialogue(DIALOGUE, taught.tokenizer), slow)(["a red ball"]) == [
        Enhanced("a red ball", "a red ball", "the answer took too long")
    ]


# --- one at a time, together, in order ---


def test_every_request_is_asked_once_and_answered_in_its_place(make_rewriter, say) -> None:
    batches = say({"a": "A is here", "b": "B is here", "c": "C is here"})
    found = make_rewriter(batch_size=2)(["b", "a", "b", "", "c", "a"])
    assert [each.prompt for each in found] == ["B is here", "A is here", "B is here", "", "C is here", "A is here"]
    assert [each.request for each in found] == ["b", "a", "b", "", "c", "a"]
    assert batches == [["b", "a"], ["c"]]


def test_words_are_drawn_by_request_and_seed(make_rewriter, say, monkeypatch) -> None:
    """The model sees a request's visible words, so that is what names its noise; greedy needs none."""
    say({"a": "A is here", "b": "B is here"})
    drawn, answer = [], module.complete
    monkeypatch.setattr(module, "complete", lambda *args: (drawn.append(args[3]), answer(*args))[1])
    make_rewriter(temperature=0.5)(["a", "b"])
    make_rewriter(temperature=0.5)([" b\u200b", "a"])
    make_rewriter(temperature=0.5, seed=1)(["a", "b"])
    make_rewriter()(["a"])
    assert drawn[0] == drawn[1][::-1] and len({*drawn[0], *drawn[2]}) == 4
    assert drawn[3] is None


def test_no_requests_are_no_work(make_rewriter, mute) -> None:
    mute()
    assert make_rewriter()([]) == []


# --- what is not put to the model ---


@pytest.mark.parametrize(
    "request_, reason",
    [
        ("", "the prompt is empty"),
        (" \n\t", "the prompt is empty"),
        ("\u200b\x00\u202e", "the prompt is empty"),
        ("<|end|></think>", "the prompt is empty"),
        ("word " * 10_000, "the prompt is complete with 10000 words"),
        ("灯" * 10_000, "the prompt is complete with 10000 words"),
        ("a" * 10_000, "and the language model has room for 256"),
        ("?" * 10_000, "and the language model has room for 256"),
    ],
)
def test_requests_that_are_used_as_they_are(make_rewriter, mute, request_: str, reason: str) -> None:
    mute()
    (found,) = make_rewriter()([request_])
    assert found.prompt == found.request == request_
    assert found.kept.endswith(reason)


@pytest.mark.parametrize(
    "request_",
    [
        "красный мяч катится",
        "赤い球が転がる",
        "می\u200cرود",
        "👩\u200d🚀",
        "half \ud800 a pair",
        "a\x00b",
        "</answer> a <|end|>",
    ],
)
def test_any_text_can_be_asked(make_rewriter, request_: str, tmp_path) -> None:
    """With a real, if senseless, answer, and at a temperature; then from the cache."""
    first, again = (make_rewriter(cache=tmp_path / "cache.jsonl", temperature=1.0) for _ in range(2))
    (found,) = first([request_])
    assert found.request == request_ and (found.prompt == request_) == bool(found.kept)
    first._keep(first._key(request_), request_, "a prompt")
    again = make_rewriter(cache=tmp_path / "cache.jsonl", temperature=1.0)
    assert again([request_]) == [Enhanced(request_, "a prompt")]


# --- answers that are not used ---


@pytest.mark.parametrize(
    "answer, finished, reason",
    [
        ("I cannot help with that.", True, "the answer is not in form"),
        ("x</think> <answer></answer>", True, "the answer is not in form"),
        ("x</think> <answer>a</answer> or so", True, "the answer is not in form"),
        ("x</think> <answer>a</answer>", False, "the answer took too long"),
        ("x</think> <answer>" + "a !?" * 40, False, "the answer has more than"),
        ("", True, "the answer is not in form"),
    ],
)
def test_the_users_prompt_stays_with_the_reason(make_rewriter, say, answer, finished, reason) -> None:
    say({"a cat": answer}, finished, raw=True)
    (found,) = make_rewriter()(["a cat"])
    assert found.prompt == "a cat" and found.kept.startswith(reason)


def test_a_prompt_that_the_generator_has_no_room_for_is_not_used(make_rewriter, say) -> None:
    say({"a cat": "a cat sleeps in the sun", "a dog": "a dog runs"})
    rewriter = make_rewriter()
    rewriter.fits = lambda prompt: len(prompt.split()) <= 4
    assert rewriter(["a cat", "a dog"]) == [
        Enhanced("a cat", "a cat", "the answer is too long for the text encoder"),
        Enhanced("a dog", "a dog runs"),
    ]


def test_one_bad_answer_spoils_no_other(make_rewriter, say) -> None:
    say({"a": "x</think> <answer>A is here</answer>", "b": "no", "c": "y</think> <answer>C is here</answer>"}, raw=True)
    assert [each.prompt for each in make_rewriter()(["a", "b", "c"])] == ["A is here", "b", "C is here"]


# --- the cache ---


def test_answers_are_remembered_and_reasons_are_not(make_rewriter, say, mute) -> None:
    """A failure may have been the clock's: it is tried again."""
    say({"a": "A is here"})
    rewriter = make_rewriter()
    first = rewriter(["a"])
    batches = say({"b": "no"}, raw=True)
    assert rewriter(["a", "b"])[0] == first[0] and rewriter(["b"])[0].kept
    assert batches == [["b"], ["b"]]
    mute()
    assert rewriter(["a"]) == first


def test_a_later_process_does_not_ask_again(make_rewriter, say, mute, tmp_path) -> None:
    say({"a": "A is here", "灯": "灯がともる"})
    cache = tmp_path / "deep" / "cache.jsonl"
    first = make_rewriter(cache=cache)(["a", "灯"])
    mute()
    assert make_rewriter(cache=cache, timeout_s=99.0, batch_size=1)(["灯", "a"]) == first[::-1]
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert [(line["request"], line["prompt"]) for line in lines] == [("a", "A is here"), ("灯", "灯がともる")]


def test_other_settings_or_another_model_have_other_answers(make_rewriter, say, make, tmp_path) -> None:
    cache, table = tmp_path / "cache.jsonl", {"a": "A is here"}
    say(table)
    known = make_rewriter(cache=cache)
    known(["a"])
    others = [
        make_rewriter(cache=cache, temperature=0.3),
        make_rewriter(cache=cache, seed=1),
        make_rewriter(dataclasses.replace(DIALOGUE, max_new_tokens=41), cache),
        make_rewriter(dataclasses.replace(DIALOGUE, system="Be brief."), cache),
    ]
    other_model = make(seed=9)
    others.append(Rewriter(other_model, Dialogue(DIALOGUE, other_model.tokenizer), RewriterConfig(), cache=cache))
    keys = {rewriter._key("a") for rewriter in (known, *others)}
    assert len(keys) == len(others) + 1 and not any(rewriter._known.get(rewriter._key("a")) for rewriter in others)


def test_a_remembered_prompt_must_fit_the_generator_of_today(make_rewriter, say, mute, tmp_path) -> None:
    """The cache outlives it; its next text encoder may hold less."""
    say({"a cat": "a cat sleeps in the sun"})
    cache = tmp_path / "cache.jsonl"
    first = make_rewriter(cache=cache)
    first.fits = lambda prompt: False
    assert first(["a cat"])[0].prompt == "a cat"
    mute()
    roomy, narrow = make_rewriter(cache=cache), make_rewriter(cache=cache)
    narrow.fits = lambda prompt: len(prompt) < 10
    assert roomy(["a cat"]) == [Enhanced("a cat", "a cat sleeps in the sun")]
    assert narrow(["a cat"]) == [Enhanced("a cat", "a cat", "the answer is too long for the text encoder")]


def test_lines_that_are_torn_or_of_another_file_are_passed_over(make_rewriter, say, mute, tmp_path) -> None:
    cache = tmp_path / "cache.jsonl"
    say({"a": "A is here", "b": "B is here"})
    make_rewriter(cache=cache)(["a", "b"])
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join([lines[0], '{"step": 3}', "[1]", "\x00\x00", lines[1][:-20]]))
    batches = say({"b": "B is here"})
    rewriter = make_rewriter(cache=cache)
    assert [each.prompt for each in rewriter(["a", "b"])] == ["A is here", "B is here"]
    assert batches == [["b"]], "only the torn line is asked again"
    mute()
    assert [each.prompt for each in make_rewriter(cache=cache)(["a", "b"])] == ["A is here", "B is here"]


def test_two_writers_lose_nothing(make_rewriter, say, mute, tmp_path) -> None:
    """Each appends whole lines, also to a file that the other has opened before; a doubled answer does no harm."""
    cache = tmp_path / "cache.jsonl"
    first, second = make_rewriter(cache=cache), make_rewriter(cache=cache)
    names = [f"request {place}" for place in range(20)]
    say({name: f"{name} in full" for name in names})
    for place, name in enumerate(names):
        (first, second)[place % 2]([name])
    first(names[1:2])
    mute()
    assert [each.prompt for each in make_rewriter(cache=cache)(names)] == [f"{name} in full" for name in names]
    assert len(cache.read_text().splitlines()) == 21


# --- folders ---


def test_a_saved_rewriter_answers_the_same(taught, tmp_path) -> None:
    save_rewriter(taught, DIALOGUE, tmp_path / "rewriter")
    loaded = load_rewriter(tmp_path / "rewriter", cache=tmp_path / "cache.jsonl")
    assert loaded.dialogue.config == DIALOGUE and loaded.config == RewriterConfig()
    assert loaded(REQUESTS) == Rewriter(taught, Dialogue(DIALOGUE, taught.tokenizer), RewriterConfig())(REQUESTS)
    assert (tmp_path / "cache.jsonl").read_text().count("\n") == sum(not each.kept for each in loaded(REQUESTS))
    assert not list(tmp_path.glob(".*")), "nothing is left of the staging"


def test_a_rewriter_takes_the_place_of_an_older_one_whole_or_not_at_all(taught, tmp_path, monkeypatch) -> None:
    save_rewriter(taught, DIALOGUE, tmp_path / "rewriter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "rewriter").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(module, "write_json", full)
        save_rewriter(taught, DialogueConfig(), tmp_path / "rewriter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "rewriter").iterdir()} == before
    save_rewriter(taught, dataclasses.replace(DIALOGUE, turn="{request}!"), tmp_path / "rewriter")
    assert load_rewriter(tmp_path / "rewriter").dialogue.config.turn == "{request}!"


def test_any_instruction_tuned_model_will_do(folder) -> None:
    """Without a file of its own it is asked in the default words."""
    rewriter = load_rewriter(folder)
    assert rewriter.dialogue.config == DialogueConfig()
    assert SYSTEM in rewriter.language.tokenizer.decode(rewriter.dialogue.ask("a"))


@pytest.mark.parametrize(
    "text, error, sentence",
    [
        ('{"system": "a', CheckpointError, "rewriter.json is not JSON"),
        ("[]", CheckpointError, "rewriter.json holds a list"),
        ('{"sytem": ""}', ConfigError, r"Unknown key '.*rewriter.json: sytem'.*Did you mean 'system'"),
        ('{"max_new_tokens": "many"}', ConfigError, "max_new_tokens' is 'many'"),
        ('{"turn": "no place"}', ConfigError, "turn is 'no place'"),
        ('{"prefill": "Well, "}', ConfigError, "prefill is 'Well, '"),
    ],
)
def test_a_damaged_file_of_words_is_named(folder, tmp_path, text, error, sentence) -> None:
    shutil.copytree(folder, tmp_path / "rewriter")
    (tmp_path / "rewriter" / "rewriter.json").write_text(text)
    with pytest.raises(error, match=sentence):
        load_rewriter(tmp_path / "rewriter")


@pytest.mark.parametrize("setting", [{"temperature": -0.1}, {"timeout_s": 0.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        RewriterConfig(**setting)


def test_the_default_way_is_greedy(taught) -> None:
    """As the likeliest words read by hand."""
    dialogue = Dialogue(DIALOGUE, taught.tokenizer)
    answers = complete(taught, [dialogue.ask(request) for request in REQUESTS], DIALOGUE.max_new_tokens)
    texts = [dialogue.read(answer.ids) if answer.finished else None for answer in answers]
    found = Rewriter(taught, dialogue, RewriterConfig())(REQUESTS)
    assert [each.prompt for each in found] == [text or request for text, request in zip(texts, REQUESTS, strict=True)]
