"""Small configurations for tests."""

from typing import Any

from loopmem_pretrain.config.run import RunConfig

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_loops": 3,
    "local_slots": 8,
    "global_slots": 4,
    "gate_init_bias": 0.0,
    "ponder_weight": 0.05,
}


def tiny_run(run_dir: Any = "unused", data_dir: Any = "unused", **sections: dict[str, Any]) -> RunConfig:
    """A run of the tiny model; keyword sections override single fields: training={"train_steps": 4}."""
    values: dict[str, dict[str, Any]] = {
        "model": TINY_MODEL,
        "data": {"datasets": [{"path": str(data_dir)}], "seq_length": 16, "num_workers": 0},
        "parallel": {"zero_stage": 1},
        "training": {
            "train_steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "optimizer": {"lr": 1e-2},
        "schedule": {"type": "cosine", "warmup_steps": 2, "min_lr": 1e-3},
        "validation": {"interval_steps": 10, "num_samples": 8},
        "checkpoint": {"interval_steps": 10},
        "logging": {"interval_steps": 5, "peak_tflops": 0.05},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    import json

    return RunConfig.model_validate_json(json.dumps({"run_dir": str(run_dir), **values}))
