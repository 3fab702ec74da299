"""Parameters, FLOPs and batch arithmetic of a config, as text, without torch."""

from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.model.flops import forward_flops_per_token, parameter_counts, training_flops_per_token


def describe(config: RunConfig) -> str:
    """A table whose every line can be checked by hand against model/flops.py."""
    model, training, data = config.model, config.training, config.data
    counts = parameter_counts(model)
    forward = forward_flops_per_token(model, data.seq_length)
    per_token = training_flops_per_token(model, data.seq_length)
    tokens_per_step = training.global_batch_size * data.seq_length
    tokens = tokens_per_step * training.train_steps
    # float32 master weight and two moments, a float32 gradient sum, and a working copy in bf16
    optimizer_bytes = counts.total * 12
    working_bytes = counts.total * (2 if training.precision == "bf16" else 0)
    rows = [
        ("parameters", counts.total, ""),
        *((f"  {name}", value, share(value, counts.total)) for name, value in counts._asdict().items()),
        ("forward FLOPs per token", forward.total, f"{model.max_loops or 1} loops a layer, T = {data.seq_length}"),
        *((f"  {name}", value, share(value, forward.total)) for name, value in forward._asdict().items()),
        ("training FLOPs per token", per_token, "3 x forward, recomputation not counted"),
        ("tokens per step", tokens_per_step, f"{training.global_batch_size} samples of {data.seq_length}"),
        ("tokens", tokens, f"{training.train_steps:,} steps"),
        ("training FLOPs", tokens * per_token, f"{tokens * per_token:.3g}"),
        ("bytes of master weights and moments", optimizer_bytes, "12 a parameter, over all ranks"),
        ("bytes of working weights", working_bytes, f"{training.precision}, on every rank below ZeRO 3"),
        ("bytes of gradient sums", counts.total * 4, "float32, on every rank with ZeRO 1"),
    ]
    width = max(len(name) for name, _, _ in rows)
    digits = max(len(f"{value:,}") for _, value, _ in rows)
    lines = [f"{name:<{width}}  {value:>{digits},}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([*lines, "activations are not estimated yet"])


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"
