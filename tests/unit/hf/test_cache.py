"""Cache and padding change what is computed again, never what comes out: logits to 1e-5 in float32, and the text."""

import copy
from threading import Thread

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, TextIteratorStreamer, TextStreamer, pipeline

from loopmem_pretrain.hf.cache import RoomyLayer
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.export import write_tokenizer
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.model.decoding import make_decoding
from tests.unit.hf.conftest import SIZES, TEXTS, VARIANTS, model_config, native_model
from tests.unit.hf.test_modeling import IDS, pair

PROMPTS = [[7, 301, 44, 9, 120, 33, 5], [400, 12, 8], [91], [6, 6, 310, 77, 250]]
STEPS = (5, 1, 3, 1, 2)  # tokens of each call: prefill, one token, several at once


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """A batch; its padding is a token that would matter if it were seen."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), 17), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def in_steps(model: LoopMemForCausalLM, ids: torch.Tensor, cache: DynamicCache | None = None, **kwargs) -> torch.Tensor:
    logits = []
    for part in ids.split(STEPS, dim=1):
        output = model(part, past_key_values=cache, **kwargs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def looped():
    return pair("full")


# ---------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(variant):
    native, model = pair(variant)
    close(in_steps(model, IDS), native(IDS).logits)


@pytest.mark.parametrize("num_loops", [1, 2, 3, 5])
def test_cached_equals_uncached_with_forced_loops(looped, num_loops):
    native, model = looped
    close(in_steps(model, IDS, num_loops=num_loops), native(IDS, num_loops=num_loops).logits)


def test_one_slot_for_each_layer_and_loop(looped):
    """Those of loop n are the keys of loop n, not of the last one."""
    _, model = looped
    keys = [layer.keys for layer in model(IDS).past_key_values.layers]
    assert [key.shape for key in keys] == [(2, 2, 12, 8)] * 6
    first = model(IDS, num_loops=1).past_key_values.layers
    assert len(first) == 2
    close(first[0].keys, keys[0])
    assert not torch.allclose(keys[0], keys[2], atol=1e-3) and not torch.allclose(keys[2], keys[4], atol=1e-3)


def test_cache_made_with_the_config_grows(looped):
    """What `generate` and the transformers guides make: one slot a layer, which would run out at the second loop."""
    native, model = looped
    close(in_steps(model, IDS, DynamicCache(config=model.config)), native(IDS).logits)


def test_cache_when_asked_for(looped):
    _, model = looped
    assert model(IDS, use_cache=False).past_key_values is None
    assert model(IDS).past_key_values.get_seq_length() == 12
    model.train()
    try:
        assert model(IDS).past_key_values is None
    finally:
        model.eval()


def test_bfloat16_cache(looped):
    _, model = looped
    config = LoopMemConfig(**SIZES, **VARIANTS["full"])
    half = LoopMemForCausalLM(config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    assert half(IDS).past_key_values.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(in_steps(half, IDS), half(IDS).logits, rtol=0.05, atol=0.1)


def test_cache_goes_on_outside_inference_mode(looped):
    """Its buffers were made inside, where tensors are made that cannot be written outside."""
    native, model = looped
    with torch.inference_mode():
        cache = model(IDS[:, :5]).past_key_values
    with torch.no_grad():
        close(model(IDS[:, 5:], past_key_values=cache).logits, native(IDS).logits[:, 5:])


def test_a_new_token_copies_no_other(looped):
    _, model = looped
    with torch.no_grad():
        cache = model(IDS[:, :5]).past_key_values
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for column in range(5, 12):
            model(IDS[:, column : column + 1], past_key_values=cache)
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        model(torch.arange(200)[None].repeat(2, 1), past_key_values=cache)
        assert [layer.keys.data_ptr() for layer in cache.layers] != places  # no more room


def test_a_copied_cache_is_another(looped):
    native, model = looped
    with torch.no_grad():
        cache = model(IDS[:, :5]).past_key_values
        other = copy.deepcopy(cache)
        model(IDS[:, :3], past_key_values=other)
        close(model(IDS[:, 5:], past_key_values=cache).logits, native(IDS).logits[:, 5:])


def test_a_slot_whose_oldest_token_was_dropped_goes_on_with_the_others():
    """What is left has the buffer's strides, but is not its beginning."""
    layer, held, new = RoomyLayer(), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    with torch.inference_mode():
        layer.update(held, -held)
        layer.keys, layer.values = layer.keys[..., 1:, :], layer.values[..., 1:, :]
        keys, values = layer.update(new, -new)
    expected = torch.cat((held[..., 1:, :], new), dim=-2)
    assert torch.equal(keys, expected) and torch.equal(values, -expected)


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_gradients_of_one_projection_alone(looped, part):
    """In the first loop of the first layer keys need no gradient here, and values, or queries, do."""
    model = copy.deepcopy(looped[1])
    weight = model.model.layers[0].self_attn.get_submodule(part).weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    (whole,) = torch.autograd.grad(model(IDS, use_cache=False).logits.square().mean(), weight)
    (cached,) = torch.autograd.grad(in_steps(model, IDS).square().mean(), weight)
    close(cached, whole)


