"""Looped memory transformer for transformers: `AutoModelForCausalLM`, `AutoModel`, `generate`, `save_pretrained`.

Glue only: the math is LoopMemBody's, and initial weights follow the one table of initializers, here as in training.
The export replaces the imports of both by their text, so an exported model folder needs torch and transformers only.
"""

# transformers annotates a part of itself only:
# mypy: disable-error-code="misc,no-untyped-call"

from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.utils.generic import ModelOutput

from loopmem_pretrain.hf.cache import cache_with_slots, static_cache_with_slots
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.model.backend import TorchBackend, wide
from loopmem_pretrain.model.decoding import Decoding, make_decoding
from loopmem_pretrain.model.early_exit import EXIT_RULES, EarlyExit, ExitStats, early_exit, exit_forward
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemBody, LoopStats, NumLoops, loops_of_layers, total_loss

CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
"""What transformers calls the cache: `cache` from 5.24 on, where outputs and calls know the older name as well."""


@dataclass
class LoopMemCausalLMOutput(ModelOutput):
    """What a forward pass returns; the losses are None without labels."""

    loss: Tensor | None = None
    """cross_entropy + ponder_weight * ponder_cost"""
    logits: Tensor | None = None
    """[B, T, V], or the last `logits_to_keep` positions of it"""
    cross_entropy: Tensor | None = None
    """mean next-token cross-entropy in nats"""
    ponder_cost: Tensor | None = None
    """mean over layers and predicting tokens of (E - 1) / (N - 1)"""
    if CACHE == "cache":
        cache: DynamicCache | StaticCache | None = None
    else:
        past_key_values: DynamicCache | StaticCache | None = None
    """with a cache: keys and values of all tokens so far, a slot for each layer and loop"""
    hidden_states: tuple[Tensor, ...] | None = None
    """with output_hidden_states, [B, T, D] each: what every layer is given, and the last one's output after the final
    norm"""
    loop_stats: tuple[LoopStats, ...] | tuple[ExitStats, ...] | None = None
    """with output_loop_stats, one entry a looped layer: LoopStats, halting probabilities, expected loops and gates,
    whose means count padding too; with early exit ExitStats, halting probabilities and the loops each token ran"""


class LoopMemPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about these models."""

    config_class = LoopMemConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["PlainLayer", "LoopedLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the parameters a module owns itself, unless a checkpoint has filled them.

        The values are a function of torch's seed and the parameter's name alone, the ones training starts from.
        """
        prefix = getattr(module, "public_name", None)
        if prefix is None:  # not built by this model: embeddings that resize_token_embeddings makes
            super()._init_weights(module)
            return
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                initialize([(f"{prefix}.{key}", parameter)], self.config, torch.initial_seed())

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What gradient_checkpointing_enable calls: recompute one loop at a time, as training does.

        Raises:
            ValueError: use_reentrant.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True: a layer that is applied several times needs use_reentrant=False")
        recompute = partial(gradient_checkpointing_func, use_reentrant=False)
        layers: Any = self.model.layers
        for index, layer in enumerate(layers):
            layer.recompute = recompute if enable and index % every_n_layers == 0 else None
        self.gradient_checkpointing = enable


