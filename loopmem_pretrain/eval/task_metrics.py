"""What an item of a task scores, from the log-probabilities of its continuations; task files name what is here.

The continuation is what follows the prompt, the space before it included, and its bytes are those of its UTF-8 text:

    bits per byte = -log2 P(gold continuation | prompt) / bytes
"""

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

Results = Sequence[tuple[float, bool]]
"""For each request of an item: log-probability in nats, and whether greedy decoding would have written it."""


def choice_scores(item: dict[str, Any], results: Results) -> dict[str, float]:
    """Rank choice: one request a choice, and in a `PriorTask` one a choice without the question.

    `acc` takes the likeliest choice, `acc_norm` the one likeliest per character, `acc_pmi` the one whose probability
    the question raises most.
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
        scores["acc_pmi"] = _hit([with_ - without for with_, without in zip(given, alone, strict=True)], gold)
    return scores


class PriorTask(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
    """Rank choice that also scores each choice after `metadata.prior`, what a prompt without its question is.

    The harness's own `acc_mutual_info` scores them after no text at all, which its models begin with different tokens.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        given = super().construct_requests(doc, ctx, **kwargs)
        alone = super().construct_requests(doc, self.config.metadata["prior"], **kwargs)
        for number, request in enumerate(alone, start=len(given)):
            request.idx = number  # the harness sorts answers by it
        return [*given, *alone]


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
