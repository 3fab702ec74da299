"""Where the list of layers is cut into pipeline stages: a pure function of the model's sizes, without torch.

The list is the one of training/pipeline.py:layer_list: embedding, then for each layer [the shared memory] and the
layer, then the final norm and the head. A layer loops inside its stage, so it costs its loops times one loop. A
pipeline is as slow as its slowest stage.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.model.flops import forward_flops_per_token


def layer_costs(model: ModelConfig, seq_length: int, loops_per_layer: Sequence[float] | None = None) -> list[float]:
    """Forward FLOPs per token of each position of the list.

    `loops_per_layer` are the loops each layer really executes, one number a layer, where that is less than `max_loops`
    (executed loops, not the mean over tokens of E: a layer runs as long as one token of its batch still loops).
    Looking up an embedding, a final norm and the memory's norms cost next to nothing: 0.

    Raises:
        ConfigError: not one number of loops for each layer, or a number that is not positive.
    """
    layers = model.num_hidden_layers
    loops = list(loops_per_layer) if loops_per_layer is not None else [float(max(1, model.max_loops))] * layers
    if len(loops) != layers or not all(count > 0 for count in loops):
        raise ConfigError(
            f"loops per layer {loops} do not fit {layers} layers", f"give {layers} numbers greater than 0, one a layer"
        )
    forward = forward_flops_per_token(model, seq_length, tokens=seq_length)
    one_loop = (forward.total - forward.head) / (layers * max(1, model.max_loops))
    costs = [0.0]
    for count in loops:
        costs += [0.0] * _has_memory(model) + [count * one_loop]
    return [*costs, 0.0, float(forward.head)]


def stage_bounds(
    model: ModelConfig, seq_length: int, stages: int, loops_per_layer: Sequence[float] | None = None
) -> list[int]:
    """`stages` + 1 positions of the list; stage s holds positions bounds[s] up to, not including, bounds[s + 1].

    No other cut has a cheaper most expensive stage; of the cuts that are as good, this is the one with the smallest
    sum of squared costs, and of those the one with fewer layers on the first stages, which keep the activations of most
    micro-batches. Each stage holds a layer at least, the memory's entry stays directly before its layer,
    the embedding is on the first stage, norm and head are on the last.

    Raises:
        ConfigError: fewer than one stage or more stages than layers; loops that do not fit the layers.
    """
    starts = _unit_starts(model, stages)
    costs = layer_costs(model, seq_length, loops_per_layer)
    units = [round(cost) for cost in stage_costs(costs, starts)]  # whole FLOPs: ties are ties on every machine
    return [starts[unit] for unit in _balanced_cut(units, stages)]


def naive_bounds(model: ModelConfig, stages: int) -> list[int]:
    """The cut to compare with: equal numbers of layers, the first stages one more where that does not divide.

    Raises:
        ConfigError: fewer than one stage or more stages than layers.
    """
    starts = _unit_starts(model, stages)
    layers = model.num_hidden_layers
    return [starts[stage * (layers // stages) + min(stage, layers % stages)] for stage in range(stages + 1)]


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Cost of each stage of a cut; the time of a pipeline goes with the greatest."""
    return [sum(costs[begin:end]) for begin, end in pairwise(bounds)]


def layers_of_stage(model: ModelConfig, bounds: Sequence[int], stage: int) -> range:
    """The transformer layers that stage `stage` of a cut holds."""
    step = 1 + _has_memory(model)
    first, last = ((bounds[edge] - 1 + step - 1) // step for edge in (stage, stage + 1))
    return range(max(0, first), min(model.num_hidden_layers, last))


def _has_memory(model: ModelConfig) -> bool:
    return bool(model.local_slots or model.global_slots)


def _unit_starts(model: ModelConfig, stages: int) -> list[int]:
    """First position of every unit that is never cut, and the length of the list: a unit is a layer and what stays
    with it (its memory entry; the embedding with the first, norm and head with the last)."""
    layers = model.num_hidden_layers
    if not 1 <= stages <= layers:
        raise ConfigError(
            f"{stages} pipeline stages do not fit {layers} layers: every stage holds one layer at least",
            f"set parallel.pipeline_model_parallel_size to a number from 1 to {layers} (model.num_hidden_layers)",
        )
    step = 1 + _has_memory(model)
    return [0, *(1 + layer * step for layer in range(1, layers)), 1 + layers * step + 2]


def _balanced_cut(units: Sequence[int], stages: int) -> list[int]:
    """Cut `units` into `stages` runs of at least one unit: first the least maximum, then the least sum of squares."""
    total = [0, *accumulate(units)]

    def best(score: Callable[[int, int], int], limit: int) -> tuple[int, list[int]]:
        """(score, cut) of the best cut in which no run is dearer than `limit`: dynamic programming over the runs.

        `score` adds a run's cost to the score of the runs before it.
        """
        table: dict[int, tuple[int, list[int]]] = {0: (0, [0])}  # number of leading units -> their best cut
        for _ in range(stages):
            longer: dict[int, tuple[int, list[int]]] = {}
            for begin, (before, cut) in table.items():
                for end in range(begin + 1, len(total)):
                    cost = total[end] - total[begin]
                    value = score(before, cost)
                    if cost <= limit and (end not in longer or value < longer[end][0]):
                        longer[end] = (value, [*cut, end])
            table = dict(sorted(longer.items()))  # ties go to the smallest `begin`: short runs first
        return table[len(units)]

    dearest, _ = best(max, total[-1])
    return best(lambda before, cost: before + cost * cost, dearest)[1]
