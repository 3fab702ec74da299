"""Every parameter of a model with its shape, and what of it one rank holds; by formula, without torch.

`tests/unit/tools/test_weights.py` holds the table against the parameters of real models.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.parallel.placement import padded_size, placement
from loopmem_pretrain.parallel.stages import layers_of_stage


class Weight(NamedTuple):
    """One parameter, or the same one of several layers."""

    name: str
    """Public name."""
    shape: tuple[int, ...]
    copies: int = 1
    """Layers that have one of this shape."""

    @property
    def kind(self) -> str:
        """What it is part of, in the words of the print-out."""
        if "memory." in self.name and self.name.endswith(("keys", "values")):
            return "memory banks"
        if "memory." in self.name:
            return "gates, projections"
        return "embedding, head" if self.name.startswith(("model.embed", "lm_head")) else "layers"


def layer_weights(model: ModelConfig, layer: int) -> Iterator[Weight]:
    """The parameters of one layer."""
    width, ffn, loops = model.hidden_size, model.intermediate_size, model.max_loops
    queries, keys = (heads * model.head_width for heads in (model.num_attention_heads, model.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (ffn, width),
        "mlp.up_proj.weight": (ffn, width),
        "mlp.down_proj.weight": (width, ffn),
    }
    if model.qk_norm != "none":
        shapes |= {f"self_attn.{part}_norm.weight": (model.head_width,) for part in "qk"}
    biases = {"q": queries, "k": keys, "v": keys, "o": width}
    for part in {"none": "", "qkv": "qkv", "all": "qkvo"}[model.attention_bias]:
        shapes[f"self_attn.{part}_proj.bias"] = (biases[part],)
    if loops:
        shapes |= {"step_scales": (loops,), "halting.weight": (1, width + 1), "halting.bias": (1,)}
    banks = {"local": model.local_slots, "global": model.global_slots}
    if any(banks.values()):
        shapes |= {"memory.norm.weight": (width,), "memory.norm.bias": (width,)}
    if model.local_slots:
        shapes |= {f"memory.local_{part}": (model.local_slots, width) for part in ("keys", "values")}
    gates = {"vector": width, "scalar": 1, "constant": 0}[model.gate]
    for bank in (name for name, slots in banks.items() if slots):
        shapes[f"memory.{bank}_proj.weight"] = (width, width)
        if gates:
            shapes |= {f"memory.{bank}_gate.weight": (gates, width), f"memory.{bank}_gate.bias": (gates,)}
    return (Weight(f"model.layers.{layer}.{name}", shape) for name, shape in shapes.items())


def shared_weights(model: ModelConfig) -> list[Weight]:
    """The shared memory's parameters, which every pipeline stage holds; none without memory."""
    width, slots = model.hidden_size, model.global_slots
    if not (model.local_slots or slots):
        return []
    weights = [Weight(f"model.memory.{n}_norm.{p}", (width,)) for n in ("query", "key") for p in ("weight", "bias")]
    if slots and model.retrieval == "product_keys":
        weights.append(Weight("model.memory.global_subkeys", (2, math.isqrt(slots), width // 2)))
    elif slots:
        weights.append(Weight("model.memory.global_keys", (slots, width)))
    if slots:
        weights.append(Weight("model.memory.global_values", (slots, width)))
    return weights


def stage_weights(model: ModelConfig, bounds: Sequence[int], stage: int) -> list[Weight]:
    """The parameters of one pipeline stage of the cut `bounds` (parallel/stages.py); those of layers named once."""
    last = len(bounds) - 2
    embedding = Weight("model.embed_tokens.weight", (model.vocab_size, model.hidden_size))
    layers = layers_of_stage(model, bounds, stage)
    weights = [weight._replace(copies=len(layers)) for weight in layer_weights(model, layers[0])]
    weights += shared_weights(model)
    if stage == 0 or (stage == last and model.tie_word_embeddings):
        weights.append(embedding)
    if stage == last:
        weights.append(Weight("model.norm.weight", (model.hidden_size,)))
        if not model.tie_word_embeddings:
            weights.append(embedding._replace(name="lm_head.weight"))
    return weights


def local_numel(weight: Weight, parallel: ParallelConfig) -> int:
    """Elements of all copies that one tensor-parallel rank holds, padding of the vocabulary included."""
    where, ranks = placement(weight.name, parallel), parallel.tensor_model_parallel_size
    if where.cut is None:
        return weight.copies * math.prod(weight.shape)
    size = weight.shape[where.cut]
    return weight.copies * math.prod(weight.shape) // size * (padded_size(size, ranks) // ranks)