# --------------------------------------------------------------------------------------------- fixed size, compiled


def test_static_cache(looped):
    """Slots of fixed size, with what is not written yet masked."""
    native, model = looped
    with torch.no_grad():
        close(in_steps(model, IDS, StaticCache(config=model.config, max_cache_len=20)), native(IDS).logits)
    for settings in ({}, {"num_loops": 2}, {"num_beams": 2}):
        asked = {"do_sample": False, "max_new_tokens": 6, **settings}
        static = model.generate(**padded(PROMPTS), cache_implementation="static", **asked)
        assert torch.equal(static, model.generate(**padded(PROMPTS), **asked))


@pytest.mark.slow
def test_decoding_compiles_whole_and_once(looped):
    _, model = looped
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        mask = torch.ones(2, 20, dtype=torch.long)
        caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
        for cache in caches:
            model(IDS[:, :5], attention_mask=mask, past_key_values=cache)
        for column in range(5, 12):
            step = {"input_ids": IDS[:, column : column + 1], "attention_mask": mask}
            close(compiled(**step, past_key_values=caches[0]).logits, model(**step, past_key_values=caches[1]).logits)


# -------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_alone(variant, side):
    native, model = pair(variant)
    batch = padded(PROMPTS, side)
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    for row, prompt in enumerate(PROMPTS):
        close(logits[row, batch["attention_mask"][row] == 1], native(torch.tensor([prompt])).logits[0])


def test_every_token_sees_one():
    """Padding, too: some of torch's kernels make NaN of a softmax over nothing, and 0 * NaN of it is NaN elsewhere."""
    real = torch.tensor([[False, False, True, True], [False] * 4, [True, True, False, False]])
    assert make_decoding(4, 0, real.device, real).mask.any(dim=-1).all()
    assert make_decoding(2, 2, real.device, real).mask.any(dim=-1).all()


def test_padded_batch_in_steps(looped):
    native, model = looped
    batch, tail = padded(PROMPTS), IDS[:1].repeat(4, 1)[:, :3]
    cache = model(**batch).past_key_values
    mask = batch["attention_mask"]
    for column in range(3):
        mask = torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), dim=1)
        logits = model(tail[:, column : column + 1], attention_mask=mask, past_key_values=cache).logits
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt + tail[row, : column + 1].tolist()])
            close(logits[row, -1], native(ids).logits[0, -1])


def test_given_positions(looped):
    _, model = looped
    close(model(IDS, position_ids=torch.arange(12)[None]).logits, model(IDS).logits)
    assert not torch.allclose(model(IDS, position_ids=torch.arange(3, 15)[None]).logits, model(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_leave_padding_out(looped, side):
    _, model = looped
    batch = padded([[5, 6, 7, 8], [9, 10]], side)
    whole = model(**batch, labels=batch["input_ids"])
    alone = [model(ids, labels=ids) for ids in (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]]))]
    for key in ("cross_entropy", "ponder_cost"):  # three predictions and one
        close(whole[key], (3 * alone[0][key] + alone[1][key]) / 4)


# ----------------------------------------------------------------------------------------------------- generation


