"""What we use of libraries beyond their public names: a new release that drops one must fail here, by name."""

import inspect

import pytest


def private_names():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from torch import nn
    from torch.distributed import distributed_c10d

    return [
        (distributed_c10d, "default_pg_timeout", "parallel/start.py sets the limit of groups that DeepSpeed makes"),
        (distributed_c10d, "_get_default_store", "parallel/start.py waits for rank 0 at it"),
        (nn.Linear(1, 1), "_load_state_dict_pre_hooks", "parallel/megatron.py clears megatron's"),
        (PipelineModule, "_partition_layers", "training/pipeline.py cuts the list itself"),
        (PipelineModule, "_set_bounds", "training/pipeline.py cuts the list itself"),
        (PipelineModule, "get_tied_weights_and_groups", "training/pipeline.py adds partial gradients there"),
        (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state", "training/master_state.py"),
        (BF16_Optimizer, "_lazy_init_hp_params_optimizer_state", "training/master_state.py"),
        (DeepSpeedZeroOptimizer_Stage3, "set_local_hp_param", "training/master_state.py"),
        (PipelineEngine, "_exec_reduce_tied_grads", "training/pipeline.py counts on its use of the tied weights"),
    ]


@pytest.mark.parametrize(("owner", "name", "user"), private_names(), ids=lambda value: str(value)[-40:])
def test_it_is_there(owner, name, user):
    assert hasattr(owner, name), f"{owner} has no {name} any more: {user} must change"


def test_the_pipeline_engine_sums_what_the_module_names():
    from deepspeed.runtime.pipe.engine import PipelineEngine

    assert "get_tied_weights_and_groups" in inspect.getsource(PipelineEngine._exec_reduce_tied_grads)
