"""Answers token by token: drawn by their keys alone, and as likely as the training forward says."""

import copy
import json
import shutil
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from reelforge.engine.core import rng
from reelforge.engine.enhance.completions import _Chosen, complete, pad_left, pad_right, token_logp
from reelforge.engine.enhance.language_model import LanguageModel

KEYS = [rng.key("completions", place) for place in range(6)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(language) -> list[list[int]]:
    """Of 2 to 60 tokens."""
    long = "a red ball rolls slowly to the left over a wooden floor at sunset, " * 2
    texts = ["a", "two dogs run", long, "灯", "?!", "b"]
    return [language.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.fixture(scope="module")
def lively(language) -> LanguageModel:
    """The tiny model with weights ten times as large: tokens differ in how likely they are, and the past matters."""
    model = copy.deepcopy(language.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight *= 10 if "embed" not in name else 5
    return LanguageModel(model, language.tokenizer, language.folder)


def by_hand(language: LanguageModel, prompt: list[int], answer: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Log-probability of each token of an answer, one unpadded forward per token."""
    found = []
    for place, token in enumerate(answer):
        logits = language.model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1]
        found.append(F.log_softmax(logits.double() / temperature, -1)[token])
    return torch.stack(found)


# --- log-probabilities ---


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_cached_log_probabilities_are_those_of_a_full_forward(lively, prompts, dtype, bound, temperature) -> None:
    """Prompts of different length are padded on the left, answers on the right. All is told in fp32 in the end."""
    language = LanguageModel(copy.deepcopy(lively.model).to(dtype), lively.tokenizer, lively.folder)
    answers = complete(language, prompts, 24, KEYS, temperature)
    with torch.no_grad():
        full, there = token_logp(language.model, prompts, [answer.ids for answer in answers], language.pad, temperature)
        for row, answer in enumerate(answers):
            expected = by_hand(language, prompts[row], answer.ids, temperature)
            assert answer.logp.dtype == torch.float32 and there[row].sum() == len(answer.ids)
            assert (answer.logp - expected).abs().max() <= bound
            assert (full[row, there[row]] - expected).abs().max() <= bound
            assert not full[row, ~there[row]].any()
    assert max(answer.logp.max() - answer.logp.min() for answer in answers) > 3, "the model must have a preference"


def test_so_they_are_where_positions_are_learned(language, prompts) -> None:
    """GPT-2 counts them from the first token; Qwen's rotations would hide a count that begins in the padding."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(language.tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(100)
    gpt2 = LanguageModel(model, language.tokenizer, language.folder)
    answers = complete(gpt2, prompts, 16, KEYS)
    with torch.no_grad():
        full, there = token_logp(model, prompts, [answer.ids for answer in answers], gpt2.pad)
        for row, answer in enumerate(answers):
            expected = by_hand(gpt2, prompts[row], answer.ids, 1.0)
            assert (answer.logp - expected).abs().max() <= 1e-5
            assert (full[row, there[row]] - expected).abs().max() <= 1e-5


def test_gradients_are_those_of_rows_alone(lively, prompts) -> None:
    """Neither padding nor a neighbour leaks into them; both are of the same 3 answers."""
    model = copy.deepcopy(lively.model).double()
    answers = [[5, 9, 14, 30], [7], [40, 41]]
    found = []
    for batches in ([(prompts[:3], answers)], [([p], [a]) for p, a in zip(prompts[:3], answers, strict=True)]):
        model.zero_grad()
        for asked, given in batches:
            token_logp(model, asked, given, lively.pad)[0].sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        scale = max(float(found[1][name].abs().max()), 1e-9)
        assert (gradient - found[1][name]).abs().max() <= 1e-5 * scale, name


def test_padding_may_hold_any_token(lively, prompts) -> None:
    answers = [[5, 9, 14], [7]]
    with torch.no_grad():
        found = [token_logp(lively.model, prompts[1:3], answers, pad)[0] for pad in (0, 1, 77)]
    assert (found[0] - found[1]).abs().max() < 2e-5 and (found[0] - found[2]).abs().max() < 2e-5
    others = copy.copy(lively)
    others.pad = 77
    assert ids_of(complete(others, prompts, 12, KEYS)) == ids_of(complete(lively, prompts, 12, KEYS))


def test_padding_by_hand() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], 9, CPU)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, there = pad_right([[1, 2, 3], [4]], 9, CPU)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and there.tolist() == [[True, True, True], [True, False, False]]


# --- sampling ---


def ids_of(answers: list) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


def test_an_answer_depends_on_its_prompt_and_key_alone(lively, prompts) -> None:
    """Not on its neighbours, their order, or the padding that they bring."""
    together = complete(lively, prompts, 16, KEYS)
    assert len(set(ids_of(together))) == len(prompts)
    alone = [complete(lively, [prompt], 16, [key])[0] for prompt, key in zip(prompts, KEYS, strict=True)]
    assert ids_of(alone) == ids_of(together)
    order = [4, 2, 0, 5]
    shuffled = complete(lively, [prompts[place] for place in order], 16, [KEYS[place] for place in order])
    assert ids_of(shuffled) == [together[place].ids for place in order]


def test_a_key_names_its_answer(lively, prompts) -> None:
    """The same prompt under the same key twice in a batch is answered twice alike; another key answers otherwise."""
    asked = [prompts[1]] * 3
    first, again, other = complete(lively, asked, 16, [KEYS[0], KEYS[0], KEYS[1]])
    assert first.ids == again.ids != other.ids


def test_more_room_only_continues_an_answer(lively, prompts) -> None:
    short, long = (complete(lively, prompts, room, KEYS) for room in (5, 15))
    assert [answer.ids[:5] for answer in long] == ids_of(short)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probability(temperature: float) -> None:
    """Chi-square over 20,000 draws from a fixed distribution of 12 tokens, rarest at 1 in 3,000 or so."""
    logits = torch.linspace(0, -4, 12)
    keys, draws = [rng.key("frequency", place) for place in range(20_000)], 20_000
    chosen = _Chosen(keys, temperature, start=3)
    scores = chosen(torch.zeros(draws, 3, dtype=torch.long), logits.expand(draws, 12))
    tokens = scores.argmax(-1)
    expected = np.exp(logits.double().numpy() / temperature)
    expected *= draws / expected.sum()
    assert stats.chisquare(np.bincount(tokens.numpy(), minlength=12), expected).pvalue > 1e-3
    assert torch.allclose(chosen.logp[0].double(), torch.from_numpy(np.log(expected / draws))[tokens], atol=1e-5)


def test_a_models_own_tokens_are_drawn_with_their_probability(lively, prompts) -> None:
    """The first token and, given the likeliest first, the second: places of one key are independent."""
    count, width, temperature = 3000, len(lively.tokenizer), 0.3
    with torch.no_grad():
        first = lively.model(torch.tensor([prompts[1]])).logits[0, -1].double()
        best = int(first.argmax())
        second = lively.model(torch.tensor([[*prompts[1], best]])).logits[0, -1].double()
    answers = complete(lively, [prompts[1]] * count, 2, [rng.key("pair", place) for place in range(count)], temperature)
    tokens = [answer.ids for answer in answers]
    for logits, drawn in ((first, [ids[0] for ids in tokens]), (second, [ids[1] for ids in tokens if ids[0] == best])):
        assert len(drawn) > 500
        expected = torch.softmax(logits / temperature, -1).numpy() * len(drawn)
        seen, often = np.bincount(drawn, minlength=width), expected >= 5
        groups = [np.append(values[often], values[~often].sum()) for values in (seen, expected)]
        assert stats.chisquare(*groups).pvalue > 1e-3


def test_scores_leave_one_token_to_choose() -> None:
    """Whatever transformers does after: greedy takes the token that was drawn."""
    chosen = _Chosen(KEYS[:2], 1.0, start=0)
    scores = chosen(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 50))
    assert torch.isinf(scores).sum() == 98 and (scores == 0).sum() == 2


def test_without_keys_the_likeliest_words_are_taken_as_transformers_does(lively, prompts) -> None:
    answers = complete(lively, prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=lively.ends[0], pad_token_id=1)
        ids = lively.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=greedy
        )
        assert answer.ids == tuple(ids[0, len(prompt) :].tolist())