def written(model: LoopMemForCausalLM, use_cache: bool = True, **kwargs) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(**{**padded(PROMPTS), "max_new_tokens": 10, "use_cache": use_cache, **kwargs})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_loops": 1},
        {"do_sample": False, "num_loops": 5},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_same_text_with_and_without_cache(looped, settings):
    _, model = looped
    assert torch.equal(written(model, True, **settings), written(model, False, **settings))


@pytest.mark.parametrize("variant", ["plain", "topk", "tied"])
def test_each_prompt_of_a_batch_is_continued_as_alone(variant):
    _, model = pair(variant)
    batch = written(model, do_sample=False)[:, 7:]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        assert torch.equal(alone[0, len(prompt) :], batch[row])


def test_every_token_after_the_prompt_is_computed_once(looped):
    """The cache is used, not only carried."""
    _, model = looped
    widths = []
    hook = model.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.generate(IDS, max_new_tokens=5)
    hook.remove()
    assert widths == [12, 1, 1, 1, 1]


def test_conversation_goes_on_with_the_returned_cache(looped):
    _, model = looped
    first = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, IDS[:, :3]), dim=1)
    on = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(on, model.generate(longer, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("settings", [{}, {"num_loops": [1, 3]}], ids=str)
def test_guessed_tokens_that_are_refused_leave_every_slot(looped, settings):
    """Speculative decoding crops the cache, slots of loops that a layer does not run with it."""
    _, model = looped
    ids = IDS[:1].repeat(1, 2)
    asked = {"max_new_tokens": 12, "do_sample": False, **settings}
    exact = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **asked), exact)
    assert torch.equal(model.generate(ids, assistant_model=pair("loop")[1], **asked), exact)
    cache = model(ids, **settings).past_key_values
    for layer in cache.layers:
        layer.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} <= {0, 21}


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.6}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_prompts_in_chunks(looped, size, settings):
    """The first chunk of a short prompt is padding alone."""
    _, model = looped
    asked = {"do_sample": False, **settings}
    assert torch.equal(written(model, prefill_chunk_size=size, **asked), written(model, **asked))


def test_pipeline_and_streamer(tmp_path, tokenizer_path, tokenizer, capsys):
    """Texts of different lengths in one batch, with the exported tokenizer as it is."""
    from transformers import AutoTokenizer

    native = native_model(model_config("full"))
    with torch.no_grad():
        native.lm_head.weight[:260] = 0  # writes whole pieces, no single bytes
    model = LoopMemForCausalLM(LoopMemConfig(**SIZES, **VARIANTS["full"])).eval()
    model.load_state_dict(native.state_dict())
    write_tokenizer(tmp_path, tokenizer_path, TEXTS)
    codec = AutoTokenizer.from_pretrained(tmp_path)
    assert codec.padding_side == "left"
    codec.pad_token = codec.pad_token or codec.eos_token
    pipe = pipeline("text-generation", model=model, tokenizer=codec)
    asked = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **asked)[0]["generated_text"] for text in TEXTS]
    assert [out[0]["generated_text"] for out in pipe(TEXTS, batch_size=3, **asked)] == alone and all(alone)
    ids = codec(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    capsys.readouterr()
    model.generate(**ids, max_new_tokens=8, do_sample=False, streamer=TextStreamer(codec, skip_prompt=True))
    assert capsys.readouterr().out.strip() == alone[0].strip()
    early = {**asked, "exit_threshold": 0.3}
    leaving = [pipe(text, **early)[0]["generated_text"] for text in TEXTS]
    assert [out[0]["generated_text"] for out in pipe(TEXTS, batch_size=3, **early)] == leaving != alone
    pieces = TextIteratorStreamer(codec, skip_prompt=True, timeout=60)
    settings = {**ids, "max_new_tokens": 8, "do_sample": False, "exit_threshold": 0.3, "streamer": pieces}
    writer = Thread(target=model.generate, kwargs=settings)
    writer.start()
    assert "".join(pieces).strip() == leaving[0].strip()
    writer.join()


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_right_padding_is_refused_in_generation(looped):
    _, model = looped
    for settings in ({}, {"prefill_chunk_size": 2}):
        said = refusal(model.generate, **padded(PROMPTS, "right"), max_new_tokens=2, **settings)
        assert "padding_side = 'left'" in said


def test_prompt_longer_than_the_context(looped):
    config = LoopMemConfig(**SIZES, **VARIANTS["full"], max_position_embeddings=13)
    model = LoopMemForCausalLM(config).eval()
    assert model.generate(IDS, max_new_tokens=1).shape == (2, 13)
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 8}):
        said = refusal(model.generate, IDS.repeat(1, 2), max_new_tokens=1, **settings)
        assert "the prompt has 24 tokens and the model was trained on 13" in said and "12 or less" in said


