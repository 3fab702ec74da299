"""LoopMemForCausalLM computes what LoopMemLM computes, and behaves as transformers expects."""

import copy
import warnings

import numpy as np
import pytest
import torch

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM, LoopMemModel
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.unit.hf.conftest import SIZES, VARIANTS, model_config, native_model

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 500


def pair(variant: str) -> tuple[LoopMemLM, LoopMemForCausalLM]:
    native = native_model(model_config(variant))
    model = LoopMemForCausalLM(LoopMemConfig(**SIZES, **VARIANTS[variant])).eval()
    model.load_state_dict(native.state_dict(), strict=True)
    return native, model


@pytest.fixture(scope="module")
def looped():
    return pair("full")


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_loss_and_gradients_as_training(variant):
    native, model = pair(variant)
    expected = native(IDS[:, :-1], labels=IDS[:, 1:])
    output = model(IDS, labels=IDS)
    torch.testing.assert_close(output.logits[:, :-1], expected.logits, rtol=1e-5, atol=1e-5)
    for key in ("loss", "cross_entropy", "ponder_cost"):
        torch.testing.assert_close(output[key], getattr(expected, key), rtol=1e-6, atol=1e-6)
    expected.loss.backward()
    output.loss.backward()
    grads = dict(model.named_parameters())
    assert set(grads) == {name for name, _ in native.named_parameters()}
    for name, parameter in native.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_ignored_labels_are_not_counted(looped):
    _, model = looped
    labels = IDS.clone()
    labels[:, 6:] = -100
    expected = model(IDS[:, :6], labels=IDS[:, :6]).cross_entropy
    torch.testing.assert_close(model(IDS, labels=labels).cross_entropy, expected)


