"""What an item of a task scores, from the log-probabilities of its continuations; task files name these functions.

The continuation is what follows the prompt, the space before it included, and its bytes are those of its UTF-8 text:

    bits per byte = -log2 P(gold continuation | prompt) / bytes
"""

import math
from collections.abc import Sequence
from typing import Any

Results = Sequence[tuple[float, bool]]
"""For each request of an item: log-probability in nats, and whether greedy decoding would have written it."""


def choice_scores(item: dict[str, Any], results: Results) -> dict[str, float]:
    """Rank choice: one request a choice, then, for `acc_mutual_info`, one a choice without the prompt.

    `acc` takes the likeliest choice, `acc_norm` the one likeliest per character, `acc_mutual_info` the one whose
    probability the prompt raises most.
    """
    choices, gold = item["choices"], item["gold"]
    nats = [value for value, _ in results]
    given, alone = nats[: len(choices)], nats[len(choices) :]
    scores = {
        "acc": _hit(given, gold),
        "acc_norm": _hit([value / len(choice) for value, choice in zip(given, choices, strict=True)], gold),
        "bits_per_byte": _bits_per_byte(given[gold], choices[gold]),
    }
    if alone:
        scores["acc_mutual_info"] = _hit([with_ - without for with_, without in zip(given, alone, strict=True)], gold)
    return scores


def context_scores(item: dict[str, Any], results: Results) -> dict[str, float]:
    """One continuation after several prompts: under which one is it likeliest?"""
    nats = [value for value, _ in results]
    gold = item["gold"]
    return {"acc": _hit(nats, gold), "bits_per_byte": _bits_per_byte(nats[gold], item["continuation"])}


def continuation_scores(item: dict[str, Any], results: Results) -> dict[str, float]:
    """One continuation after one prompt."""
    ((nats, greedy),) = results
    return {"acc": float(greedy), "bits_per_byte": _bits_per_byte(nats, item["continuation"])}


def _hit(scores: Sequence[float], gold: int) -> float:
    return float(max(range(len(scores)), key=scores.__getitem__) == gold)


def _bits_per_byte(nats: float, text: str) -> float:
    return -nats / math.log(2) / len(f" {text}".encode())
