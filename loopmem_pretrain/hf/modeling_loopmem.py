"""Looped memory transformer for transformers: `AutoModelForCausalLM`, `generate`, `save_pretrained`.

Glue only: the math is LoopMemModel's, and initial weights follow the one table of initializers, here as in training.
The export replaces the imports of both by their text, so an exported model folder needs torch and transformers only.
"""

# transformers annotates a part of itself only:
# mypy: disable-error-code="misc,no-untyped-call"

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemModel, LoopStats, ponder_cost

logger = logging.get_logger(__name__)


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
    loop_stats: tuple[LoopStats, ...] | None = None
    """with output_loop_stats: halting probabilities, expected loops and gates, one entry a looped layer"""


class LoopMemPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about these models."""

    config_class = LoopMemConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["PlainLayer", "LoopedLayer"]
    _supports_sdpa = True

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


class LoopMemForCausalLM(LoopMemPreTrainedModel, GenerationMixin):
    """The language model: LoopMemModel and a head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LoopMemConfig) -> None:
        super().__init__(config)
        self.backend = TorchBackend()
        self.model = LoopMemModel(config, self.backend)
        self.lm_head = self.backend.lm_head(config.hidden_size, config.vocab_size)
        for name, module in self.named_modules():
            module.public_name = name  # type: ignore[assignment]  # _init_weights is handed modules without names
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: int | None = None,
        logits_to_keep: int | Tensor = 0,
        output_loop_stats: bool = False,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> LoopMemCausalLMOutput | tuple[Any, ...]:
        """Logits of the next token after each of `input_ids` [B, T], and the loss.

        Args:
            input_ids: token ids, [B, T]; every sequence is T long.
            attention_mask: None or all ones, [B, T].
            labels: usually `input_ids` itself, [B, T]; they are shifted here, -100 is not counted. The loss is that of
                the T - 1 positions that predict a token, the ponder cost is theirs too.
            num_loops: applies every layer so often instead of max_loops times; above max_loops it is extrapolation.
            logits_to_keep: only the last so many positions (or the given ones) get logits; 0 means all.
            output_loop_stats: returns `loop_stats`.
            use_cache: None or False.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: padding, a cache, or another request this model cannot meet.
        """
        self._check_request(input_ids, attention_mask, labels, num_loops, use_cache)
        hidden, stats = self.model(input_ids, num_loops)
        if labels is not None:
            logits_to_keep = 0  # the loss needs them all
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = cross_entropy = ponder = None
        if labels is not None:
            cross_entropy = self.backend.cross_entropy(logits[:, :-1], labels[:, 1:].to(logits.device))
            costs = [ponder_cost(layer.expected_loops()[:, :-1], self.config.max_loops) for layer in stats]
            ponder = torch.stack(costs).mean() if costs else torch.zeros_like(cross_entropy)
            loss = cross_entropy + self.config.ponder_weight * ponder
        output = LoopMemCausalLMOutput(
            loss=loss,
            logits=logits,
            cross_entropy=cross_entropy,
            ponder_cost=ponder,
            loop_stats=tuple(stats) if output_loop_stats else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _check_request(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_loops: int | None,
        use_cache: bool | None,
    ) -> None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids "
                f"{list(input_ids.shape)}: attention is causal, other masks are not supported"
            )
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise ValueError(
                "padding is not supported yet: attention_mask contains zeros; pass sequences of equal length, "
                "or one sequence at a time"
            )
        if labels is not None and (labels.shape != input_ids.shape or labels.shape[1] < 2):
            raise ValueError(
                f"labels {list(labels.shape)} must have the shape of input_ids {list(input_ids.shape)}, and at least "
                "two tokens: pass them unshifted, the model shifts them"
            )
        if num_loops is not None and not self.config.max_loops:
            raise ValueError(f"num_loops={num_loops}: this model does not loop (max_loops 0); leave num_loops out")
        if num_loops is not None and num_loops < 1:
            raise ValueError(f"num_loops={num_loops} is not valid; valid: 1 or above")
        if use_cache:
            raise ValueError("use_cache=True: this model has no key/value cache yet; pass use_cache=False")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The whole sequence every time: there is no cache to continue from.

        Raises:
            ValueError: a filled cache or embeddings instead of token ids.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported; pass input_ids")
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("past_key_values is not supported yet; pass the whole sequence as input_ids")
        if kwargs.get("use_cache"):
            logger.warning_once("use_cache=True: there is no key/value cache yet, every token recomputes its sequence")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs.update({key: kwargs[key] for key in ("num_loops", "logits_to_keep") if key in kwargs})
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
