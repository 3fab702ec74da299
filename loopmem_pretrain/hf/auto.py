"""Teaches transformers the model type `loopmem`: folders load without trust_remote_code.

    import loopmem_pretrain.hf
    model = AutoModelForCausalLM.from_pretrained("exported")  # this package's classes; no code of the folder runs

transformers has no entry point for this, so it takes an import; importing the package alone loads no transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM, LoopMemModel

AutoConfig.register(LoopMemConfig.model_type, LoopMemConfig)
AutoModel.register(LoopMemConfig, LoopMemModel)
AutoModelForCausalLM.register(LoopMemConfig, LoopMemForCausalLM)
