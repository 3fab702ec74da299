"""What other tools, and transformers itself, ask of a model: generation, quantizers, autocast, copies."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, pipeline

from loopmem_pretrain.hf.export import huggingface_config, write_settings, write_tokenizer
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.model.loopmem import halting_lambda
from tests.unit.hf.conftest import TEXTS, model_config
from tests.unit.hf.test_cache import PROMPTS, padded
from tests.unit.hf.test_modeling import IDS, pair


@pytest.fixture(scope="module")
def looped():
    return pair("full")


# --------------------------------------------------------------------------------------------------------- generation


def test_strings_that_end_generation(tmp_path, tokenizer_path):
    write_tokenizer(tmp_path, tokenizer_path, TEXTS)
    codec = AutoTokenizer.from_pretrained(tmp_path)
    _, model = pair("full")
    with torch.no_grad():
        model.lm_head.weight[:260] = 0  # writes whole pieces, no single bytes
    asked = {"max_new_tokens": 12, "do_sample": False}
    write = pipeline("text-generation", model=model, tokenizer=codec)
    whole = write("The quick", **asked)[0]["generated_text"]
    end = whole[14]
    for settings in ({"stop_strings": [end], "tokenizer": codec}, {"stop_sequence": end}):
        text = write("The quick", **asked, **settings)[0]["generated_text"]
        assert whole.startswith(text) and end in text[9:] and len(text) < len(whole)
    ids = codec("The quick", return_tensors="pt")
    stopped = model.generate(**ids, **asked, stop_strings=[end], tokenizer=codec)
    assert codec.decode(stopped[0]) == text


def test_tokens_that_are_added(tmp_path, tokenizer_path, tokenizer):
    """They get ids that only padded the vocabulary, which the export keeps from being generated."""
    _, model = pair("full")
    write_tokenizer(tmp_path, tokenizer_path, TEXTS)
    codec = AutoTokenizer.from_pretrained(tmp_path)
    write_settings(tmp_path, huggingface_config(model_config("full"), tokenizer, 64, "float32"), tokenizer.vocab_size)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    codec.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    end = codec.convert_tokens_to_ids("<|end|>")
    assert end == tokenizer.vocab_size + 1
    assert end not in codec("The quick<|end|>").input_ids, "spelled out, as </s> is"
    codec.split_special_tokens = False
    codec.save_pretrained(tmp_path / "chat")
    for each in (codec, AutoTokenizer.from_pretrained(tmp_path / "chat")):
        assert each("The quick<|end|>").input_ids == [*codec("The quick").input_ids, end]
    with torch.no_grad():  # a model that has learned to say nothing else
        last = model(IDS[:1], output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[end] = last * 100
    asked = {"max_new_tokens": 3, "do_sample": False}
    for ends in (end, [2, end], torch.tensor([end])):
        with pytest.raises(ValueError, match=f"eos_token_id {end} is in suppress_tokens") as caught:
            model.generate(IDS[:1], eos_token_id=ends, **asked)
    assert end not in model.generate(IDS[:1], **asked)
    advice = str(caught.value).split("take theirs out: ")[1]
    exec(advice, {"model": model, "tokenizer": codec})
    assert model.generate(IDS[:1], eos_token_id=end, **asked)[0, 12:].tolist() == [end]
    assert model.generation_config.suppress_tokens == list(range(end + 1, 512))
    model.resize_token_embeddings(len(codec), mean_resizing=False)
    exec(advice, {"model": model, "tokenizer": codec})
    assert model.generation_config.suppress_tokens is None


def test_paged_caches_are_refused(looped):
    """transformers would log an error in a thread and return the prompt."""
    _, model = looped
    for ask in (
        lambda: model.generate(IDS[:1], max_new_tokens=2, cache_implementation="paged"),
        lambda: model.generate_batch([[5, 6, 7]]),
    ):
        with pytest.raises(ValueError, match="one for each loop"):
            ask()


def test_trainer_counts_tokens_over_accumulated_batches(looped, tmp_path):
    from transformers import Trainer, TrainingArguments

    _, model = looped
    settings = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, report_to=[], use_cpu=True)
    assert Trainer(model, settings).model_accepts_loss_kwargs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_there_is_one_attention(tmp_path, looped, implementation):
    _, model = looped
    model.save_pretrained(tmp_path)
    again = LoopMemForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


# ------------------------------------------------------------------------------------------------------ recomputation


@pytest.mark.filterwarnings("ignore")  # transformers is about to rename it
@pytest.mark.parametrize("variant", ["full", "plain", "topk"])
def test_gradient_checkpointing(variant):
    """One loop is run again in the backward pass; in evaluation and with a cache, none."""
    _, model = pair(variant)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    assert again.is_gradient_checkpointing
    loops, ran = 2 * max(1, model.config.max_loops), []
    for layer in again.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: ran.append(1))
    model.train()(IDS, labels=IDS).loss.backward()
    again.train()(IDS, labels=IDS).loss.backward()
    assert len(ran) == 2 * loops
    for (name, parameter), kept in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, kept.grad), name
    for settings, mode in (({"use_cache": True}, True), ({}, False)):
        ran.clear()
        again.train(mode)(IDS, **settings).logits.sum().backward()
        assert len(ran) == loops
    again.gradient_checkpointing_disable()
    ran.clear()
    again.train()(IDS, labels=IDS).loss.backward()
    assert len(ran) == loops and not again.is_gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant=False"):
        again.gradient_checkpointing_enable({"use_reentrant": True})


# ----------------------------------------------------------------------------------------------- quantizers, autocast


@pytest.mark.filterwarnings("ignore")  # torch says that torchao will take its place
@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.99}], ids=str)
def test_quantized_linear_layers(looped, settings):
    """Every nn.Linear is replaced, and what is none stays as it was."""
    _, model = looped
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(type(part) is torch.nn.Linear for part in quantized.modules())
    for ours, kept in zip(quantized.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.halting.weight, kept.halting.weight)
    with torch.no_grad():
        logits, exact = quantized(IDS, **settings).logits, model(IDS, **settings).logits
    assert 0 < (logits - exact).norm() < 0.15 * exact.norm()  # of models without loops it is 0.07


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.99}], ids=str)
def test_halting_is_float32_under_autocast(looped, settings):
    _, model = looped
    layer, hidden, tau = model.model.layers[0], torch.randn(2, 3, 32), torch.tensor(0.5)
    exact = halting_lambda(layer.halting(torch.float32), hidden, tau)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halting_lambda(layer.halting(torch.float32), hidden, tau), exact)
        assert layer.self_attn.q_proj(hidden).dtype == torch.bfloat16
        stats = model(IDS, output_loop_stats=True, **settings).loop_stats
    assert {each.halting_probs.dtype for each in stats} == {torch.float32}


@pytest.mark.parametrize("variant", ["full", "topk", "product_keys", "plain"])
@pytest.mark.parametrize("tokens", [2, 12])
def test_training_under_autocast(variant, tokens):
    """With fewer slots than reads, and with more: banks are then projected before they are read, or after."""
    _, model = pair(variant)
    exact = model.train()(IDS[:, :tokens], labels=IDS[:, :tokens]).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS[:, :tokens], labels=IDS[:, :tokens]).loss
    loss.backward()
    assert abs(loss - exact) < 0.05
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.6}, {"cache_implementation": "static"}], ids=str)
def test_generation_under_autocast(looped, settings):
    _, model = looped
    asked = {**padded(PROMPTS), "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.generate(**asked, **settings).past_key_values
    assert {(layer.keys.dtype, layer.values.dtype) for layer in cache.layers} == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("variant", ["full", "plain"])
def test_a_replica_of_data_parallel_runs_its_own_weights(variant):
    """What nn.DataParallel does for each GPU: the layer's dictionary is taken over, then its parts are replaced."""
    _, model = pair(variant)
    layer, hidden = model.model.layers[0], torch.randn(1, 3, 32)
    memory = None if model.model.memory is None else model.model.memory()
    replica = layer._replicate_for_data_parallel()
    replica.step_scales = getattr(layer, "step_scales", None)
    for name, part in layer.named_children():
        replica._modules[name] = copy.deepcopy(part)
    with torch.no_grad():
        assert torch.equal(replica(hidden, memory)[0], layer(hidden, memory)[0])
        for part in replica.children():
            for parameter in part.parameters():
                parameter.zero_()
        torch.testing.assert_close(replica(hidden, memory)[0], hidden)  # nothing is added
        assert not torch.allclose(layer(hidden, memory)[0], hidden)


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.6}], ids=str)
def test_hooks_of_every_part_run(looped, settings):
    """accelerate puts weights where they are needed in hooks before the forward of a part."""
    _, model = looped
    ran = []
    parts = {name: part for name, part in model.named_modules() if [*part.parameters(recurse=False)]}
    parts |= {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)} | {"model": model.model}
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, part in parts.items()]
    model(IDS, **settings)
    for hook in hooks:
        hook.remove()
    assert parts.keys() - ran == {"model.memory.query_norm"}  # layers read it where they normalise their queries
    assert ran.count("model.layers.0") == 1
