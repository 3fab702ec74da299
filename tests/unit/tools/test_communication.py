"""Bytes and collectives by formula against those that real engines ask torch.distributed for."""

import pytest
import torch
import torch.distributed as dist

from loopmem_pretrain.tools.communication import all_reduce, data_parallel, gather_or_scatter, tensor_parallel, traffic
from loopmem_pretrain.tools.memory_plan import Layout
from tests.configs import tiny_run
from tests.distributed import run_ranks
from tests.parity.test_engines import batches


def count_traffic(rank, world_size, config, axis):
    """(bytes, collectives) that this rank sends over the groups of `axis` in one training step; rings."""
    from loopmem_pretrain.parallel import collectives
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import TrainingEngine, init_distributed

    init_distributed(torch.device("cpu"), config.parallel)
    topology = Topology.join(config.parallel)
    engine = TrainingEngine(config, torch.device("cpu"), topology)
    mine = next(ranks for ranks in topology.rank_lists(axis) if rank in ranks)
    sent = []

    def counted(function, whole, share):
        def call(*args, **kwargs):
            group = kwargs.get("group")
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            tensor = args[whole] if len(args) > whole else kwargs["tensor"]
            if members == mine and tensor.numel() > 4:  # not the flags and norms of single numbers
                sent.append(tensor.numel() * tensor.element_size() * share * (len(mine) - 1) / len(mine))
            return function(*args, **kwargs)

        return call

    dist.all_reduce = counted(dist.all_reduce, 0, 2)
    collectives._all_gather = counted(collectives._all_gather, 0, 1)
    collectives._reduce_scatter = counted(collectives._reduce_scatter, 1, 1)
    engine.train_batch(iter(batches(config, 0)[topology.data_rank :: topology.data_size]), 0)
    return sum(sent), len(sent)


@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole stream", "sequence parallel"])
def test_tensor_parallel_traffic(sequence, placement, checkpointing):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence, "memory_placement": placement}
    config = tiny_run(parallel=parallel, training={"activation_checkpointing": checkpointing})
    expected = tensor_parallel(Layout.of(config, 2), 0)
    counted = run_ranks("tests.unit.tools.test_communication:count_traffic", 2, config, "tensor")
    for size, messages in counted:
        assert expected.bytes == pytest.approx(size, rel=0.02)
        assert expected.messages == pytest.approx(messages, rel=0.05)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    assert all_reduce(1000, 4) == (1500, 1)
    assert gather_or_scatter(1000, 4) == (750, 1)
    assert all_reduce(1000, 1) == gather_or_scatter(1000, 1) == (0, 0)


def test_zero_stages_differ_in_what_they_send():
    """Of m micro-batches: one float32 sum and one gather; m sums and one gather; m reduce-scatters and 2 m gathers."""
    sent = [data_parallel(Layout.of(tiny_run(parallel={"zero_stage": z}), 2), 0).bytes for z in (1, 2, 3)]
    half = Layout.of(tiny_run(), 2).parameters(0) * 4 / 2  # bytes of a reduce-scatter or all-gather over 2 ranks
    m = Layout.of(tiny_run(), 2).micro_batches
    assert sent == [3 * half, (2 * m + 1) * half, 3 * m * half]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_data_parallel_reductions(zero_stage):
    """DeepSpeed gathers the new weights through a function of its own, which is not counted."""
    config = tiny_run(parallel={"zero_stage": zero_stage})
    layout = Layout.of(config, 2)
    gathered = gather_or_scatter(layout.parameters(0) * 4, 2)
    expected = data_parallel(layout, 0).bytes - gathered.bytes
    for size, _ in run_ranks("tests.unit.tools.test_communication:count_traffic", 2, config, "data"):
        assert expected == pytest.approx(size, rel=0.02)


def three_stages(**model):
    return Layout.of(tiny_run(parallel={"pipeline_model_parallel_size": 3}, model={"num_hidden_layers": 3, **model}), 3)


def test_stages_send_to_their_neighbours():
    """Activations [2, 16, 32] of float32 forward, gradients back: of each micro-batch, to one neighbour or two."""
    layout = three_stages()
    message, m = 2 * 16 * 32 * 4, layout.micro_batches
    sent = [traffic(layout, stage)["pipeline"] for stage in range(3)]
    assert sent == [(m * message, m), (2 * m * message, 2 * m), (m * message, m)]


def test_weights_that_stages_share_are_summed_once_a_step():
    """The memory over all three: four norms of 32, keys and values [4, 32]; a tied embedding over the two ends."""
    memory, embedding = 4 * (4 * 32 + 2 * 4 * 32), 4 * 96 * 32
    assert [traffic(three_stages(), stage)["tied weights"] for stage in range(3)] == [(memory * 2 * 2 / 3, 6)] * 3
    ends, middle = (memory * 2 * 2 / 3 + embedding, 7), (memory * 2 * 2 / 3, 6)
    layout = three_stages(tie_word_embeddings=True)
    assert [traffic(layout, stage)["tied weights"] for stage in range(3)] == [ends, middle, ends]


def test_a_rank_alone_sends_nothing():
    assert all(kind == (0, 0) for kind in traffic(Layout.of(tiny_run(), 1), 0).values())