# --- ends ---


@pytest.fixture
def scripted(monkeypatch, language):
    """Makes the model say given ids next, whatever was asked: ``scripted([[5, 0, 7], [6, 6, 0]])``."""

    def use(rows: list[list[int]]) -> LanguageModel:
        left = [list(row) for row in rows]

        def choose(self, ids, logits):
            token = torch.tensor([[row.pop(0)] for row in left])
            self.logp.append(-0.5 * torch.ones(len(left)))
            return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

        monkeypatch.setattr(_Chosen, "__call__", choose)
        return language

    return use


def test_an_answer_stops_at_its_first_end_mark(scripted, prompts) -> None:
    """The first row ends at once, the second within, the third never; what follows an end mark is dropped."""
    end = 0
    language = scripted([[end, 5, end], [7, end, 9], [6, 6, 6]])
    assert language.ends == (end,)
    found = complete(language, prompts[:3], 3)
    assert ids_of(found) == [(end,), (7, end), (6, 6, 6)]
    assert [answer.finished for answer in found] == [True, True, False]
    assert [len(answer.logp) for answer in found] == [1, 2, 3]


def test_answers_end_together_with_the_last(scripted, prompts) -> None:
    """No token is computed after every row has ended: the script holds no third."""
    assert ids_of(complete(scripted([[0, 5], [7, 0]]), prompts[:2], 20)) == [(0,), (7, 0)]


