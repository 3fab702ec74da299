"""Replicas that differ are found, bit for bit, and named with their ranks."""

import pytest
import torch

from loopmem_pretrain.errors import TrainingGaveUp
from loopmem_pretrain.parallel import checks
from loopmem_pretrain.parallel.checks import fingerprint, replica_differences, replicas_differ
from tests.distributed import run_ranks

HERE = "tests.unit.parallel.test_checks"
DTYPES = [torch.float32, torch.bfloat16]


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {"embed": torch.randn(7, 5, generator=generator), "norm": torch.ones(5), "scale": torch.tensor(-7.0)}
    values["bank"] = torch.full((4, 3), float("nan"))
    return {name: value.to(dtype) for name, value in values.items()}


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """Turn one bit of one element over, in place."""
    same_width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.view(-1).view(same_width)[place] ^= 1 << bit


def differences_on_rank(rank, world_size, dtype, damage, pairs=False):
    """`damage`: (rank, parameter, place, bit) to flip before the check; `pairs` checks ranks in groups of two."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values = weights(dtype)
    for where, name, place, bit in damage:
        if where == rank:
            flip(values[name], place, bit)
    group = None
    if pairs:
        groups = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
        group = groups[rank // 2]
    result = replica_differences(values.items(), group, "tensor-parallel" if pairs else "data-parallel")
    dist.barrier()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_replicas(dtype):
    assert run_ranks(f"{HERE}:differences_on_rank", 2, dtype, []) == [[], []]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_names_parameter_and_rank(dtype):
    results = run_ranks(f"{HERE}:differences_on_rank", 3, dtype, [(1, "embed", 34, 0)])
    assert results == [["embed differs between data-parallel ranks 0, 1, 2: rank 1 holds other bits"]] * 3


def test_several_parameters_and_ranks():
    damage = [(0, "scale", 0, 3), (2, "bank", 11, 1), (3, "bank", 11, 1)]  # a NaN with another payload, on two of four
    results = run_ranks(f"{HERE}:differences_on_rank", 4, torch.float32, damage)
    assert results[0] == [
        "scale differs between data-parallel ranks 0, 1, 2, 3: rank 0 holds other bits",
        "bank differs between data-parallel ranks 0, 1, 2, 3: ranks 2, 3 hold other bits",
    ]
    assert results[1:] == results[:1] * 3


def test_ranks_are_named_by_their_global_numbers():
    results = run_ranks(f"{HERE}:differences_on_rank", 4, torch.bfloat16, [(3, "norm", 0, 15)], True)
    assert results[:2] == [[], []]
    assert results[2:] == [["norm differs between tensor-parallel ranks 2, 3: rank 3 holds other bits"]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_counts(dtype):
    values = weights(dtype)["embed"]
    seen = {int(fingerprint(values))}
    for place in range(values.numel()):
        for bit in range(8 * values.element_size()):
            changed = values.clone()
            flip(changed, place, bit)
            seen.add(int(fingerprint(changed)))
    assert len(seen) == 1 + values.numel() * 8 * values.element_size()


def test_places_signs_and_opposite_changes_count():
    values = torch.arange(1.0, 9.0)
    exchanged = values[[1, 0, 2, 3, 4, 5, 6, 7]]
    opposite = values.clone()
    flip(opposite, 0, 0)  # one unit in the last place up here, and down there
    opposite.view(torch.int32)[1] -= 1
    zeros = torch.zeros(3)
    distinct = [values, exchanged, opposite, -values, zeros, -zeros, torch.zeros(4), torch.zeros(0)]
    assert len({int(fingerprint(tensor)) for tensor in distinct}) == len(distinct)


def test_chunks_do_not_change_the_answer(monkeypatch):
    values = torch.randn(1000)
    whole = int(fingerprint(values))
    monkeypatch.setattr(checks, "CHUNK", 64)
    assert int(fingerprint(values)) == whole
    exchanged = torch.cat([values[64:128], values[:64], values[128:]])
    assert int(fingerprint(exchanged)) != whole


def test_a_view_is_read_as_its_values():
    values = torch.randn(6, 4)
    assert int(fingerprint(values.t())) == int(fingerprint(values.t().contiguous()))
    assert int(fingerprint(values.requires_grad_())) == int(fingerprint(values.detach()))


def test_the_error_names_step_and_lines():
    error = replicas_differ([f"weight {n}: ..." for n in range(25)], 1200)
    assert isinstance(error, TrainingGaveUp) and error.exit_code == 7
    assert "at step 1,200" in error.problem and "weight 19" in error.problem
    assert "weight 20" not in error.problem and "and 5 more" in error.problem
    assert "checkpoint" in error.fix
