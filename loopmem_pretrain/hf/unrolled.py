"""A model that runs each layer once and reads no memory, as a dense model that transformers and other servers know.

    y = u + c * feed_forward(rms_norm(u)),   u = x + c * attention(rms_norm(x))

With c put into W_o and W_down this is the block of `hunyuan_v1_dense`, which normalises queries and keys per head after
the rotation as this model does. docs/huggingface.md says why more than one loop, or memory, is no such model.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HunYuanDenseV1Config

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConversionError
from loopmem_pretrain.hf.fresh_load import Convert
from loopmem_pretrain.hf.staging import UNROLLED_MARK

_NORMS = {"self_attn.q_norm.": "self_attn.query_layernorm.", "self_attn.k_norm.": "self_attn.key_layernorm."}
_SCALED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_LEFT_OUT = ("step_scales", "halting.weight", "halting.bias")


def check_unrolled(config: ModelConfig, loops: int) -> None:
    """See that the model, with so many loops, is a dense one.

    Raises:
        ConversionError: it is not, with every reason.
    """
    problems = []
    if loops != 1:
        problems.append(
            f"with {loops} loops a layer's output is a mixture of its loops' states whose weights depend on the token"
            if config.max_loops and loops > 1
            else f"{loops} loops: valid is 1, the layers of the model applied once"
        )
    if config.local_slots or config.global_slots:
        problems.append("it reads memory banks, with a softmax over slots and a gate that depends on the token")
    if config.qk_norm != "after_rope" or config.attention_bias != "none":
        problems.append(
            f"its attention (qk_norm {config.qk_norm}, attention_bias {config.attention_bias}) is not that of what "
            "is written: after_rope, none"
        )
    if problems:
        raise ConversionError(
            f"the model cannot be unrolled into a dense one: {'; '.join(problems)}",
            "export without --unrolled; docs/huggingface.md says where that can be served",
        )


class UnrolledWeights(Mapping[str, Tensor]):
    """The dense model's weights by its names; each is made when it is asked for."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """`names` are those of the model's parameters, `weights` may hold a tied head too."""
        self.config, self.weights = config, weights
        self.sources = {_renamed(name): name for name in names if not name.endswith(_LEFT_OUT)}

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        value = self.weights[source]
        return value * self.scale(source) if source.endswith(_SCALED) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def scale(self, source: str) -> float:
        """What the named weight of the model is multiplied by: c of its layer, or 1."""
        if not source.endswith(_SCALED):
            return 1.0
        layer = source.split(".")[2]
        if self.config.max_loops:
            return float(F.softplus(self.weights[f"model.layers.{layer}.step_scales"].detach()[0]))
        return 1.0 / (int(layer) + 1) if self.config.residual_scale == "inverse_depth" else 1.0

    def rounding(self, dtype: torch.dtype) -> Convert:
        """What the model's own weights would have to be for the dense model's to be of that type."""

        def rounded(source: str, value: Tensor) -> Tensor:
            if source.endswith(_LEFT_OUT):
                return value
            scale = self.scale(source)
            return (value * scale).to(dtype).float() / scale

        return rounded


def _renamed(name: str) -> str:
    for ours, theirs in _NORMS.items():
        name = name.replace(ours, theirs)
    return name


def dense_config(config: ModelConfig, settings: Mapping[str, Any]) -> HunYuanDenseV1Config:
    """config.json of the dense model; `settings` are those of every export: positions, special tokens, dtype."""
    return HunYuanDenseV1Config(
        **{
            **settings,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_width,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "tie_word_embeddings": config.tie_word_embeddings,
            "eod_token_id": settings["eos_token_id"],
            "architectures": ["HunYuanDenseV1ForCausalLM"],
            UNROLLED_MARK: 1,
        }
    )
