"""generate_text: both forms of a model write the same text, piece by piece."""

import pytest
import torch

from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.hf.export import huggingface_config, write_tokenizer
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.inference.generate import generate_text
from tests.unit.hf.conftest import TEXTS, model_config, native_model

FIRST_PIECE = 260  # before it: special pieces and single bytes, of which an untrained model makes no text


@pytest.fixture(scope="module")
def forms(tmp_path_factory, tokenizer, tokenizer_path):
    """(model, tokenizer) in memory and in Hugging Face form; a model that writes whole pieces only."""
    from transformers import PreTrainedTokenizerFast

    native = native_model(model_config("full"))
    with torch.no_grad():
        native.lm_head.weight[:FIRST_PIECE] = 0
    model = LoopMemForCausalLM(huggingface_config(native.config, tokenizer, 64, "float32")).eval()
    model.load_state_dict(native.state_dict())
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tokenizer_path, TEXTS)
    return {"native": (native, tokenizer), "huggingface": (model, PreTrainedTokenizerFast.from_pretrained(folder))}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_loops": 1},
        {"num_loops": [1, 3]},
        {"exit_threshold": 0.7},
        {"exit_threshold": 0.5, "exit_rule": "confidence", "num_loops": [2, 3]},
        {"exit_threshold": 1, "num_loops": 2},
        {"temperature": 0.2},
        {"temperature": 1.5, "top_k": 5},
    ],
    ids=str,
)
def test_both_forms_write_the_same(forms, settings):
    texts = {name: generate_text(*form, "The quick", 24, seed=7, **settings) for name, form in forms.items()}
    assert texts["native"] == texts["huggingface"] and len(texts["native"]) > 24


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_pieces_join_to_the_text(forms, form):
    pieces = []
    text = generate_text(*forms[form], "It was", 12, temperature=1.0, seed=1, on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 6


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_seed(forms, form):
    def write(seed):
        return generate_text(*forms[form], "It was", 12, temperature=1.0, seed=seed)

    assert write(1) == write(1) != write(2)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_global_random_state_is_left_alone(forms, form):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generate_text(*forms[form], "It was", 4, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_empty_prompt_starts_a_document(forms, form):
    assert generate_text(*forms[form], "", 4)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_end_of_document_ends_it(tokenizer, forms, form):
    """A head that only ever predicts </s>, also after a prompt that spells it."""
    model, codec = forms[form]
    kept = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("a </s> b")])
        hidden = model.model(ids)[0][0, -1]
        model.lm_head.weight.zero_()[tokenizer.eos_id] = hidden
        try:
            pieces = []
            assert generate_text(model, codec, "a </s> b", 10, on_text=pieces.append) == "" and pieces == []
        finally:
            model.lm_head.weight.copy_(kept)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_rows_that_pad_the_vocabulary_are_not_chosen(tokenizer, forms, form):
    model, codec = forms[form]
    kept = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokenizer.encode("It was")]))[0][0, -1]
        model.lm_head.weight[tokenizer.vocab_size + 3] = hidden * 100
        try:
            assert len(generate_text(model, codec, "It was", 1)) >= 1
        finally:
            model.lm_head.weight.copy_(kept)


class Characters:
    """A tokenizer of bytes that speaks our protocol: one character takes several tokens."""

    vocab_size, eos_id = 256, 0

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_no_piece_cuts_a_character(forms):
    from loopmem_pretrain.inference.generate import _GrowingText

    pieces = []
    text = _GrowingText(Characters(), pieces.append)
    for byte in "f\u00fcr \U0001f98a!".encode():
        text.put(torch.tensor([byte]))
    text.put(torch.tensor([0xC3]))  # a character that never ends
    assert text.finish() == "".join(pieces) == "f\u00fcr \U0001f98a!\ufffd"
    assert pieces == ["f", "\u00fc", "r", " ", "\U0001f98a", "!", "\ufffd"]


