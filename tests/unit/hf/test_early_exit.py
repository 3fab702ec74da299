"""Early exit: held to a reference that runs one token at a time, whatever batch, padding and cache it comes in."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.model.early_exit import EXIT_RULES
from tests.unit.hf.conftest import SIZES, VARIANTS, native_model
from tests.unit.hf.test_cache import PROMPTS, close, in_steps, padded, refusal
from tests.unit.hf.test_modeling import IDS, pair

LOOPED = [name for name, sizes in VARIANTS.items() if sizes["max_loops"] > 1]
EXITS = [("halting", 0.6), ("halting", 0.85), ("confidence", 0.3), ("confidence", 0.6)]


@pytest.fixture(scope="module")
def looped():
    return pair("full")


@torch.no_grad()
def reference(model, ids, exits, num_loops=None):
    """Logits [T, V] and loops [T, L] of one sequence, token after token, `exits` a rule and threshold for each."""
    layers = list(model.model.layers)
    caps = num_loops or [layer.max_loops for layer in layers]
    kept = {(layer.index, n): ([], []) for layer in layers for n in range(1, caps[layer.index] + 1)}
    shared = model.model.memory() if model.model.memory is not None else None
    logits, loops = [], torch.zeros(len(ids), len(layers), dtype=torch.long)
    for position, token in enumerate(ids):
        x = model.model.embed_tokens.weight[token]
        for layer in layers:
            hidden, mass, mixture, left = x, 1.0, torch.zeros_like(x), False
            key = value = None
            for n in range(1, caps[layer.index] + 1):
                keys, values = kept[layer.index, n]
                if left:
                    keys.append(key)
                    values.append(value)
                    continue
                before = hidden
                if layer.memory is not None:
                    hidden = layer.memory(hidden[None, None], layer.banks(shared, 1))[0][0, 0]
                zeta = F.softplus(layer.step_scales[min(n, layer.max_loops) - 1])
                attention = layer.self_attn
                query, key, value = project(attention, layer.input_layernorm(hidden), position, layer.rope_theta)
                keys.append(key)
                values.append(value)
                u = hidden + zeta * attention.o_proj(attended(query, torch.stack(keys), torch.stack(values)))
                hidden = u + zeta * layer.mlp(layer.post_attention_layernorm(u))
                tau = (min(n, layer.max_loops) - 1) / max(1, layer.max_loops - 1)
                seen = torch.cat((hidden, torch.tensor([tau])))
                lam = torch.sigmoid(layer.halting.weight[0] @ seen + layer.halting.bias).item()
                rule, threshold = exits[position]
                gone = (
                    1 - mass * (1 - lam) if rule == "halting" else 1 - float((hidden - before).norm() / hidden.norm())
                )
                left = n == caps[layer.index] or gone >= threshold
                mixture = mixture + (mass if left else mass * lam) * hidden
                mass *= 1 - lam
                loops[position, layer.index] = n
            x = mixture
        logits.append(model.lm_head(model.model.norm(x)))
    return torch.stack(logits), loops


def project(attention, x, position, theta):
    """q [H, d], k and v [K, d] of one token."""
    d = attention.head_dim
    angles = position * theta ** -(torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones(d // 2), angles)

    def rotated(heads):
        turned = torch.complex(heads[:, : d // 2], heads[:, d // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), dim=1)

    q, k, v = (proj(x).view(-1, d) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    if attention.qk_norm == "before_rope":
        return rotated(attention.q_norm(q)), rotated(attention.k_norm(k)), v
    if attention.qk_norm == "after_rope":
        return attention.q_norm(rotated(q)), attention.k_norm(rotated(k)), v
    return rotated(q), rotated(k), v


def attended(query, keys, values):
    """One token's heads mixed: query [H, d], keys and values [S, K, d]."""
    heads = []
    for head, q in enumerate(query):
        of = head * keys.shape[1] // len(query)
        weights = (keys[:, of] @ q / math.sqrt(len(q))).softmax(0)
        heads.append(weights @ values[:, of])
    return torch.cat(heads)


def asked(exits):
    return {"exit_rule": exits[0], "exit_threshold": exits[1]}


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("exits", EXITS, ids=str)
@pytest.mark.parametrize("variant", LOOPED)
def test_equals_a_token_at_a_time(variant, exits):
    native, model = pair(variant)
    output = model(IDS, **asked(exits), output_loop_stats=True)
    for row, ids in enumerate(IDS.tolist()):
        logits, loops = reference(native, ids, [exits] * len(ids))
        close(output.logits[row], logits)
        assert torch.equal(torch.stack([stats.loops[row] for stats in output.loop_stats], dim=-1), loops)
    assert len(torch.cat([stats.loops for stats in output.loop_stats]).unique()) > 1 or variant != "full"


