"""The simulation: its formulas on numbers that can be checked by hand."""

from pathlib import Path

import pytest

from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.model.flops import forward_flops_per_token, projection_flops
from loopmem_pretrain.tools.communication import Traffic
from loopmem_pretrain.tools.memory_plan import Layout
from loopmem_pretrain.tools.step_time import (
    bubble_fraction,
    collective_hops,
    mfu,
    stage_flops,
    step_time,
    transfer_time,
)
from tests.configs import tiny_run

H100 = load_config(ClusterConfig, "configs/cluster/h100.yaml")


def test_bubble():
    assert bubble_fraction(1, 8) == 0
    assert bubble_fraction(4, 8) == 3 / 11
    # With wide layers and hardly any vocabulary all four stages are nearly equally slow.
    model = {"num_hidden_layers": 4, "vocab_size": 2, "hidden_size": 8192, "intermediate_size": 32768}
    layout = Layout.of(tiny_run(parallel={"pipeline_model_parallel_size": 4}, model=model), 4)
    time = step_time(layout, H100)
    busy = time.compute + time.tensor + time.pipeline
    assert time.bubble / (busy + time.bubble) == pytest.approx(bubble_fraction(4, layout.micro_batches), rel=0.05)


def test_a_fast_stage_costs_less_bubble():
    """With a large vocabulary the last of two stages is much slower, and waits for the first only once."""
    layout = Layout.of(tiny_run(parallel={"pipeline_model_parallel_size": 2}, model={"vocab_size": 4096}), 2)
    time = step_time(layout, H100)
    first = stage_flops(layout, 0) / stage_flops(layout, 1) * time.compute / layout.micro_batches
    assert time.bubble == pytest.approx(first + time.pipeline / layout.micro_batches)


def test_transfers():
    """1 GB over 450 GB/s x 0.8, 10 collectives of 8 ranks at 2 x 3 latencies of 5 us; between nodes 50 GB/s, 15 us."""
    assert transfer_time(Traffic(1e9, 10), collective_hops(8), False, H100) == pytest.approx(1 / 360 + 10 * 6 * 5e-6)
    assert transfer_time(Traffic(1e9, 10), collective_hops(8), True, H100) == pytest.approx(1 / 40 + 10 * 6 * 15e-6)
    assert transfer_time(Traffic(0, 1), 1, False, H100) == pytest.approx(5e-6)


def test_the_optimizer_moves_seven_float32_a_parameter():
    """AdamW reads gradient, weight and two moments, writes all but the gradient; each rank those of its share."""
    layout = Layout.of(tiny_run(), 2)
    expected = 7 * 4 * layout.parameters(0) / 2 / (H100.memory_gb_per_s * 1e9)
    assert step_time(layout, H100).optimizer == pytest.approx(expected)


def test_flops_of_one_rank_are_those_of_the_model():
    config = tiny_run()
    tokens = config.training.micro_batch_size * config.data.seq_length
    forward = forward_flops_per_token(config.model, config.data.seq_length, tokens=tokens)
    assert stage_flops(Layout.of(config, 1), 0) == pytest.approx(3 * forward.total * tokens)
    again = tiny_run(training={"activation_checkpointing": "loop"})
    recomputed = (forward.total - forward.head - forward.projections) * tokens  # slots are projected once a visit
    assert stage_flops(Layout.of(again, 1), 0) == pytest.approx(3 * forward.total * tokens + recomputed)


def test_all_ranks_together_compute_the_model_where_nothing_is_replicated():
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    sizes |= {"sequence_parallel": True, "memory_placement": "sharded"}
    whole = stage_flops(Layout.of(tiny_run(), 1), 0)
    layout = Layout.of(tiny_run(parallel=sizes), 4)
    assert 2 * sum(stage_flops(layout, stage) for stage in range(2)) == pytest.approx(whole)
    replicated = Layout.of(tiny_run(parallel={**sizes, "memory_placement": "replicated"}), 4)
    projected_again = 3 * 2 * projection_flops(tiny_run().model, 10**9)  # by the second rank: 3 passes, 2 layers
    assert 2 * sum(stage_flops(replicated, stage) for stage in range(2)) == pytest.approx(whole + projected_again)
    without = {**sizes, "memory_placement": "replicated", "sequence_parallel": False}
    assert 2 * sum(stage_flops(Layout.of(tiny_run(parallel=without), 4), stage) for stage in range(2)) > 1.2 * whole


def test_more_ranks_never_exceed_what_kernels_reach():
    layout = Layout.of(tiny_run(), 4)
    assert 0 < mfu(layout, step_time(layout, H100).total, H100) < H100.achievable_fraction


def test_bad_cluster_files(tmp_path):
    file = tmp_path / "cluster.yaml"
    text = Path("configs/cluster/h100.yaml").read_text()
    file.write_text(text.replace("peak_tflops", "peak_tflop") + "racks: 4\n")
    with pytest.raises(ConfigError) as error:
        load_config(ClusterConfig, file)
    said = str(error.value)
    assert (
        "peak_tflop: unknown key; did you mean peak_tflops?" in said and "racks: unknown key; valid keys: name" in said
    )
    file.write_text(text.replace("0.45", "45"))
    with pytest.raises(ConfigError, match="achievable_fraction: must be less than or equal to 1"):
        load_config(ClusterConfig, file)