def test_cache_of_other_loops(looped):
    _, model = looped
    cache = model(IDS, num_loops=2).past_key_values
    assert "holds 4 slots and this call needs 6" in refusal(model, IDS[:, :1], past_key_values=cache)


def test_cache_of_another_batch(looped):
    _, model = looped
    static = StaticCache(config=model.config, max_cache_len=16)
    for cache in (model(IDS).past_key_values, model(IDS, past_key_values=static).past_key_values):
        said = refusal(model, IDS[:1, :1], past_key_values=cache)
        assert "past_key_values holds 2 sequences and this call has 1" in said


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="transformers makes a CUDA stream before the model is asked",
)
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloading_cache(looped, implementation):
    _, model = looped
    said = refusal(model.generate, IDS, max_new_tokens=2, cache_implementation=implementation)
    assert "past_key_values is offloading" in said and "leave cache_implementation out" in said


def test_cache_that_is_not_wanted(looped):
    _, model = looped
    said = refusal(model, IDS[:, :1], past_key_values=DynamicCache(), use_cache=False)
    assert "pass one of them only" in said


def test_other_kinds_of_cache(looped):
    _, model = looped
    said = refusal(model, IDS, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    assert "is a EncoderDecoderCache" in said and "leave cache_implementation out" in said


def test_static_cache_of_other_loops(looped):
    _, model = looped
    static = StaticCache(config=model.config, max_cache_len=16)
    model(IDS, past_key_values=static, num_loops=2)
    assert "holds 4 slots and this call needs 6" in refusal(model, IDS[:, :1], past_key_values=static)


def test_static_cache_of_other_caps(looped):
    """A slot that no earlier token filled would be read as if they were zeros."""
    _, model = looped
    static = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        close(in_steps(model, IDS, static, num_loops=[3, 1]), model(IDS, num_loops=[3, 1]).logits)
    said = refusal(model, IDS[:, :1], past_key_values=static, num_loops=[3, 3])
    assert "holds 4 slots and this call needs 6" in said


def test_what_a_static_cache_cannot_do(looped):
    _, model = looped
    static = StaticCache(config=model.config, max_cache_len=16)
    assert "leave cache_implementation or exit_threshold out" in refusal(
        model.generate, IDS, max_new_tokens=2, cache_implementation="static", exit_threshold=0.5
    )
    assert "labels with a StaticCache" in refusal(model, IDS, labels=IDS, past_key_values=static)


@pytest.mark.parametrize("length", [2, 11, 13])
def test_mask_of_another_length_with_a_static_cache(looped, length):
    _, model = looped
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 0] = 0  # transformers leaves a mask of ones out
    static = StaticCache(config=model.config, max_cache_len=16)
    assert f"[2, {length}] must be [2, 12]" in refusal(model, IDS, attention_mask=mask, past_key_values=static)
    asked = {"max_new_tokens": 9, "cache_implementation": "static"}
    assert f"[2, {length}] must be [2, 12]" in refusal(model.generate, IDS, attention_mask=mask, **asked)
    model(IDS, attention_mask=torch.ones(2, 12), past_key_values=static)
    model(IDS[:, :1], attention_mask=torch.ones(2, 13), past_key_values=static)
    model(IDS[:, :1], attention_mask=torch.ones(2, 16), past_key_values=static)


@pytest.mark.parametrize("shape", [(1, 11), (1, 13), (3, 12), (12, 2)])
def test_positions_of_another_shape(looped, shape):
    _, model = looped
    said = refusal(model, IDS, position_ids=torch.zeros(shape, dtype=torch.long))
    assert f"position_ids {list(shape)} must be [2, 12]" in said


def test_mask_without_the_tokens_in_the_cache(looped):
    _, model = looped
    cache = model(IDS).past_key_values
    said = refusal(model, IDS[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    assert "attention_mask [2, 1] must be [2, 13]" in said