def test_a_word_that_begins_a_piece_keeps_its_space():
    """Tokenizers in the manner of Llama's take the space off the first token of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from loopmem_pretrain.inference.generate import _GrowingText, _HuggingFaceCodec

    words = {f"\u2581{word}": index for index, word in enumerate(["a", "one", "two", "three", "</s>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="\u2581</s>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    codec = _HuggingFaceCodec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\u2581</s>"))
    ids = codec.encode("one two three")
    assert codec.decode(ids) == "one two three"
    text = _GrowingText(codec, None)
    for token in ids:
        text.put(torch.tensor([token]))
    assert text.finish() == " one two three", "behind a prompt, of which it is the rest"


# --------------------------------------------------------------------------------------------------------- refusals


def refusal(forms, form="huggingface", prompt="It was", max_new_tokens=4, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        generate_text(*forms[form], prompt, max_new_tokens, **settings)
    assert caught.value.fix
    return caught.value.problem


def test_prompt_longer_than_the_context(forms):
    problem = refusal(forms, prompt="word " * 100)
    assert "tokens, the model was trained on 64" in problem


def test_continuation_longer_than_the_context(forms):
    assert "80 new ones do not fit the 64" in refusal(forms, max_new_tokens=80)


def test_given_context_length(forms):
    assert "do not fit the 8" in refusal(forms, "native", max_new_tokens=7, context_length=8)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_without_a_number_the_context_is_filled(forms, form):
    model, codec = forms[form]
    text = generate_text(model, codec, "It was", context_length=16)
    prompt = len(codec.encode("It was") if form == "native" else codec("It was", add_special_tokens=False)["input_ids"])
    assert text == generate_text(model, codec, "It was", 16 - prompt, context_length=16)
    assert "tokens, the model was trained on 2" in refusal(forms, form, max_new_tokens=None, context_length=2)


def test_no_new_tokens(forms):
    assert "max_new_tokens 0" in refusal(forms, max_new_tokens=0)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_bad_temperature(forms, temperature):
    assert "temperature" in refusal(forms, temperature=temperature)


def test_bad_seed(forms):
    assert "does not fit into 64 bits" in refusal(forms, seed=2**64)


def test_prompt_that_is_no_unicode(forms):
    assert r"'\udcff' at character 3" in refusal(forms, prompt="a \udcff")


def test_bad_top_k(forms):
    assert "top_k 0" in refusal(forms, temperature=1.0, top_k=0)


def test_bad_num_loops(forms):
    assert "num_loops 0" in refusal(forms, "native", num_loops=0)


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_a_threshold_of_1_is_exact(forms, form):
    exact = generate_text(*forms[form], "It was", 24)
    assert generate_text(*forms[form], "It was", 24, exit_threshold=1) == exact
    assert generate_text(*forms[form], "It was", 24, exit_threshold=0.3) != exact


def test_loops_for_another_number_of_layers(forms):
    assert "3 numbers for 2 layers" in refusal(forms, num_loops=[1, 2, 3])
    assert "num_loops [1, 0] is not valid" in refusal(forms, num_loops=[1, 0])


@pytest.mark.parametrize("threshold", [0, -1.0, 1.5, float("nan")])
def test_bad_threshold(forms, threshold):
    assert f"exit_threshold {threshold}" in refusal(forms, "native", exit_threshold=threshold)


def test_bad_rule(forms):
    assert "exit_rule 'entropy'" in refusal(forms, exit_threshold=0.5, exit_rule="entropy")


def test_threshold_of_a_plain_model(tokenizer):
    with pytest.raises(ConfigError, match="does not loop"):
        generate_text(native_model(model_config("plain")), tokenizer, "a", 1, exit_threshold=0.5)


def test_loops_of_a_plain_model(tokenizer):
    with pytest.raises(ConfigError, match="does not loop"):
        generate_text(native_model(model_config("plain")), tokenizer, "a", 1, num_loops=2)