class LoopMemForCausalLM(LoopMemPreTrainedModel, GenerationMixin):
    """The language model: LoopMemBody and a head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: LoopMemConfig) -> None:
        super().__init__(config)
        self.backend = TorchBackend()
        self.model = LoopMemBody(config, self.backend)
        self.lm_head = self.backend.lm_head(config.hidden_size, config.vocab_size)
        for name, module in self.named_modules():
            module.public_name = name  # type: ignore[assignment]  # _init_weights is handed modules without names
        if config.tie_word_embeddings:
            self.register_load_state_dict_pre_hook(_tied_head)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | StaticCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: NumLoops = None,
        exit_threshold: float | None = None,
        exit_rule: str | None = None,
        logits_to_keep: int | Tensor = 0,
        output_loop_stats: bool = False,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: DynamicCache | StaticCache | None = None,
    ) -> LoopMemCausalLMOutput | tuple[Any, ...]:
        """Logits of the next token after each of `input_ids` [B, T], and the loss.

        Args:
            input_ids: token ids, [B, T]; with `past_key_values` those that follow the tokens in it.
            attention_mask: 0 where a token is padding, on either side, [B, T], or [B, earlier + T] with a cache; with
                a StaticCache it may be as long as the cache.
            position_ids: [B, T] or [1, T]; otherwise tokens that are no padding are counted from 0.
            inputs_embeds: [B, T, D] in place of `input_ids`.
            past_key_values: a DynamicCache, empty or what an earlier call returned; it is extended in place. Or a
                StaticCache, for compiled steps; no sum of tokens is checked then, and all loops run.
            labels: usually `input_ids` itself, [B, T]; they are shifted here, -100 is not counted. The loss is that of
                the T - 1 positions that predict a token, the ponder cost is theirs too; padding predicts nothing and
                is not predicted.
            num_loops: applies every layer so often instead of max_loops times, or each layer so often as its entry of
                a list says; above max_loops it is extrapolation.
            exit_threshold: tokens leave a layer early, in (0, 1]; 1 runs all loops. None: as the config says, and not
                in training mode.
            exit_rule: when they leave, `halting` or `confidence`; it needs a threshold, given or of the config. None:
                as the config says.
            logits_to_keep: only the last so many positions (or the given ones) get logits; 0 means all.
            output_loop_stats: returns `loop_stats`.
            use_cache: makes a cache where none is given. None: as the config says, and not in training mode.
            output_attentions: is refused: attention weights are never made.
            output_hidden_states: returns `hidden_states`. None: as the config says.
            return_dict: False for a plain tuple.
            num_items_in_batch: labels that count in all micro-batches of a step, as Trainer passes it: the losses are
                then what this micro-batch adds to their mean over the step.
            cache: `past_key_values`, as transformers calls it from 5.24 on.

        Raises:
            ValueError: a request this model cannot meet.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: pass one of them only")
        past_key_values = cache if past_key_values is None else past_key_values
        inputs = self._inputs(input_ids, inputs_embeds, labels)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: attention weights are never made (fused attention); leave it out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        loops = self._loops(num_loops)
        early = self._early_exit(exit_threshold, exit_rule)
        if use_cache is False and past_key_values is not None:
            raise ValueError("past_key_values with use_cache=False: pass one of them only")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        if isinstance(cache, StaticCache):
            self._check_static(labels, early)
        real, earlier, decoding = self._decoding(inputs, attention_mask, position_ids, cache, loops)
        states: list[Tensor] = []
        on_layer = states.append if output_hidden_states else None
        hidden, stats = (
            self.model(inputs, loops, decoding, on_layer=on_layer)
            if early is None
            else exit_forward(self.model, inputs, early, loops, decoding, on_layer)
        )
        if labels is not None:
            logits_to_keep = 0  # the loss needs them all
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = cross_entropy = ponder = None
        if labels is not None:
            labels = labels[:, 1:].to(logits.device)
            expected = [layer.expected_loops()[:, :-1] for layer in stats]
            if real is not None:
                predicts = real[:, earlier:-1] & real[:, earlier + 1 :]
                labels = labels.masked_fill(~predicts.to(labels.device), -100)
                expected = [loops[predicts.to(loops.device)] for loops in expected]
            cross_entropy, share = self._cross_entropy(logits[:, :-1], labels, num_items_in_batch)
            loss, ponder = total_loss(cross_entropy, expected, self.config, share)
        output = LoopMemCausalLMOutput(
            loss=loss,
            logits=logits,
            cross_entropy=cross_entropy,
            ponder_cost=ponder,
            **{CACHE: cache},
            hidden_states=(*states, hidden) if output_hidden_states else None,
            loop_stats=tuple(stats) if output_loop_stats else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor | float]:
        """The mean over labels; or their sum over `num_items`, and which share of those they are."""
        if num_items is None:
            return self.backend.cross_entropy(logits, labels), 1.0
        count = torch.as_tensor(num_items, device=logits.device)
        flat = logits.flatten(0, 1).to(wide(logits.dtype))
        return F.cross_entropy(flat, labels.flatten(), reduction="sum") / count, (labels != -100).sum() / count

    def _decoding(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        loops: list[int],
    ) -> tuple[Tensor | None, Any, Decoding | None]:
        """(where tokens are no padding, how many the cache holds, what layers are told; None where as in training)"""
        (batch, tokens), width = inputs.shape[:2], None
        earlier: Any = 0
        if isinstance(cache, StaticCache):
            width = static_cache_with_slots(cache, loops, batch)
            earlier = cache.get_seq_length()
            real = None if attention_mask is None else _in_width(attention_mask, batch, tokens, cache) != 0
        else:
            earlier = 0 if cache is None else self._prepare_cache(cache, loops, batch)
            real = _real_tokens(attention_mask, [batch, earlier + tokens])
        self._check_positions(position_ids, batch, tokens)
        if cache is None and real is None and position_ids is None:
            return real, earlier, None
        return real, earlier, make_decoding(tokens, earlier, inputs.device, real, position_ids, cache, width)

    def _prepare_cache(self, cache: DynamicCache, loops: list[int], batch: int) -> int:
        """Give the cache a slot for each layer and loop; returns how many tokens it holds."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, and this model needs a DynamicCache or a StaticCache: "
                "leave cache_implementation out"
            )
        return cache_with_slots(cache, loops, batch)

    def _check_static(self, labels: Tensor | None, early: EarlyExit | None) -> None:
        if early is not None:
            raise ValueError(
                "a StaticCache is for compiled steps of all loops, and early exit decides while it runs: leave "
                "cache_implementation or exit_threshold out"
            )
        if labels is not None:
            raise ValueError("labels with a StaticCache: the loss is of a pass that has no cache or a DynamicCache")

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None) -> Tensor:
        """Token ids or embeddings."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None and (inputs.dim() != 2 or not inputs.numel()):
            raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {list(inputs.shape)}")
        width = self.config.hidden_size
        if inputs_embeds is not None and (inputs.dim() != 3 or inputs.shape[2] != width or not inputs.numel()):
            raise ValueError(
                f"inputs_embeds must be [batch, tokens, {width}] with at least one token, got {list(inputs.shape)}"
            )
        if labels is not None and (labels.shape != inputs.shape[:2] or labels.shape[1] < 2):
            raise ValueError(
                f"labels {list(labels.shape)} must have the shape of input_ids {list(inputs.shape[:2])}, and at least "
                "two tokens: pass them unshifted, the model shifts them"
            )
        return inputs

    def _check_positions(self, position_ids: Tensor | None, batch: int, tokens: int) -> None:
        if position_ids is not None and list(position_ids.shape) not in ([tokens], [1, tokens], [batch, tokens]):
            raise ValueError(
                f"position_ids {list(position_ids.shape)} must be [{batch}, {tokens}], a place for each token of "
                "input_ids; those in a cache have theirs"
            )

    def _loops(self, num_loops: NumLoops) -> list[int]:
        """How often each layer is applied at most."""
        layers, most = self.config.num_hidden_layers, self.config.max_loops
        if num_loops is None:
            return [max(1, most)] * layers
        if not most:
            raise ValueError(f"num_loops={num_loops}: this model does not loop (max_loops 0); leave num_loops out")
        loops = loops_of_layers(num_loops, layers)
        if len(loops) != layers or not all(isinstance(n, Integral) and n is not True and n >= 1 for n in loops):
            raise ValueError(
                f"num_loops={num_loops} is not valid; valid: 1 or above, or a list of such numbers, one for each of "
                f"the {layers} layers"
            )
        return [int(n) for n in loops if n is not None]

    def _early_exit(self, threshold: float | None, rule: str | None) -> EarlyExit | None:
        """None where all loops run."""
        if rule is not None and rule not in EXIT_RULES:
            raise ValueError(f"exit_rule={rule!r} is not known; valid: {', '.join(EXIT_RULES)}")
        if threshold is None and self.config.exit_threshold is None and rule is not None:
            raise ValueError(f"exit_rule={rule!r} is about exit_threshold: add exit_threshold, or leave it out")
        if threshold is None and not self.training:
            threshold = self.config.exit_threshold
        if threshold is None:
            return None
        if not self.config.max_loops:
            raise ValueError(f"exit_threshold={threshold}: this model does not loop (max_loops 0); leave it out")
        if not isinstance(threshold, Real) or threshold is True or not 0 < threshold <= 1:
            raise ValueError(f"exit_threshold={threshold!r} is not valid; valid: above 0, at most 1 (1 runs all loops)")
        return early_exit(threshold, self.config.exit_rule if rule is None else rule)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate_batch` and a paged cache begin with.

        Raises:
            ValueError: always; without it transformers would log an error and return prompts as they are.
        """
        raise ValueError(
            "continuous batching and paged caches hold one entry a layer, and this model needs one for each loop: "
            "leave cache_implementation out and call generate with a padded batch"
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, inputs_embeds: Tensor, **told: Any) -> Tensor | None:
        """What transformers asks for with a StaticCache: the mask in the cache's length, the same in every step."""
        if attention_mask is None:
            return None
        batch, tokens, _ = inputs_embeds.shape
        past_key_values = told[CACHE]
        if not told.get("is_first_iteration"):  # from then on it is transformers that makes the mask longer
            return _as_wide(attention_mask, past_key_values.get_max_length())
        return _in_width(attention_mask, batch, tokens, past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What transformers prepares.

        Raises:
            ValueError: prompts that end in padding or leave no room in the context.
        """
        if not kwargs.pop("prompt_is_checked", False):
            self._check_prompt(input_ids, attention_mask, inputs_embeds, kwargs.get("is_first_iteration"))
        for name in ("tokenizer", "assistant_tokenizer"):  # `generate` has used them, and hands them on
            kwargs.pop(name, None)
        prepare: Any = super().prepare_inputs_for_generation
        given = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return dict(prepare(input_ids, *args, **given, **kwargs))

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """What transformers does with a prompt; with prefill_chunk_size in chunks, and a chunk may be padding alone:
        here the prompt is whole and can be judged.

        Raises:
            ValueError: as prepare_inputs_for_generation.
        """
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        self._check_prompt(input_ids, mask, embeds, is_first_iteration)
        model_kwargs["prompt_is_checked"] = True  # prepare_inputs_for_generation takes it out
        prefill: Any = super()._prefill
        return prefill(input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)

    def _check_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None, inputs_embeds: Tensor | None, first: bool | None
    ) -> None:
        context = self.config.max_position_embeddings
        length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if first and context is not None and length >= context:
            raise ValueError(
                f"the prompt has {length:,} tokens and the model was trained on {context:,} at once "
                f"(max_position_embeddings): shorten it to {context - 1:,} or less"
            )
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "attention_mask ends in padding: generation continues the last token, so prompts of a batch are padded "
                "on the left; set tokenizer.padding_side = 'left'"
            )

    def _prepare_special_tokens(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """What transformers does with them, where all settings of a generation are known.

        Raises:
            ValueError: an end that is never generated.
        """
        ends = generation_config.eos_token_id
        ids = () if ends is None else torch.as_tensor(ends).flatten().tolist()
        never = sorted({*ids}.intersection(generation_config.suppress_tokens or ()))
        if never:
            raise ValueError(
                f"eos_token_id {', '.join(map(str, never))} is in suppress_tokens, so no text would ever end with it: "
                "the export put ids there that were no tokens then. Of tokens that were added and trained since, take "
                "theirs out: model.generation_config.suppress_tokens = "
                "list(range(len(tokenizer), model.config.vocab_size)) or None"
            )
        prepare: Any = super()._prepare_special_tokens
        prepare(generation_config, *args, **kwargs)


def _as_wide(attention_mask: Tensor, width: int) -> Tensor:
    """Tokens to come are no padding; that they are to come is told by their places."""
    return F.pad(attention_mask, (0, width - attention_mask.shape[1]), value=1)


def _in_width(attention_mask: Tensor, batch: int, tokens: int, cache: StaticCache) -> Tensor:
    """The mask of the tokens so far, or of all that there may be, as the latter."""
    width = cache.get_max_length()
    if list(attention_mask.shape) != [batch, width]:
        # Compiled code cannot ask the device how many tokens there are: it is given the whole mask.
        held = width - tokens if torch.compiler.is_compiling() else int(cache.get_seq_length())
        _require_shape(attention_mask, [batch, held + tokens])
    return _as_wide(attention_mask, width)


def _tied_head(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """A tied head is the embedding: a state that has one of them has both."""
    embedding = f"{prefix}model.embed_tokens.weight"
    if embedding in state:
        state.setdefault(f"{prefix}lm_head.weight", state[embedding])


def _real_tokens(attention_mask: Tensor | None, shape: list[int]) -> Tensor | None:
    """Which tokens are no padding, bool; None where all are."""
    if attention_mask is None:
        return None
    _require_shape(attention_mask, shape)
    real = attention_mask != 0
    return None if bool(real.all()) else real


def _require_shape(attention_mask: Tensor, shape: list[int]) -> None:
    if list(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must be {shape}, the tokens in the cache and those of "
            "input_ids: attention is causal, the mask only tells padding"
        )


@dataclass
class LoopMemModelOutput(ModelOutput):
    """What a forward pass without the head returns."""

    last_hidden_state: Tensor | None = None
    """after the final norm, [B, T, D]"""
    if CACHE == "cache":
        cache: DynamicCache | None = None
    else:
        past_key_values: DynamicCache | None = None
    """as in LoopMemCausalLMOutput"""
    hidden_states: tuple[Tensor, ...] | None = None
    """as in LoopMemCausalLMOutput"""
    loop_stats: tuple[Any, ...] | None = None
    """as in LoopMemCausalLMOutput"""


class LoopMemModel(LoopMemForCausalLM):
    """The model without its head: `AutoModel`. The head's weights are left out when a language model is loaded."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^lm_head\."]

    def __init__(self, config: LoopMemConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Identity()

    @classmethod
    def can_generate(cls) -> bool:
        """No: it gives no logits."""
        return False

    def get_output_embeddings(self) -> None:
        """None: there is no head to resize with the embedding."""
        return

    def forward(  # type: ignore[override]  # another output, and no labels
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **request: Any,
    ) -> LoopMemModelOutput | tuple[Any, ...]:
        """Hidden states [B, T, D] of `input_ids` [B, T].

        Args:
            input_ids: as in LoopMemForCausalLM.forward.
            attention_mask: as there.
            return_dict: False for a plain tuple.
            request: what else LoopMemForCausalLM.forward takes, but for labels and logits_to_keep.

        Raises:
            ValueError: a request this model cannot meet.
        """
        if not request.keys().isdisjoint({"labels", "logits_to_keep"}):
            raise ValueError("this model has no head: labels and logits_to_keep are for LoopMemForCausalLM")
        output: Any = super().forward(input_ids, attention_mask, return_dict=True, **request)
        hidden = LoopMemModelOutput(output.logits, getattr(output, CACHE), output.hidden_states, output.loop_stats)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return hidden if as_dict else hidden.to_tuple()
