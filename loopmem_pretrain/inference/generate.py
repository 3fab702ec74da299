"""Continue a text, with the model in memory or in Hugging Face form, and show it as it grows.

Both forms draw the same tokens from the same seed: what differs is who runs the loop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.model.decoding import make_decoding
from loopmem_pretrain.model.early_exit import EXIT_RULES, EarlyExit, early_exit, exit_forward
from loopmem_pretrain.model.loopmem import LoopMemLM, NumLoops, loops_of_layers

OnText = Callable[[str], object]

NEW_TOKENS = 100
"""Of a text whose length nobody asked for; fewer where the context has no room for so many."""
TEMPERATURES = (1e-5, 1e5)
"""Between these, logits divided by a temperature are neither infinite nor all the same in float32."""


class _Codec(Protocol):
    """What generation asks of a tokenizer, ours or transformers'."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    num_loops: NumLoops = None,
    *,
    exit_threshold: float | None = None,
    exit_rule: str = "halting",
    context_length: int | None = None,
    on_text: OnText | None = None,
) -> str:
    """Continue `prompt`; returns the continuation alone.

    Args:
        model: a LoopMemLM, or a LoopMemForCausalLM (of this package or of an exported folder).
        tokenizer: for a LoopMemLM the training tokenizer (`data.tokenizer.load_tokenizer`), else transformers'.
        prompt: the text to continue; an empty one starts a new document.
        max_new_tokens: at most so many; an end-of-document token ends it sooner. None: `NEW_TOKENS`, or what fits.
        temperature: 0 takes the likeliest token each time, else tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens only.
        seed: of the draws; the same seed gives the same text.
        num_loops: applies every layer so often instead of max_loops times; a list gives each layer its own number.
        exit_threshold: tokens leave a layer early, in (0, 1]; 1 runs all loops. None: as the model's config says.
        exit_rule: when they leave, with an `exit_threshold`: `halting` or `confidence`.
        context_length: tokens the model was trained on at once; prompt and continuation must fit. Where None, the
            `max_position_embeddings` of a Hugging Face config.
        on_text: called with each new piece of the continuation; the pieces together are the returned text.

    Raises:
        ConfigError: a value that cannot be meant, or a prompt that does not fit the context.
    """
    check_request(prompt, max_new_tokens, temperature, top_k, seed)
    codec = codec_of(model, tokenizer)
    _check_depth(model.config, num_loops, exit_threshold, exit_rule)
    ids = codec.encode(prompt) or [codec.eos_id]  # the end of one document is where the next begins
    context = context_length or getattr(model.config, "max_position_embeddings", None)
    new_tokens = _new_tokens(len(ids), max_new_tokens, context)
    text = _GrowingText(codec, on_text)
    device = next(model.parameters()).device
    start = torch.tensor([ids], device=device)
    generate = _generate_native if isinstance(model, LoopMemLM) else _generate_huggingface
    depth = _Depth(num_loops, exit_threshold, exit_rule)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        generate(model, codec, start, new_tokens, temperature, top_k, depth, text)
    return text.finish()


class _Depth(NamedTuple):
    """How often layers are applied."""

    num_loops: NumLoops
    exit_threshold: float | None
    exit_rule: str


class Continuation:
    """A sequence that a model continues: its key/value cache, and how layers loop.

    Args:
        model: LoopMemLM or LoopMemForCausalLM, in evaluation mode.
        vocab_size: tokens of the tokenizer; the model's rows after them pad the vocabulary.
        num_loops: applies every layer so often instead of max_loops times, or each so often as its entry of a list.
        early: when tokens leave a layer; None: all loops run.
    """

    def __init__(self, model: Any, vocab_size: int, num_loops: NumLoops, early: EarlyExit | None) -> None:
        from transformers import DynamicCache

        from loopmem_pretrain.hf.cache import cache_with_slots

        self.model, self.vocab_size, self.num_loops, self.early = model, vocab_size, num_loops, early
        self.cache, most = DynamicCache(), max(1, model.config.max_loops)
        loops = loops_of_layers(num_loops, model.config.num_hidden_layers)
        cache_with_slots(self.cache, [most if n is None else n for n in loops], batch=1)

    def scores(self, ids: Tensor) -> Tensor:
        """[V], float32: of the token after `ids` [1, T], which follow those of the calls before."""
        decoding = make_decoding(ids.shape[1], self.cache.get_seq_length(), ids.device, cache=self.cache)
        if self.early is None:
            hidden, _ = self.model.model(ids, self.num_loops, decoding)
        else:
            hidden, _ = exit_forward(self.model.model, ids, self.early, self.num_loops, decoding)
        scores: Tensor = self.model.lm_head(hidden[:, -1:])[0, -1].float()
        scores[self.vocab_size :] = -math.inf  # rows that pad the vocabulary are no tokens
        return scores


def _generate_native(
    model: LoopMemLM,
    codec: _Codec,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    depth: _Depth,
    text: "_GrowingText",
) -> None:
    early = early_exit(depth.exit_threshold, depth.exit_rule)
    continuation = Continuation(model, codec.vocab_size, depth.num_loops, early)
    for _ in range(max_new_tokens):
        token = _choose(continuation.scores(ids), temperature, top_k)
        ids = token[None]
        text.put(token)
        if int(token) == codec.eos_id:
            return


