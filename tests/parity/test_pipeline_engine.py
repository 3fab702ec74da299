"""What the pipeline engine does otherwise than DeepSpeed's: see training/pipeline_engine.py."""

import weakref

import pytest
import torch

from tests.configs import tiny_run
from tests.distributed import run_ranks
from tests.parity.test_engines import batches, make_engine

PP = "pipeline_model_parallel_size"


def replicas_on_rank(rank, world_size, config):
    """What differs in the working weights; the float32 weights of tied modules."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = make_engine(config)
    data_rank, size = engine.topology.data_rank, engine.topology.data_size
    for step in range(4):
        engine.train_batch(iter(batches(config, step)[data_rank::size]), step)
    tied = engine.engine.module.tied_modules.named_parameters()
    masters = {name: safe_get_full_fp32_param(parameter) for name, parameter in tied}
    return engine.replica_differences(), masters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("parallel", "ranks", "tied"),
    [
        ({PP: 2}, 6, False),
        pytest.param({PP: 2}, 6, True, marks=pytest.mark.slow),
        pytest.param(
            {PP: 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 12, False, marks=pytest.mark.slow
        ),
    ],
)
def test_tied_weights_stay_the_same_bits_on_all_stages(parallel, ranks, tied, precision):
    """Of three data-parallel ranks and more: two numbers have one sum, three are added in the order of a ring.

    In bf16 the sums of so few numbers are exact in any order; there the test sees that the path is right.
    """
    config = tiny_run(
        parallel=parallel,
        # The bank is half of what is not decayed on the last stage, a third of it on the first.
        model={
            "num_hidden_layers": 3,
            "tie_word_embeddings": tied,
            "num_key_value_heads": 4,
            "local_slots": 64,
            "global_slots": 64,
        },
        training={"precision": precision, "global_batch_size": 6, "micro_batch_size": 1},
        optimizer={"lr": 1e-2},
    )
    results = run_ranks("tests.parity.test_pipeline_engine:replicas_on_rank", ranks, config)
    shared = {name for _, masters in results for name in masters if all(name in each for _, each in results)}
    assert shared
    for differences, masters in results:
        assert differences == []
        for name in shared:
            assert torch.equal(masters[name], results[0][1][name]), name


def memory_on_rank(rank, world_size, config):
    """Logits alive when each loss begins; whether gradients were copied to be averaged."""
    engine = make_engine(config)
    seen, alive, copied = [], [], []
    loss, reduce = engine.engine.module.loss_fn, engine.engine.allreduce_bucket

    def watched_loss(logits, labels):
        seen.append(weakref.ref(logits))
        alive.append(sum(one() is not None for one in seen))
        return loss(logits, labels)

    def watched_reduce(bucket, *args, **kwargs):
        result = reduce(bucket, *args, **kwargs)
        copied.append(result.data_ptr() not in {tensor.data_ptr() for tensor in bucket})
        return result

    engine.engine.module.loss_fn, engine.engine.allreduce_bucket = watched_loss, watched_reduce
    for step in range(2):
        engine.train_batch(iter(batches(config, step)), step)
    return alive, copied


def test_no_logits_are_kept_and_no_gradients_copied():
    config = tiny_run(training={"precision": "bf16"})
    ((alive, copied),) = run_ranks("tests.parity.test_pipeline_engine:memory_on_rank", 1, config)
    assert set(alive) == {1}
    assert copied and not any(copied)


def files_on_rank(rank, world_size, config, folder):
    return {name: set(state) for name, state in make_engine(config).collect_states(folder, "step").items()}


def test_shared_memory_is_saved_once_a_stage(tmp_path):
    config = tiny_run(model={"num_hidden_layers": 3}, parallel={PP: 2})
    for files in run_ranks("tests.parity.test_pipeline_engine:files_on_rank", 2, config, tmp_path):
        shared = [name for name, keys in files.items() if "query_norm.weight" in keys]
        assert len(shared) == 1, sorted(files)
