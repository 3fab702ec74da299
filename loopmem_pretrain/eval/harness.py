"""This package's models as a backend of lm-evaluation-harness, and a model of the harness that only scores windows.

Importing this module registers the backend `loopmem`, so the harness finds it by name:

    import loopmem_pretrain.eval.harness
    lm_eval.simple_evaluate(model="loopmem", model_args={"pretrained": "runs/demo", "num_loops": 2}, tasks=[...])

Text becomes tokens as in the harness's own `hf` model: prompt and continuation are encoded together and split after as
many tokens as the prompt alone has; what has no prompt is scored after the end-of-document token.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lm_eval.models  # noqa: F401 - its models register themselves only while the registry is empty
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows

from loopmem_pretrain.errors import CheckpointError, ConfigError, DataError
from loopmem_pretrain.eval.opening import Opened, open_scorer, settings_of
from loopmem_pretrain.eval.perplexity import POOL
from loopmem_pretrain.eval.scoring import (
    BROKEN,
    Setting,
    Window,
    WindowScore,
    continuation_windows,
    gates_closed,
    window_scores,
)
from loopmem_pretrain.model.decoding import decoding
from loopmem_pretrain.model.early_exit import early_exit, exit_forward

MOST_NEW_TOKENS = 256
"""Of a generation whose task names no number, as in the harness's own models."""


class WindowLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model of the harness that is asked for nothing but the scores of windows of tokens."""

    def __init__(
        self,
        score: Callable[[list[Window]], Sequence[WindowScore]],
        encode: Callable[[str], list[int]],
        eos_id: int,
        context: int,
    ) -> None:
        """`score` scores windows of up to `context` inputs; `encode` adds no marks."""
        super().__init__()
        self.score, self.encode, self.eos_id, self.max_length = score, encode, eos_id, context
        self.shortened = 0
        """Prompts so far that did not fit into the context with their continuation and lost their beginning."""
        self.tokens, self.loops = 0, 0.0
        """Tokens of continuations so far, and with early exit the loops they ran, mean over layers, summed."""

    @property
    def eot_token_id(self) -> int:
        return self.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding writes."""
        windows: list[Window] = []
        for number, (texts, prompt, continuation) in enumerate(requests):
            if not continuation:
                raise DataError(f"{texts!r}: the continuation has no token of its own", "leave this item out")
            ids = [*prompt, *continuation]
            self.shortened += len(ids) - 1 > self.max_length
            windows += continuation_windows(number, ids, len(continuation), self.max_length)
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        for window, (value, is_greedy, loops) in zip(windows, self.score(windows), strict=True):
            nats[window.document] += value
            greedy[window.document] &= is_greedy
            self.tokens, self.loops = self.tokens + window.scored, self.loops + (loops or 0.0)
        return [(-value, is_greedy) for value, is_greedy in zip(nats, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in windows as the harness cuts them."""
        windows = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for inputs, predicted in get_rolling_token_windows(self.encode(text), self.eos_id, self.max_length, 1):
                windows.append(Window(number, [*inputs, predicted[-1]], len(predicted)))
        sums = [0.0] * len(requests)
        for window, score in zip(windows, self.score(windows), strict=True):
            sums[window.document] -= score.nats
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("this model scores text and does not write any", "use tasks that rank or score continuations")


@register_model("loopmem")
class LoopMemHarness(WindowLM):
    """A run folder (its newest checkpoint), one of its checkpoints, or an exported folder."""

    def __init__(
        self,
        pretrained: str,
        num_loops: int | None = None,
        gates_closed: bool = False,
        exit_threshold: float | None = None,
        exit_rule: str = "halting",
        batch_size: int | str = 8,
        device: str = "cpu",
        **_: Any,
    ) -> None:
        """Arguments as in `loopmem eval`, `gates_closed` runs without memory; what else the harness gives is not used.

        Raises:
            LoopMemError: as `open_scorer` and `settings_of` say.
        """
        self.opened = open_scorer(pretrained, int(batch_size), device)
        loops = [] if num_loops is None else [str(num_loops)]
        thresholds = [] if exit_threshold is None else [float(exit_threshold)]
        (setting,) = settings_of(self.opened.model, loops, thresholds, exit_rule)
        if gates_closed and self.opened.model.model.memory is None:
            raise ConfigError("gates_closed: this model has no memory", "leave gates_closed out")
        self.setting = setting._replace(gates_closed=bool(gates_closed))
        codec, context = self.opened.codec, self.opened.context
        super().__init__(scorer_of(self.opened, self.setting), codec.encode, codec.eos_id, context)

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes until one of the task's stop strings, the end of document or its limit."""
        with gates_closed(self.opened.model) if self.setting.gates_closed else nullcontext():
            return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, wishes: dict[str, Any]) -> str:
        from transformers import DynamicCache

        from loopmem_pretrain.hf.cache import cache_with_slots

        if wishes.get("do_sample") or wishes.get("temperature"):
            raise ConfigError("this model decodes greedily, and the task asks for drawn tokens", "set do_sample: false")
        limit = int(wishes.get("max_gen_toks", MOST_NEW_TOKENS))
        until = wishes.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        if limit >= self.max_length:
            raise ConfigError(
                f"max_gen_toks {limit} leaves no room for a prompt in the context of {self.max_length}",
                "lower it in the task's generation_kwargs",
            )
        ids = self.encode(prompt) or [self.eos_id]
        self.shortened += len(ids) > self.max_length - limit
        model, codec = self.opened.model, self.opened.codec
        tokens = torch.tensor([ids[-(self.max_length - limit) :]], device=next(model.parameters()).device)
        early = early_exit(self.setting.exit_threshold, self.setting.exit_rule or "halting")
        cache, new, text = DynamicCache(), list[int](), ""
        cache_with_slots(cache, [self.setting.num_loops or 1] * model.config.num_hidden_layers, 1)
        while len(new) < limit and not any(stop in text for stop in stops):
            told = decoding(tokens.shape[1], cache.get_seq_length(), tokens.device, cache=cache)
            if early is None:
                hidden, _ = model.model(tokens, self.setting.num_loops, told)
            else:
                hidden, _ = exit_forward(model.model, tokens, early, self.setting.num_loops, told)
            tokens = model.lm_head(hidden[:, -1:])[..., : codec.vocab_size].argmax(-1)
            if int(tokens) == codec.eos_id:
                break
            new.append(int(tokens))
            text = codec.decode(new)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def scorer_of(
    opened: Opened, setting: Setting, on_windows: Callable[[int], object] = lambda done: None
) -> Callable[[list[Window]], list[WindowScore]]:
    """What scores windows with an opened model; `on_windows` is told how many more are done.

    Raises:
        CheckpointError: the model gives a cross-entropy that is not finite.
    """

    def score(some: list[Window]) -> list[WindowScore]:
        scores: list[WindowScore] = []
        size = POOL * opened.batch_size
        for start in range(0, len(some), size):
            pool = window_scores(opened.model, some[start : start + size], opened.batch_size, setting)
            for value in (score.nats for score in pool):
                if not math.isfinite(value):
                    loops = "" if setting.num_loops is None else f" at {setting.num_loops} loops"
                    raise CheckpointError(f"the model's cross-entropy is {value}{loops}", BROKEN)
            scores += pool
            on_windows(len(pool))
        return scores

    return score
