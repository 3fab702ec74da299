"""README.md of an exported folder: short, and only what is known to be true."""

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model.flops import parameter_counts


def model_card(config: ModelConfig, dtype: str, seq_length: int) -> str:
    """The model card as Markdown."""
    counts = parameter_counts(config)
    loops = f"each applied up to {config.max_loops} times" if config.max_loops > 1 else "each applied once"
    banks = [f"{config.local_slots} slots in each layer"] if config.local_slots else []
    banks += [f"{config.global_slots} slots shared by all layers"] if config.global_slots else []
    memory = f"{' and '.join(banks)}, {config.gate} gate" if banks else "none"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- loopmem
---

# A looped memory transformer

A decoder-only language model, pretrained with loopmem_pretrain. It continues text; it is not trained to follow
instructions or to be safe.

| | |
|---|---|
| parameters | {counts.total:,} |
| layers | {config.num_hidden_layers}, {loops} |
| memory | {memory} |
| hidden size | {config.hidden_size} |
| vocabulary | {config.vocab_size:,} |
| trained on sequences of | {seq_length:,} tokens |
| weights stored as | {dtype} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`modeling_loopmem.py` holds all of the model's code; `trust_remote_code=True` allows it to run. It needs torch and
transformers (tried with 5.16 and 5.23).

Prompts of different lengths go in one batch with `tokenizer(texts, padding=True, padding_side="left")`; where the
tokenizer has no pad token, set `tokenizer.pad_token = tokenizer.eos_token`. The key/value cache holds every loop of
every layer, {_cached_numbers(config):,} numbers a token. All loops run for every token: there is no early exit.
{_loops_hint(config)}
The licence of the weights, and what the model was trained on, are for whoever publishes this folder to add here.
"""


def _cached_numbers(config: ModelConfig) -> int:
    """Keys and values of one token: K heads of width d each, in every layer and loop."""
    kv_width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * kv_width * config.num_hidden_layers * max(1, config.max_loops)


def _loops_hint(config: ModelConfig) -> str:
    if config.max_loops < 1:
        return ""
    return (
        "\n`model(input_ids, num_loops=n)` and `model.generate(..., num_loops=n)` apply every layer n times instead of "
        f"{config.max_loops}; `output_loop_stats=True` returns halting probabilities and expected loops.\n"
    )