@pytest.mark.parametrize("num_loops", [[1, 2], [2, 5], [3, 1]])
def test_equals_a_token_at_a_time_with_caps(looped, num_loops):
    native, model = looped
    logits, _ = reference(native, IDS[0].tolist(), [("halting", 0.85)] * 12, num_loops)
    close(model(IDS[:1], num_loops=num_loops, exit_threshold=0.85).logits[0], logits)
    close(in_steps(model, IDS[:1], num_loops=num_loops, exit_threshold=0.85)[0], logits)
    logits, _ = reference(native, IDS[0].tolist(), [("halting", math.inf)] * 12, num_loops)
    close(model(IDS[:1], num_loops=num_loops).logits[0], logits)
    close(in_steps(model, IDS[:1], num_loops=num_loops)[0], logits)


def test_what_meets_a_threshold_leaves():
    """1 - R = t and |h_n - h_n-1| = (1 - t) |h_n|, in numbers that floating point has exactly."""
    remaining = torch.tensor([[0.25, 0.2500001]])
    assert EXIT_RULES["halting"](0.75, remaining, None, None).tolist() == [[True, False]]
    hidden, before = torch.tensor([[[4.0], [4.0]]]), torch.tensor([[[3.0], [2.999]]])
    assert EXIT_RULES["confidence"](0.75, None, hidden, before).tolist() == [[True, False]]


@pytest.mark.parametrize("rule", EXIT_RULES)
def test_a_threshold_of_1_runs_all_loops(looped, rule):
    _, model = looped
    output = model(IDS, exit_threshold=1, exit_rule=rule)
    assert torch.equal(output.logits, model(IDS).logits)
    with torch.no_grad():  # a router that gives all mass to the first loop: exact still runs the others
        kept = [layer.halting.bias.clone() for layer in model.model.layers]
        for layer in model.model.layers:
            layer.halting.bias.fill_(200.0)
        try:
            assert torch.equal(model(IDS, exit_threshold=1, exit_rule=rule).logits, model(IDS).logits)
            all_loops, one = model(IDS), model(IDS, exit_threshold=0.999)
            assert not torch.equal(all_loops.past_key_values.layers[2].keys, one.past_key_values.layers[2].keys)
        finally:
            for layer, bias in zip(model.model.layers, kept, strict=True):
                layer.halting.bias.copy_(bias)


def test_nobody_leaves(looped):
    """The packed form of all loops is the model's own."""
    _, model = looped
    settings = asked(("confidence", 0.9999999))
    output, exact = model(IDS, output_loop_stats=True, **settings), model(IDS, output_loop_stats=True)
    close(output.logits, exact.logits)
    for stats, all_stats in zip(output.loop_stats, exact.loop_stats, strict=True):
        assert (stats.loops == 3).all()
        close(stats.halting_probs, all_stats.halting_probs)


def test_halting_probabilities(looped):
    """They sum to 1 and the loop at which a token leaves has the last of them."""
    _, model = looped
    for stats in model(IDS, exit_threshold=0.7, output_loop_stats=True).loop_stats:
        assert stats.halting_probs.shape == (2, 12, 3)
        close(stats.halting_probs.sum(-1), torch.ones(2, 12))
        assert torch.equal((stats.halting_probs > 0).sum(-1), stats.loops)
        assert (stats.expected_loops() <= stats.loops).all()


def test_losses(looped):
    _, model = looped
    output = model(IDS, labels=IDS, exit_threshold=0.7, output_loop_stats=True)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    close(output.cross_entropy, expected)
    shares = [(stats.expected_loops()[:, :-1] - 1).mean() / 2 for stats in output.loop_stats]
    close(output.ponder_cost, torch.stack(shares).mean())


def test_bfloat16(looped):
    _, model = looped
    half = LoopMemForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    output = half(IDS, exit_threshold=0.7)
    assert output.logits.dtype == torch.bfloat16 and output.past_key_values.layers[-1].keys.dtype == torch.bfloat16
    torch.testing.assert_close(in_steps(half, IDS, exit_threshold=0.7), output.logits, rtol=0.1, atol=0.3)


# ------------------------------------------------------------------------------------------- batches, padding, cache


