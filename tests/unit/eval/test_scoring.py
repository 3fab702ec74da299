"""Windows, cross-entropy and ratios against slow references."""

import math
from hashlib import sha256

import pytest
import torch
import torch.nn.functional as F

from loopmem_pretrain.errors import CheckpointError, DataError
from loopmem_pretrain.eval.documents import Domain
from loopmem_pretrain.eval.perplexity import Scorer, measure, ratio, score
from loopmem_pretrain.eval.scoring import Setting, gates_closed, stride_of, token_scores, window_scores, windows
from loopmem_pretrain.model.early_exit import EarlyExit, exit_forward
from tests.unit.hf.conftest import model_config, native_model

CONTEXT = 16
TEXTS = [b"A", b"The quick brown fox jumps over the lazy dog.", b"It was spring. " * 9, "gro\u00df".encode() * 5]


class Bytes:
    """A tokenizer of bytes: token 3 + byte."""

    eos_id = 2

    def encode(self, text):
        return [3 + byte for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 3 for token in ids).decode()


@pytest.fixture(scope="module")
def model():
    return native_model(model_config("full"))


def scorer(model, batch_size=3, context=CONTEXT):
    return Scorer(model, Bytes().encode, Bytes().decode, Bytes.eos_id, context, batch_size)


def scores(model, settings, texts=TEXTS, **sizes):
    return measure(scorer(model, **sizes), Domain("toy", iter(texts)), settings)


def slow_nats(model, ids, num_loops, context=CONTEXT):
    """One document, one token at a time."""
    stride, total = context // 2, 0.0
    for position in range(1, len(ids)):
        first = 0 if position <= context else -(-(position - context) // stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:position]]), num_loops=num_loops).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[ids[position]])
    return total


@pytest.mark.parametrize("context", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 10, 31])
def test_every_token_after_the_first_is_predicted_once(context, length):
    ids = list(range(length))
    cut = list(windows(0, ids, context))
    assert [token for window in cut for token in window.ids[-window.scored :]] == ids[1:]
    assert all(len(window.ids) <= context + 1 for window in cut)
    for window in cut[1:]:
        first_sees = len(window.ids) - window.scored
        assert first_sees == context - stride_of(context) + 1


@pytest.mark.parametrize("variant", ["full", "plain", "topk", "product_keys"])
def test_equals_a_token_at_a_time(variant):
    model = native_model(model_config(variant))
    loops = [None] if variant == "plain" else [1, 3, 5]
    result = scores(model, [Setting(n) for n in loops])
    tokens, sizes = [len(text) for text in TEXTS], [len(text) for text in TEXTS]
    assert (result.documents, result.tokens, result.bytes) == (len(TEXTS), sum(tokens), sum(sizes))
    for setting, got in zip(loops, result.scores, strict=True):
        nats = [slow_nats(model, [Bytes.eos_id, *Bytes().encode(text.decode())], setting) for text in TEXTS]
        expected = score(Setting(setting), nats, tokens, sizes)
        assert got.nats == pytest.approx(expected.nats, rel=1e-5)
        assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert got.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(model, batch_size):
    one = scores(model, [Setting(3)], batch_size=5).scores[0]
    assert scores(model, [Setting(3)], batch_size=batch_size).scores[0].nats == pytest.approx(one.nats, rel=1e-6)


def test_logits_in_pieces_are_the_same(model, monkeypatch):
    whole = scores(model, [Setting(3)]).scores[0]
    monkeypatch.setattr("loopmem_pretrain.eval.scoring.LOGIT_BYTES", 7 * 4 * model.config.vocab_size)
    assert scores(model, [Setting(3)]).scores[0].nats == pytest.approx(whole.nats, rel=1e-6)


def test_the_models_own_loops_are_the_default(model):
    ids = [Bytes.eos_id, *Bytes().encode(TEXTS[1].decode()[:CONTEXT])]
    with torch.no_grad():
        loss = model(torch.tensor([ids[:-1]]), labels=torch.tensor([ids[1:]])).cross_entropy
    ((nats, *_),) = window_scores(model, list(windows(0, ids, CONTEXT)), 1, Setting(model.config.max_loops))
    assert nats == pytest.approx(float(loss) * (len(ids) - 1), rel=1e-5)


def test_closed_gates_are_gates_of_0(model):
    closed = scores(model, [Setting(3, gates_closed=True)]).scores[0]
    assert model.model.memory is not None
    shut = native_model(model_config("full"))
    with torch.no_grad():
        for name, parameter in shut.named_parameters():
            if "_gate." in name:
                parameter.fill_(-1e4 if name.endswith("bias") else 0.0)
    assert closed.nats == pytest.approx(scores(shut, [Setting(3)]).scores[0].nats, rel=1e-6)
    assert closed.nats != pytest.approx(scores(model, [Setting(3)]).scores[0].nats, rel=1e-3)


def test_the_memory_comes_back_after_an_error(model):
    with pytest.raises(RuntimeError), gates_closed(model):
        raise RuntimeError
    assert model.model.memory is not None


def test_uniform_predictions_by_hand():
    """A head of zeros: log V nats a token; 3 tokens of a byte each, so log2 V bits a byte."""
    flat = native_model(model_config("loop"))
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    got = scores(flat, [Setting(3)], texts=[b"abc", b"wxyz"]).scores[0]
    assert got.perplexity.value == pytest.approx(512)
    assert got.bits_per_byte.value == pytest.approx(9)
    assert got.bits_per_byte.standard_error == pytest.approx(0, abs=1e-6)