def test_micro_batches_add_up_to_the_mean_over_all_tokens(looped):
    """As Trainer accumulates gradients: one sample has 11 labels, the other 2."""
    _, model = looped
    labels = IDS.clone()
    labels[1, 3:] = -100
    counted = (labels[:, 1:] != -100).sum(1)
    outputs = [model(IDS[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=counted.sum()) for i in range(2)]
    separate = [model(IDS[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    share = counted / counted.sum()
    torch.testing.assert_close(
        sum(output.cross_entropy for output in outputs), model(IDS, labels=labels).cross_entropy, rtol=1e-6, atol=1e-6
    )
    for key in ("cross_entropy", "ponder_cost", "loss"):
        expected = sum(part * output[key] for part, output in zip(share, separate, strict=True))
        torch.testing.assert_close(sum(output[key] for output in outputs), expected, rtol=1e-6, atol=1e-6)
    nothing = model(IDS[:1], labels=torch.full_like(IDS[:1], -100), num_items_in_batch=5)
    assert nothing.loss == 0, "a micro-batch without labels beside others that have some"


def test_a_loss_whose_parts_lie_on_several_devices():
    """As `device_map` spreads layers: `meta` stands for the device of the head."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    _, model = pair("full")
    model.lm_head.to("meta")
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="meta", io_same_device=False))
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_items_in_batch": 20}):
        assert model(IDS, labels=IDS, **given).loss.device.type == "meta"


@pytest.mark.parametrize("num_loops", [1, 2, 5])
def test_forced_loops(looped, num_loops):
    native, model = looped
    output = model(IDS, num_loops=num_loops, output_loop_stats=True)
    torch.testing.assert_close(output.logits, native(IDS, num_loops=num_loops).logits)
    assert [stats.halting_probs.shape for stats in output.loop_stats] == [(2, 12, num_loops)] * 2
    assert torch.equal(model(IDS, num_loops=np.int64(num_loops)).logits, output.logits)


def test_loop_stats_only_when_asked(looped):
    _, model = looped
    assert model(IDS).loop_stats is None
    stats = model(IDS, output_loop_stats=True).loop_stats
    assert len(stats) == 2 and 1 < stats[0].expected_loops().mean() < 3


def test_logits_to_keep(looped):
    _, model = looped
    logits = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_plain_tuple(looped):
    _, model = looped
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 12, 512)


def test_bfloat16(looped):
    _, model = looped
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert abs(output.loss - model(IDS, labels=IDS).loss) < 0.1


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.6}], ids=str)
@pytest.mark.parametrize("variant", ["full", "plain"])
def test_hidden_states(variant, settings):
    """As transformers defines them: what each layer is given, then the output of the final norm."""
    _, model = pair(variant)
    settings = settings if variant == "full" else {}
    body, mine = model.model, model(IDS, output_hidden_states=True, **settings)
    assert len(mine.hidden_states) == 3 and model(IDS, **settings).hidden_states is None
    assert torch.equal(mine.hidden_states[0], body.embed_tokens(IDS))
    assert torch.equal(model.lm_head(mine.hidden_states[-1]), mine.logits)
    given = []
    hook = body.layers[1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.config.output_hidden_states = True
    last = model(IDS, **settings).hidden_states
    hook.remove()
    assert torch.equal(given[0], mine.hidden_states[1]) and all(map(torch.equal, last, mine.hidden_states))
    model.config.output_hidden_states = False
    asked = {"max_new_tokens": 2, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    written = model.generate(IDS, **asked, **settings).hidden_states
    assert [states[1].shape for states in written] == [(2, 12, 32), (2, 1, 32)]


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.6}], ids=str)
def test_embeddings_for_token_ids(looped, settings):
    _, model = looped
    embeds = model.get_input_embeddings()(IDS)
    whole = model(inputs_embeds=embeds, labels=IDS, output_attentions=False, **settings)
    expected = model(IDS, labels=IDS, inputs_embeds=None, output_attentions=None, **settings)
    assert torch.equal(whole.logits, expected.logits) and torch.equal(whole.loss, expected.loss)
    asked = {"max_new_tokens": 4, "do_sample": False, **settings}
    mask = torch.ones_like(IDS)
    written = model.generate(inputs_embeds=embeds, attention_mask=mask, **asked)
    assert torch.equal(written, model.generate(IDS, attention_mask=mask, **asked)[:, 12:])


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(model, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        model(*args, **kwargs)
    return str(caught.value)


def test_mask_of_ones_changes_nothing(looped):
    _, model = looped
    torch.testing.assert_close(model(IDS, attention_mask=torch.ones_like(IDS)).logits, model(IDS).logits)


def test_mask_of_another_shape(looped):
    assert "must be [2, 12]" in refusal(looped[1], IDS, attention_mask=torch.ones(2, 1, 12, 12))


def test_zero_loops(looped):
    assert "num_loops=0 is not valid" in refusal(looped[1], IDS, num_loops=0)


def test_loops_of_a_plain_model():
    assert "does not loop" in refusal(pair("plain")[1], IDS, num_loops=2)


def test_empty_input(looped):
    assert "at least one token" in refusal(looped[1], IDS[:, :0])


def test_ids_and_embeddings(looped):
    _, model = looped
    for given in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 12, 32)}):
        assert "either input_ids or inputs_embeds" in refusal(model, **given)
    assert "[batch, tokens, 32]" in refusal(model, inputs_embeds=torch.zeros(2, 12, 31))


def test_attention_weights(looped):
    _, model = looped
    assert "never made" in refusal(model, IDS, output_attentions=True)
    assert "never made" in refusal(
        model.generate, IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
    )


def test_shifted_labels(looped):
    assert "pass them unshifted" in refusal(looped[1], IDS[:, :-1], labels=IDS)


def test_labels_of_one_token(looped):
    assert "at least two tokens" in refusal(looped[1], IDS[:, :1], labels=IDS[:, :1])


# ------------------------------------------------------------------------------------- weights: init, save, load


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_weights_are_those_of_training(variant):
    config = model_config(variant)
    native = LoopMemLM(config, TorchBackend())
    initialize(native.named_parameters(), config, seed=11)
    torch.manual_seed(11)
    model = LoopMemForCausalLM(LoopMemConfig(**config.model_dump()))
    for (name, parameter), (expected_name, expected) in zip(
        model.named_parameters(), native.named_parameters(), strict=True
    ):
        assert name == expected_name
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    _, model = pair(variant)
    model.save_pretrained(tmp_path)
    loaded, info = LoopMemForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (variant == "tied")


def test_missing_parameters_get_initial_values(tmp_path, looped):
    """Loaded on the meta device first: what a file lacks must not stay uninitialised memory."""
    _, model = looped
    state = {key: value for key, value in model.state_dict().items() if "memory" not in key and "step" not in key}
    saved = set(state)
    model.save_pretrained(tmp_path, state_dict=state)  # empties the dictionary
    torch.manual_seed(5)
    loaded = LoopMemForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(5)
    fresh = dict(LoopMemForCausalLM(model.config).named_parameters())
    kept = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, (kept if name in saved else fresh)[name], rtol=0, atol=0, msg=name)


def test_bfloat16_from_pretrained(tmp_path, looped):
    _, model = looped
    model.save_pretrained(tmp_path)
    loaded = LoopMemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_pickled_whole(variant, tmp_path):
    _, model = pair(variant)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("variant", ["full", "tied"])
def test_resized_vocabulary_without_a_head(variant, tmp_path):
    _, model = pair(variant)
    model.save_pretrained(tmp_path)
    base = LoopMemModel.from_pretrained(tmp_path)
    before = base(IDS).last_hidden_state
    base.resize_token_embeddings(520, mean_resizing=False)
    assert base.config.vocab_size == 520 and base.get_input_embeddings().weight.shape == (520, 32)
    assert torch.equal(base(IDS).last_hidden_state, before)


def test_resized_vocabulary():
    _, model = pair("tied")
    before = model(IDS).logits
    model.resize_token_embeddings(520, mean_resizing=False)
    logits = model(IDS).logits
    assert logits.shape[-1] == model.config.vocab_size == 520
    torch.testing.assert_close(logits[..., :512], before)
    assert torch.isfinite(logits).all() and model.lm_head.weight is model.model.embed_tokens.weight


# ----------------------------------------------------------------------------------------------------- generation


def greedy(native: LoopMemLM, ids: torch.Tensor, count: int, **kwargs) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat((ids, native(ids, **kwargs).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_equals_native_greedy(variant):
    native, model = pair(variant)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), greedy(native, IDS, 8))


def test_generate_with_forced_loops(looped):
    native, model = looped
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, num_loops=1)
    assert torch.equal(generated, greedy(native, IDS, 4, num_loops=1))


def test_generate_is_silent(looped, caplog, capsys):
    _, model = looped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(IDS, max_new_tokens=2)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_generate_refuses_an_unknown_argument(looped):
    with pytest.raises(ValueError, match="num_loop"):
        looped[1].generate(IDS, max_new_tokens=2, num_loop=1)