@pytest.mark.parametrize("exits", EXITS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_alone(looped, side, exits):
    _, model = looped
    batch = padded(PROMPTS, side)
    output = model(**batch, **asked(exits), output_loop_stats=True)
    assert torch.isfinite(output.logits).all()
    for row, prompt in enumerate(PROMPTS):
        real = batch["attention_mask"][row] == 1
        alone = model(torch.tensor([prompt]), **asked(exits), output_loop_stats=True)
        close(output.logits[row, real], alone.logits[0])
        for stats, of_one in zip(output.loop_stats, alone.loop_stats, strict=True):
            assert torch.equal(stats.loops[row, real], of_one.loops[0])
            assert (stats.loops[row, ~real] == 0).all()


@pytest.mark.parametrize("exits", EXITS, ids=str)
@pytest.mark.parametrize("variant", LOOPED)
def test_cached_equals_uncached(variant, exits):
    _, model = pair(variant)
    close(in_steps(model, IDS, **asked(exits)), model(IDS, use_cache=False, **asked(exits)).logits)
    with torch.inference_mode():
        one_by_one, cache = [], DynamicCache(config=model.config)
        for part in IDS.split(1, dim=1):
            one_by_one.append(model(part, past_key_values=cache, **asked(exits)).logits)
        close(torch.cat(one_by_one, dim=1), model(IDS, use_cache=False, **asked(exits)).logits)


@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_padded_batch_in_steps(looped, exits):
    _, model = looped
    batch, tail = padded(PROMPTS), IDS[:1].repeat(4, 1)[:, :3]
    cache = model(**batch, **asked(exits)).past_key_values
    mask = batch["attention_mask"]
    for column in range(3):
        mask = torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), dim=1)
        part = tail[:, column : column + 1]
        logits = model(part, attention_mask=mask, past_key_values=cache, **asked(exits)).logits
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt + tail[row, : column + 1].tolist()])
            close(logits[row, -1], model(ids, **asked(exits)).logits[0, -1])


def test_keys_of_later_loops_are_those_of_the_last(looped):
    _, model = looped
    output = model(IDS, exit_threshold=0.6, output_loop_stats=True)
    for layer, stats in enumerate(output.loop_stats):
        keys = [output.past_key_values.layers[2 * n + layer].keys.transpose(1, 2) for n in range(3)]
        for n in (1, 2):
            left = stats.loops <= n
            assert left.any() and torch.equal(keys[n][left], keys[n - 1][left])
            assert not left.all() or n == 2
            assert not torch.isclose(keys[n][~left], keys[n - 1][~left]).all(-1).any()


def test_a_sequence_of_padding_alone(looped):
    _, model = looped
    mask = torch.ones_like(IDS)
    mask[0] = 0
    output = model(IDS, attention_mask=mask, exit_threshold=0.6)
    assert torch.isfinite(output.logits).all()
    close(output.logits[1], model(IDS[1:], exit_threshold=0.6).logits[0])
    assert torch.isfinite(model(IDS, attention_mask=torch.zeros_like(IDS), exit_threshold=0.6).logits).all()


def test_exact_cache_continued_with_early_exit(looped):
    """Slots are the same: every token's keys are those of the setting it was computed with."""
    native, model = looped
    settings = [("halting", math.inf)] * 6 + [("halting", 0.6)] * 3 + [("confidence", 0.5)] * 3
    cache, logits = DynamicCache(), []
    for start, stop, kwargs in (
        (0, 6, {}),
        (6, 9, {"exit_threshold": 0.6}),
        (9, 12, {"exit_threshold": 0.5, "exit_rule": "confidence"}),
    ):
        logits.append(model(IDS[:1, start:stop], past_key_values=cache, **kwargs).logits[0])
    close(torch.cat(logits), reference(native, IDS[0].tolist(), settings)[0])


def test_cache_of_other_caps(looped):
    _, model = looped
    cache = model(IDS, num_loops=[1, 2], exit_threshold=0.6).past_key_values
    said = refusal(model, IDS[:, :1], past_key_values=cache, num_loops=[2, 1], exit_threshold=0.6)
    assert "holds 3 slots and this call needs 3, one for each layer and loop, and they are of other loops" in said


# ---------------------------------------------------------------------------------------------------- what is skipped