def _choose(scores: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token id, [1], from scores [V]."""
    if temperature == 0:
        return scores.argmax(keepdim=True)
    scores = scores / temperature
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -math.inf)
    return torch.multinomial(scores.softmax(-1), 1)


def _generate_huggingface(
    model: Any,
    codec: _Codec,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    depth: _Depth,
    text: "_GrowingText",
) -> None:
    drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0} if temperature else {}
    early = {"exit_threshold": depth.exit_threshold, "exit_rule": depth.exit_rule}
    padding = list(range(codec.vocab_size, model.config.vocab_size))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=codec.eos_id,
        pad_token_id=codec.eos_id,
        streamer=_SkipPrompt(text),
        **({"suppress_tokens": padding} if padding else {}),
        **({"num_loops": depth.num_loops} if depth.num_loops is not None else {}),
        **(early if depth.exit_threshold is not None else {}),
        **(drawing or {"do_sample": False}),
    )


def codec_of(model: Any, tokenizer: Any) -> _Codec:
    """What turns text into the model's tokens and back; `model` and `tokenizer` as `generate_text` takes them.

    Raises:
        ConfigError: a tokenizer of transformers that names no end-of-document token.
    """
    return tokenizer if isinstance(model, LoopMemLM) else _HuggingFaceCodec(tokenizer)


class _HuggingFaceCodec:
    """A transformers tokenizer as _Codec; text is only ever text, as in training: `</s>` in it ends nothing."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no end-of-document token", "set eos_token in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _GrowingText:
    """Turns new tokens into text, piece by piece; the text is what the pieces join to."""

    def __init__(self, codec: _Codec, on_text: OnText | None) -> None:
        self.codec, self.on_text = codec, on_text
        self.pieces: list[str] = []
        # Decoded before the new tokens and cut off again, since some tokenizers treat the first token of a text apart.
        self.anchor = codec.encode("a")
        self.anchor_length = len(codec.decode(self.anchor))
        self.new: list[int] = []
        """Tokens whose text is not out yet."""

    def put(self, tokens: Tensor) -> None:
        self.new += tokens.flatten().tolist()
        piece = self._piece()
        # Bytes that are not a whole character yet decode to U+FFFD; the next token may complete them.
        if piece and not piece.endswith("\ufffd"):
            self._show(piece)

    def finish(self) -> str:
        """Bring out what is left, and return all of the text."""
        self._show(self._piece())
        return "".join(self.pieces)

    def _piece(self) -> str:
        return self.codec.decode(self.anchor + self.new)[self.anchor_length :]

    def _show(self, piece: str) -> None:
        self.new = []
        if piece:
            self.pieces.append(piece)
            if self.on_text is not None:
                self.on_text(piece)


class _SkipPrompt:
    """What `generate` calls with the prompt first, then with every new token."""

    def __init__(self, text: _GrowingText) -> None:
        self.text = text
        self.prompt_passed = False

    def put(self, tokens: Tensor) -> None:
        if self.prompt_passed:
            self.text.put(tokens)
        self.prompt_passed = True

    def end(self) -> None:
        """Part of the interface; `generate_text` finishes the text itself."""


def check_request(prompt: str, max_new_tokens: int | None, temperature: float, top_k: int | None, seed: int) -> None:
    """What `generate_text` refuses of its values for any model; a command asks before it loads one.

    Raises:
        ConfigError: a value that cannot be meant.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes of a command line that are not UTF-8 as half surrogates
        raise ConfigError(
            f"the prompt is not UTF-8 text: {prompt[error.start]!a} at character {error.start + 1}",
            "give it in UTF-8",
        ) from None
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} is not valid", "ask for 1 or more")
    least, most = TEMPERATURES
    if temperature != 0 and not least <= temperature <= most:
        raise ConfigError(
            f"temperature {temperature} is not valid",
            f"use 0 for the likeliest tokens, or a number from {least:g} to {most:,.0f}",
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k} is not valid", "use 1 or more, or leave it out")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed {seed} does not fit into 64 bits", f"use a number from 0 to {2**64 - 1}")


def _check_depth(config: Any, num_loops: NumLoops, exit_threshold: float | None, exit_rule: str) -> None:
    for name, value in (("num_loops", num_loops), ("exit_threshold", exit_threshold)):
        if value is not None and not config.max_loops:
            raise ConfigError(f"{name} {value}: this model does not loop (max_loops 0)", f"leave {name} out")
    loops = loops_of_layers(num_loops, config.num_hidden_layers)
    if len(loops) != config.num_hidden_layers:
        raise ConfigError(
            f"num_loops {num_loops}: {len(loops)} numbers for {config.num_hidden_layers} layers",
            "give one number for all layers, or one for each",
        )
    if any(n is not None and n < 1 for n in loops):
        raise ConfigError(f"num_loops {num_loops} is not valid", "use 1 or more, or leave it out")
    if exit_threshold is not None and not 0 < exit_threshold <= 1:
        raise ConfigError(
            f"exit_threshold {exit_threshold} is not valid", "use a number above 0 and at most 1, where all loops run"
        )
    if exit_rule not in EXIT_RULES:
        raise ConfigError(f"exit_rule {exit_rule!r} is not known", f"use one of {', '.join(EXIT_RULES)}")


def _new_tokens(prompt: int, new: int | None, context: int | None) -> int:
    """How many to write after a prompt of so many tokens; `new` as asked for, None leaves it to the room there is."""
    if context is None or prompt + (new or 1) <= context:
        return new or (NEW_TOKENS if context is None else min(NEW_TOKENS, context - prompt))
    if prompt >= context:
        raise ConfigError(
            f"the prompt has {prompt:,} tokens, the model was trained on {context:,}", "shorten the prompt"
        )
    raise ConfigError(
        f"the prompt has {prompt:,} tokens; {new:,} new ones do not fit the {context:,} the model was trained on",
        f"ask for at most {context - prompt:,} new tokens, or shorten the prompt",
    )