def test_every_end_mark_of_the_model_counts(scripted, prompts) -> None:
    language = copy.copy(scripted([[5, 3, 5, 5], [5, 5, 0, 5], [5, 1, 5, 0]]))
    language.ends = (0, 3)
    found = complete(language, prompts[:3], 4)
    assert ids_of(found) == [(5, 3), (5, 5, 0), (5, 1, 5, 0)]
    assert all(answer.finished for answer in found)


def test_time_that_is_up_ends_every_answer(lively, prompts, monkeypatch) -> None:
    """After a token, as there is no half a token; the log-probabilities are there for those that came."""
    real = lively.model.forward
    monkeypatch.setattr(lively.model, "forward", lambda *args, **kw: (time.sleep(0.05), real(*args, **kw))[1])
    start = time.monotonic()
    found = complete(lively, prompts, 150, KEYS, max_time_s=0.2)
    assert time.monotonic() - start < 3
    assert all(1 <= len(answer.ids) <= 5 and len(answer.logp) == len(answer.ids) for answer in found)
    assert ids_of(complete(lively, prompts[:2], 150, KEYS[:2], max_time_s=1e-9)) == [a.ids[:1] for a in found[:2]]


# --- a folder's own habits ---

HABITS = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_length": 300,
    "min_new_tokens": 10,
    "max_length": 30,
    "num_beams": 3,
    "num_return_sequences": 2,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "suppress_tokens": list(range(20, 200)),
    "begin_suppress_tokens": list(range(20, 200)),
    "bad_words_ids": [[30]],
    "sequence_bias": [[[31], 9.0]],
    "stop_strings": ["e"],
    "max_time": 1e-3,
    "use_cache": False,
}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_folders_habits_do_not_colour_samples(language, prompts, tmp_path, file: str) -> None:
    shutil.copytree(language.folder, tmp_path / "habits")
    path = tmp_path / "habits" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | HABITS))
    habits = LanguageModel.load(tmp_path / "habits")
    assert ids_of(complete(habits, prompts, 12, KEYS)) == ids_of(complete(language, prompts, 12, KEYS))
    assert ids_of(complete(habits, prompts, 12)) == ids_of(complete(language, prompts, 12))