def test_bfloat16_logits_are_scored_in_float32():
    """In bf16 each token's nats would be rounded to two or three digits."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, 320, generator=generator)).bfloat16()
    targets = torch.randint(320, (50,), generator=generator)
    nats, misses = token_scores(logits, targets)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(nats.double(), expected, rtol=1e-6, atol=1e-6)
    assert misses.tolist() == [float(best != target) for best, target in zip(logits.argmax(-1), targets, strict=True)]


def test_bits_per_byte_by_hand():
    """Two documents of 2 and 6 bits, 1 and 3 tokens, 4 and 4 bytes."""
    got = score(Setting(1), [2 * math.log(2), 6 * math.log(2)], [1, 3], [4, 4])
    assert got.bits_per_byte.value == pytest.approx(8 / 8)
    assert got.bits_per_byte.standard_error == pytest.approx(math.sqrt(2 * (2**2 + 2**2)) / 8)
    assert got.perplexity == pytest.approx((4.0, 0.0))


def test_the_error_of_a_perplexity_by_hand():
    """Documents of 1 and 3 nats, a token each: 2 nats a token, with an error of 1; d exp(x) = exp(x) dx."""
    got = score(Setting(1), [1.0, 3.0], [1, 1], [4, 4])
    assert got.perplexity == pytest.approx((math.exp(2), math.exp(2)))


def test_the_standard_error_of_a_mean():
    """Documents of one token: the ratio is a mean, its error the textbook's."""
    values = [1.0, 2.0, 4.0, 9.0]
    spread = torch.tensor(values).std(correction=1).item()
    assert ratio(values, [1] * 4) == pytest.approx((4.0, spread / 2))


def test_one_document_has_no_standard_error(model):
    got = scores(model, [Setting(3)], texts=TEXTS[1:2]).scores[0]
    assert got.perplexity.standard_error is None and got.bits_per_byte.standard_error is None


def test_first_documents(model):
    two = measure(scorer(model), Domain("toy", iter(TEXTS)), [Setting(3)], max_documents=2)
    assert two == scores(model, [Setting(3)], texts=TEXTS[:2])._replace(of=None)
    more = measure(scorer(model), Domain("toy", iter(TEXTS)), [Setting(3)], max_documents=len(TEXTS) + 1)
    assert more.of == more.documents == len(TEXTS)
    some = measure(scorer(model), Domain("toy", iter(TEXTS), 99), [Setting(3)], max_documents=2)
    assert (some.documents, some.of) == (2, 99)


def test_the_text_has_a_hash_in_which_documents_are_apart(model):
    assert scores(model, [Setting(3)], texts=[b"ab", b"c"]).text_sha256 == sha256(b"ab\0c\0").hexdigest()


def test_no_document(model):
    with pytest.raises(DataError, match="toy: holds no document"):
        scores(model, [Setting(3)], texts=[])


def test_text_without_a_token(model):
    silent = scorer(model)._replace(encode=lambda text: [])
    with pytest.raises(DataError, match=r"toy: document 1 \(1 bytes\) encodes to no token"):
        measure(silent, Domain("toy", iter(TEXTS)), [Setting(3)])


def test_documents_that_the_tokenizer_changes(model):
    """Their bytes count and are not all predicted. A blank that it puts before a text loses nothing."""
    prefixed = scorer(model)._replace(decode=lambda ids: " " + Bytes().decode(ids))
    small = prefixed._replace(encode=lambda text: Bytes().encode(text.lower()))
    for reader, changed in ((scorer(model), 0), (prefixed, 0), (small, 3)):
        assert measure(reader, Domain("toy", iter(TEXTS)), [Setting(3)]).changed == changed


def test_not_a_number():
    broken = native_model(model_config("loop"))
    with torch.no_grad():
        broken.model.embed_tokens.weight[3 + ord("q")] = math.nan
    with pytest.raises(CheckpointError, match="toy: document 2: the model's cross-entropy is nan at 3 loops"):
        scores(broken, [Setting(3)])


def test_a_perplexity_beyond_numbers():
    with pytest.raises(CheckpointError, match="900 nats a token"):
        score(Setting(1), [900.0], [1], [1])


@pytest.mark.parametrize("rule", ["halting", "confidence"])
def test_early_exit(model, rule):
    """A document is scored from the hidden states of the model's own early exit; loops are those of scored tokens."""
    early = Setting(3, exit_threshold=0.7, exit_rule=rule)
    got = scores(model, [Setting(3), early, early._replace(exit_threshold=1)], texts=TEXTS[1:2], context=64)
    exact, left, all_loops = got.scores
    ids = torch.tensor([[Bytes.eos_id, *TEXTS[1]]]) + torch.tensor([0] + [3] * len(TEXTS[1]))
    with torch.no_grad():
        hidden, stats = exit_forward(model.model, ids[:, :-1], EarlyExit(0.7, rule), 3)
        nats = F.cross_entropy(model.lm_head(hidden)[0], ids[0, 1:], reduction="sum")
    assert left.nats == pytest.approx(float(nats), rel=1e-5)
    assert left.mean_loops == pytest.approx(float(torch.stack([one.loops for one in stats]).float().mean()))
    assert 1 < left.mean_loops < 3 and left.nats != pytest.approx(exact.nats, rel=1e-4)
    assert all_loops._replace(setting=exact.setting) == exact._replace(mean_loops=3)


def test_early_exit_does_not_depend_on_the_batch(model):
    early = [Setting(3, exit_threshold=0.7, exit_rule="halting")]
    one, other = (scores(model, early, batch_size=size).scores[0] for size in (1, 64))
    assert one.nats == pytest.approx(other.nats, rel=1e-6) and one.mean_loops == other.mean_loops
