"""Perplexity a token and bits per UTF-8 byte of a domain, with standard errors by document.

    perplexity    = exp(sum of nats / sum of tokens)          bits per byte = sum of nats / (ln 2 * sum of bytes)

Sums go over documents. Both are functions of a ratio of sums, r = sum x / sum y, over n documents; its standard error
is the usual linearised one of a ratio estimator, sqrt(n / (n - 1) * sum (x - r y)^2) / sum y. One document has none.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any, NamedTuple

from loopmem_pretrain.errors import CheckpointError, DataError
from loopmem_pretrain.eval.documents import Domain
from loopmem_pretrain.eval.scoring import BROKEN, Setting, Window, require_finite, window_scores, windows

POOL = 32
"""Batches of windows that are put in order of length together."""


class Scorer(NamedTuple):
    """A model and how it reads text."""

    model: Any
    """LoopMemLM or LoopMemForCausalLM, in evaluation mode."""
    encode: Callable[[str], list[int]]
    """Text to token ids, no marks added."""
    decode: Callable[[list[int]], str]
    """Token ids to text."""
    eos_id: int
    """The end-of-document token."""
    context: int
    """Tokens the model reads at once."""
    batch_size: int
    """Windows in one forward pass."""


class Ratio(NamedTuple):
    """sum x / sum y."""

    value: float
    standard_error: float | None
    """None for one document."""


class Score(NamedTuple):
    """A domain under one setting, sums over its documents."""

    setting: Setting
    nats: float
    document_nats: list[float]
    """Of each document: what two models are compared by, on the same text."""
    perplexity: Ratio
    """A token; its standard error is perplexity times that of the nats a token."""
    bits_per_byte: Ratio
    mean_loops: float | None = None
    """With early exit: loops that a predicted token ran, mean over layers."""


class DomainScores(NamedTuple):
    """A domain under every setting."""

    name: str
    documents: int
    of: int | None
    """Documents that the domain has; None where they are the first ones of a file not read to its end."""
    tokens: int
    bytes: int
    document_tokens: list[int]
    document_bytes: list[int]
    changed: int
    """Documents that do not come back from their tokens: their bytes count, but not all of them are predicted."""
    text_sha256: str
    """Of the documents as they were scored, in order, a NUL byte after each."""
    scores: list[Score]


def measure(
    scorer: Scorer,
    domain: Domain,
    settings: Sequence[Setting],
    max_documents: int | None = None,
    on_windows: Callable[[int, int], object] = lambda windows, documents: None,
) -> DomainScores:
    """Score a domain's documents, or the first `max_documents` of its texts.

    `on_windows` is told how many windows were scored so far, and of how many documents they are.

    Raises:
        DataError: no document, a document without a token, or a file that cannot be read.
        CheckpointError: the model gives a cross-entropy that is not finite.
    """
    tokens: list[int] = []
    sizes: list[int] = []
    digest, changed = sha256(), 0

    def all_windows() -> Iterator[Window]:
        nonlocal changed
        for number, text in enumerate(islice(domain.texts, max_documents)):
            written = text.decode("utf-8")
            ids = scorer.encode(written)
            if not ids:
                raise DataError(
                    f"{domain.name}: document {number + 1} ({len(text):,} bytes) encodes to no token",
                    "remove it: the tokenizer drops all of its text",
                )
            tokens.append(len(ids))
            sizes.append(len(text))
            # Some tokenizers add a space at the beginning; that loses nothing.
            changed += scorer.decode(ids).strip() != written.strip()
            digest.update(text + b"\0")
            yield from windows(number, [scorer.eos_id, *ids], scorer.context)

    nats: dict[Setting, dict[int, float]] = {setting: defaultdict(float) for setting in settings}
    loops = dict.fromkeys(settings, 0.0)
    stream, done = all_windows(), 0
    while pool := list(islice(stream, POOL * scorer.batch_size)):
        for setting, sums in nats.items():
            scored = window_scores(scorer.model, pool, scorer.batch_size, setting)
            for window, (value, _, ran) in zip(pool, scored, strict=True):
                require_finite(value, setting, f"{domain.name}: document {window.document + 1}: ")
                sums[window.document] += value
                loops[setting] += ran or 0.0
        done += len(pool)
        on_windows(done, len(tokens))
    if not tokens:
        raise DataError(f"{domain.name}: holds no document with a visible character", "give a file with text in it")
    scores = [
        score(setting, [sums[number] for number in range(len(tokens))], tokens, sizes) for setting, sums in nats.items()
    ]
    scores = [
        one if one.setting.exit_threshold is None else one._replace(mean_loops=loops[one.setting] / sum(tokens))
        for one in scores
    ]
    of = domain.of
    if of is None and len(tokens) != max_documents:
        of = len(tokens)
    totals = (len(tokens), of, sum(tokens), sum(sizes))
    return DomainScores(domain.name, *totals, tokens, sizes, changed, digest.hexdigest(), scores)


def score(setting: Setting, nats: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]) -> Score:
    """Perplexity and bits per byte of documents of so many nats, tokens and bytes each.

    Raises:
        CheckpointError: the perplexity is larger than any number.
    """
    a_token, a_byte = ratio(nats, tokens), ratio([value / math.log(2) for value in nats], sizes)
    try:
        perplexity = math.exp(a_token.value)
    except OverflowError:
        raise CheckpointError(f"the cross-entropy is {a_token.value:,.0f} nats a token", BROKEN) from None
    error = None if a_token.standard_error is None else perplexity * a_token.standard_error
    return Score(setting, math.fsum(nats), list(nats), Ratio(perplexity, error), a_byte)


def ratio(x: Sequence[float], y: Sequence[int]) -> Ratio:
    """sum x / sum y over documents, and its standard error."""
    value, n = math.fsum(x) / sum(y), len(x)
    if n < 2:
        return Ratio(value, None)
    squares = math.fsum((above - value * below) ** 2 for above, below in zip(x, y, strict=True))
    return Ratio(value, math.sqrt(n / (n - 1) * squares) / sum(y))