def test_tokens_that_have_left_cost_nothing(looped):
    """Feed-forward, projections and memory see each token as often as it runs a loop, padding never."""
    _, model = looped
    seen = {}
    parts = {"mlp": "mlp", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "memory.local_gate": "memory"}
    hooks = []
    for layer in model.model.layers:
        for path, name in parts.items():

            def count(_, args, key=(layer.index, name)):
                seen[key] = seen.get(key, 0) + args[0].shape[:-1].numel()

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(count))
    output = model(**padded(PROMPTS), exit_threshold=0.6, output_loop_stats=True)
    for hook in hooks:
        hook.remove()
    for layer, stats in enumerate(output.loop_stats):
        run = int(stats.loops.sum())
        assert sum(map(len, PROMPTS)) < run < 3 * sum(map(len, PROMPTS))
        assert {seen[layer, name] for name in parts.values()} == {run}


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_each_prompt_of_a_batch_is_continued_as_alone(looped, exits):
    _, model = looped
    settings = {"max_new_tokens": 10, "do_sample": False, **asked(exits)}
    batch = model.generate(**padded(PROMPTS), **settings)
    assert torch.equal(batch, model.generate(**padded(PROMPTS), use_cache=False, **settings))
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **settings)
        assert torch.equal(alone[0, len(prompt) :], batch[row, 7:])


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_loops": [1, 3]}, {"do_sample": True, "top_k": 20}],
    ids=str,
)
def test_ways_to_generate(looped, settings):
    """What reorders or crops the cache leaves a cache that goes on."""
    _, model = looped
    ids = IDS[:1].repeat(1, 2)
    texts = []
    for use_cache in (True, False) if "prompt_lookup_num_tokens" not in settings else (True,):
        torch.manual_seed(5)
        settings = {"do_sample": False, **settings, "exit_threshold": 0.7, "max_new_tokens": 12}
        texts.append(model.generate(ids, use_cache=use_cache, **settings))
    if len(texts) == 1:
        texts.append(model.generate(ids, do_sample=False, exit_threshold=0.7, max_new_tokens=12))
    assert torch.equal(*texts)


# -------------------------------------------------------------------------------------------- configuration, refusals


def test_threshold_of_the_config(looped):
    _, model = looped
    config = LoopMemConfig(**SIZES, **VARIANTS["full"], exit_threshold=0.6, exit_rule="confidence")
    early = LoopMemForCausalLM(config).eval()
    early.load_state_dict(model.state_dict())
    assert torch.equal(early(IDS).logits, model(IDS, exit_threshold=0.6, exit_rule="confidence").logits)
    assert torch.equal(early(IDS, exit_threshold=1).logits, model(IDS).logits)
    assert torch.equal(
        early(IDS, exit_threshold=0.7, exit_rule="halting").logits, model(IDS, exit_threshold=0.7).logits
    )
    assert torch.equal(early(IDS, exit_rule="halting").logits, model(IDS, exit_threshold=0.6).logits)
    for settings in ({}, {"exit_rule": "halting"}):
        close(early.train()(IDS, **settings).logits, model(IDS).logits)  # training runs all loops
    early.config.exit_threshold = None  # its rule is then that of the thresholds to come
    assert torch.equal(early.eval()(IDS).logits, model(IDS).logits)


def test_gradients_flow(looped):
    """No tensor that the backward pass needs is written over."""
    native = native_model(looped[0].config)
    model = LoopMemForCausalLM(LoopMemConfig(**SIZES, **VARIANTS["full"])).eval()
    model.load_state_dict(native.state_dict())
    model(IDS, labels=IDS, exit_threshold=0.7).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, math.nan, math.inf, "0.5"])
def test_thresholds_outside(looped, threshold):
    _, model = looped
    assert "valid: above 0, at most 1" in refusal(model, IDS, exit_threshold=threshold)
    assert "valid: none, or above 0 and at most 1" in refusal(LoopMemConfig, exit_threshold=threshold)


def test_unknown_rule(looped):
    _, model = looped
    assert "valid: halting, confidence" in refusal(model, IDS, exit_threshold=0.5, exit_rule="entropy")
    assert "valid: halting, confidence" in refusal(model, IDS, exit_rule="entropy")
    assert "'halting', 'confidence'" in refusal(LoopMemConfig, exit_rule="entropy")


def test_a_rule_without_a_threshold(looped):
    _, model = looped
    for call, settings in ((model, {}), (model.generate, {"max_new_tokens": 2})):
        said = refusal(call, IDS, exit_rule="confidence", **settings)
        assert "exit_rule='confidence' is about exit_threshold: add exit_threshold" in said


def test_a_model_that_does_not_loop():
    _, model = pair("plain")
    assert "does not loop" in refusal(model, IDS, exit_threshold=0.5)
    assert "there is no loop to leave" in refusal(LoopMemConfig, **VARIANTS["plain"], exit_threshold=0.5)


@pytest.mark.parametrize("num_loops", [[1], [1, 2, 3], [1, 0], [1, 1.5], [], True, 2.0])
def test_bad_caps(looped, num_loops):
    _, model = looped
    assert "one for each of the 2 layers" in refusal(model, IDS, num_loops=num_loops)
