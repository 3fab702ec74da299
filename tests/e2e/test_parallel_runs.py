"""Whole runs over tensor- and pipeline-parallel ranks: exact resume, the same losses, and conversion."""

import pytest
import torch

from tests.e2e.test_training import config_for, exact, lines, run

MODEL = {"num_hidden_layers": 4, "vocab_size": 321}
LAYOUTS = {
    "tp2-pp2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}, 4),
    "tp2-dp2-zero3": ({"tensor_model_parallel_size": 2, "memory_placement": "sharded", "zero_stage": 3}, 4),
    "tp2-zero2": ({"tensor_model_parallel_size": 2, "zero_stage": 2}, 2),
}


def config(run_dir, data_dir, parallel, **sections):
    return config_for(run_dir, data_dir, model=MODEL, parallel=parallel, **sections)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_and_conversion(tmp_path, sentences, layout):
    from loopmem_pretrain.checkpoint.universal import fp32_weights

    parallel, ranks = LAYOUTS[layout]
    run(config(tmp_path / "whole", sentences, parallel), ranks)
    run(config(tmp_path / "parts", sentences, parallel), ranks, stop_at_step=10)
    run(config(tmp_path / "parts", sentences, parallel), ranks)
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")

    run(config(tmp_path / "plain", sentences, {}), 1)
    for line, plain in zip(lines(tmp_path / "whole"), lines(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert line["expected_loops"] == pytest.approx(plain["expected_loops"], rel=1e-4)

    merged = dict(fp32_weights(tmp_path / "whole" / "checkpoints" / "step_00000020"))
    expected = dict(fp32_weights(tmp_path / "plain" / "checkpoints" / "step_00000020"))
    assert list(merged) == list(expected)
    for name, value in merged.items():
        limit = 20 * 1e-2 if name.endswith("key_norm.bias") else 2e-3
        torch.testing.assert_close(value, expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
