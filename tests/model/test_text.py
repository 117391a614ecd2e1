"""Text encoders: the seeded one against its formula, UMT5 against diffusers' pipeline."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.core import rng
from reelforge.engine.core.errors import CheckpointError, ConfigError
from reelforge.engine.core.types import pad_text
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder, Umt5TextEncoder, clean_prompt

ENCODER = SeededTextEncoder(SeededTextConfig(width=64, max_tokens=16, seed=3))


def table(role: str, word: str) -> torch.Tensor:
    return rng.normal([rng.key(f"text.{role}.{word}", 3)], (64,))[0]


def test_token_is_a_mix_of_word_and_neighbours() -> None:
    red, circle, end = ENCODER.encode(["Red, CIRCLE!"])[0]
    near = pytest.approx
    mix = 0.5**0.5 * table("word", "red") + 0.5 * (table("previous", "</s>") + table("next", "circle"))
    assert red.tolist() == near(mix.tolist(), abs=1e-6)
    mix = 0.5**0.5 * table("word", "circle") + 0.5 * (table("previous", "red") + table("next", "</s>"))
    assert circle.tolist() == near(mix.tolist(), abs=1e-6)
    mix = 0.5**0.5 * table("word", "</s>") + 0.5 * (table("previous", "circle") + table("next", "</s>"))
    assert end.tolist() == near(mix.tolist(), abs=1e-6)


def test_colours_bind_to_their_nouns() -> None:
    one, other = ENCODER.encode(["a red circle on a blue background", "a blue circle on a red background"])
    assert one.shape == other.shape == (8, 64)
    circle, background = 2, 6
    for noun in (circle, background):
        distance = (one[noun] - other[noun]).square().mean().item()
        assert 0.25 < distance < 0.9  # two independent draws at weight 1/2 differ by 1/2 in mean square
    bags = [set(map(tuple, tokens.tolist())) for tokens in (one, other)]
    assert bags[0].isdisjoint(bags[1] - bags[0]) and bags[0] != bags[1]


def test_channels_have_unit_variance() -> None:
    tokens = torch.cat(ENCODER.encode([" ".join(f"word{i}{j}" for i in range(15)) for j in range(64)]))
    assert tokens.var().item() == pytest.approx(1, abs=0.03)
    assert tokens.mean().item() == pytest.approx(0, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_any_prompt_works_and_batching_changes_nothing(prompts: list[str]) -> None:
    together = ENCODER.encode(prompts)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(tokens, ENCODER.encode([prompt])[0])
        assert 1 <= len(tokens) <= 16 and tokens.shape[1] == 64 and tokens.isfinite().all()


def test_empty_prompt_is_one_end_token_and_long_ones_are_cut() -> None:
    assert ENCODER.encode([""])[0].shape == (1, 64)
    words = [f"w{i}" for i in range(40)]
    long, cut = ENCODER.encode([" ".join(words), " ".join(words[:15])])
    assert long.shape == (16, 64) and torch.equal(long, cut)


def test_fingerprint_follows_the_config() -> None:
    same = SeededTextEncoder(SeededTextConfig(64, 16, 3))
    other = SeededTextEncoder(SeededTextConfig(64, 16, 4))
    assert ENCODER.fingerprint == same.fingerprint != other.fingerprint
    assert not torch.equal(other.encode(["red"])[0], ENCODER.encode(["red"])[0])


def test_seeded_encoder_round_trips(tmp_path) -> None:
    ENCODER.save(tmp_path / "text_encoder")
    back = SeededTextEncoder.load(tmp_path / "text_encoder")
    assert back.config == ENCODER.config and back.fingerprint == ENCODER.fingerprint
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        SeededTextEncoder.load(tmp_path)


PROMPTS = ["a red &amp;amp; blue cat", "  dog\n runs ", "", "cat " * 600]


@pytest.fixture(scope="module")
def umt5_folder(tmp_path_factory):
    """A tiny UMT5 with a word-level tokenizer, in a pipeline's layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("umt5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog", "runs", "&"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(root / "tokenizer")
    config = UMT5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UMT5EncoderModel(config).save_pretrained(root / "text_encoder")
    return root


def test_umt5_equals_diffusers_pipeline(umt5_folder) -> None:
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder = Umt5TextEncoder.load(umt5_folder / "text_encoder", dtype=torch.float32)
    ours = encoder.encode(PROMPTS)
    assert [len(tokens) for tokens in ours] == [6, 3, 1, 512] and encoder.width == 32
    model = UMT5EncoderModel.from_pretrained(umt5_folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(umt5_folder / "tokenizer")
    pipeline = WanPipeline(tokenizer, model, vae=None, scheduler=None)
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512)
    torch.testing.assert_close(pad_text(ours, 512), theirs, atol=1e-5, rtol=0)


def test_umt5_does_not_depend_on_the_batch(umt5_folder) -> None:
    encoder = Umt5TextEncoder.load(umt5_folder / "text_encoder")
    together = encoder.encode(PROMPTS[:3])
    assert all(torch.equal(tokens, encoder.encode([p])[0]) for tokens, p in zip(together, PROMPTS, strict=False))
    assert all(tokens.dtype == torch.float32 for tokens in together)


def test_umt5_fingerprint_follows_weights_and_tokenizer(umt5_folder, tmp_path) -> None:
    encoder = Umt5TextEncoder.load(umt5_folder / "text_encoder", dtype=torch.float32)
    encoder.save(tmp_path / "text_encoder")
    first = Umt5TextEncoder.load(tmp_path / "text_encoder").fingerprint
    assert first == Umt5TextEncoder.load(tmp_path / "text_encoder").fingerprint
    encoder._model.shared.weight.data[0] += 1
    encoder.save(tmp_path / "text_encoder")
    second = Umt5TextEncoder.load(tmp_path / "text_encoder").fingerprint
    settings_file = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace('"<unk>"', '"<pad>"'))
    assert len({first, second, Umt5TextEncoder.load(tmp_path / "text_encoder").fingerprint}) == 3


def test_umt5_needs_both_folders(umt5_folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        Umt5TextEncoder.load(tmp_path / "text_encoder")


@pytest.mark.parametrize("text", ["  a \t b\n", "&lt;b&gt; &amp;amp;", "cafÃ©", "“quoted”", ""])
def test_cleaning_is_wans(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)
