"""This package's models as a backend of lm-evaluation-harness, and a model of the harness that only scores windows.

Importing this module registers the backend `loopmem`, so the harness finds it by name:

    import loopmem_pretrain.eval.harness
    lm_eval.simple_evaluate(model="loopmem", model_args={"pretrained": "runs/demo", "num_loops": 2}, tasks=[...])

Text becomes tokens as in the harness's own `hf` model: prompt and continuation are encoded together and split after as
many tokens as the prompt alone has; what has no prompt is scored after the end-of-document token.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lm_eval.models  # noqa: F401 - its models register themselves only while the registry is empty
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from loopmem_pretrain.errors import ConfigError, DataError
from loopmem_pretrain.eval.opening import Opened, open_for_scoring, settings_of
from loopmem_pretrain.eval.perplexity import POOL
from loopmem_pretrain.eval.scoring import (
    Setting,
    Window,
    WindowScore,
    continuation_windows,
    gates_closed,
    require_finite,
    window_scores,
)
from loopmem_pretrain.inference.generate import Continuation
from loopmem_pretrain.model.early_exit import early_exit

MOST_NEW_TOKENS = 256
"""Of a generation whose task names no number, as in the harness's own models."""
ARGUMENTS = ("pretrained", "num_loops", "gates_closed", "exit_threshold", "exit_rule", "batch_size", "device")
"""What `model_args` may name, as messages list it."""
_OF_OTHERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty")
"""Settings of a generation that draws, or searches beams; they change nothing where the likeliest token is taken."""
_OFF = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0}
"""Settings that would change what is written, and the value of each at which they do not."""


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
            ids = [*(prompt or [self.eos_id]), *continuation]  # a prompt of blanks is the continuation's beginning
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
        exit_rule: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """Arguments as in `loopmem eval`, `gates_closed` runs without memory.

        The harness hands in two more, which change nothing: `max_batch_size` is about batch sizes that are searched
        for, and no code of a folder runs here that `trust_remote_code` could allow.

        Raises:
            ConfigError: an argument that is not known or not valid.
            LoopMemError: as `open_for_scoring` and `settings_of` say.
        """
        if unknown:
            raise ConfigError(f"model_args: unknown {', '.join(sorted(unknown))}", f"valid: {', '.join(ARGUMENTS)}")
        if exit_rule is not None and exit_threshold is None:
            raise ConfigError("exit_rule is about exit_threshold", "add exit_threshold, or leave it out")
        if gates_closed not in (True, False):
            raise ConfigError(f"gates_closed {gates_closed!r} is not valid", "give true or false")
        loops = [] if num_loops is None else [str(num_loops)]
        thresholds = [] if exit_threshold is None else [_number("exit_threshold", exit_threshold, float)]
        self.opened = open_for_scoring(pretrained, _number("batch_size", batch_size, int), device)
        setting, *others = settings_of(self.opened.model, loops, thresholds, exit_rule or "halting")
        if others:
            raise ConfigError(f"num_loops {num_loops}: the harness measures one setting at a time", "give one number")
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
        limit, stops = _greedy(wishes)
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
        continuation, new, text = Continuation(model, codec.vocab_size, self.setting.num_loops, early), list[int](), ""
        while len(new) < limit and not any(stop in text for stop in stops):
            tokens = continuation.scores(tokens).argmax().view(1, 1)
            if int(tokens) == codec.eos_id:
                break
            new.append(int(tokens))
            text = codec.decode(new)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    try:
        return kind(str(value))
    except ValueError:
        raise ConfigError(f"{name} {value!r} is not valid", "give a number") from None


def _greedy(wishes: dict[str, Any]) -> tuple[int, list[str]]:
    """How many tokens a task's generation_kwargs ask for, and the strings that end them, read as the harness's own
    models read them.

    Raises:
        ConfigError: it asks for another text than greedy decoding writes.
    """
    asked: dict[str, Any] = {**normalize_gen_kwargs(wishes, MOST_NEW_TOKENS)}
    limit, until, drawn = (asked.pop(key) for key in ("max_gen_toks", "until", "do_sample"))
    fix = "change the task's generation_kwargs"
    if drawn:
        raise ConfigError("this model decodes greedily, and the task asks for drawn tokens", "set do_sample: false")
    other = [
        f"{key}: {value}"
        for key, value in asked.items()
        if key not in _OF_OTHERS and value is not None and value != _OFF.get(key)
    ]
    if other:
        raise ConfigError(f"this model decodes greedily, and the task asks for {', '.join(other)}", fix)
    if limit < 1:
        raise ConfigError(f"max_gen_toks {limit} is not valid", fix)
    return limit, [stop for stop in until if stop]


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
            for each in pool:
                require_finite(each.nats, setting)
            scores += pool
            on_windows(len(pool))
        return scores

    return score
