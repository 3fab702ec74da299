"""What transformers' auto classes make of a folder, with the package's classes and with the folder's own code."""

import os
import subprocess
import sys

import pytest
import torch

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.export import huggingface_config, write_settings, write_tokenizer
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.hf.weights import check_weights, write_weights
from tests.unit.hf.conftest import SIZES, TEXTS, model_config, native_model

# Both ways of loading and saving; the package is importable in one of them only.
PROGRAM = """
import sys
how, folder, saved = sys.argv[1:]
if how == "package":
    import loopmem_pretrain.hf
    trust = {}
else:
    sys.modules["loopmem_pretrain"] = None
    trust = {"trust_remote_code": True}
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
ids = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
config = AutoConfig.from_pretrained(folder, **trust)
assert type(config).__module__.startswith("loopmem_pretrain" if how == "package" else "transformers_modules")
for dtype in (torch.float32, torch.bfloat16):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **trust)
    base = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, **trust)
    for model, info in (loaded, base):
        assert not any(info.values()), info
        assert {value.dtype for value in model.parameters()} == {dtype}
    (model, _), (base, _) = loaded, base
    hidden = base(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids).logits)
    assert torch.equal(base(ids, return_dict=False)[0], hidden) and not base.can_generate()
    for kind, original in ((AutoModelForCausalLM, model), (AutoModel, base)):
        original.save_pretrained(saved)
        again = kind.from_pretrained(saved, **trust)
        assert again.state_dict().keys() == original.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in original.state_dict().items())
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The quick", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("The quick")
features = pipeline("feature-extraction", model=base.float(), tokenizer=tokenizer)("The quick")
assert len(features[0][0]) == config.hidden_size
try:
    base(ids, labels=ids)
except ValueError as error:
    assert "no head" in str(error)
else:
    raise AssertionError("labels without a head")
print("all is well")
"""


@pytest.fixture(scope="module", params=["full", "tied"])
def folder(request, tmp_path_factory, tokenizer_path, tokenizer):
    folder = tmp_path_factory.mktemp("export")
    model = native_model(model_config(request.param))
    weights = dict(model.named_parameters())
    write_tokenizer(folder, tokenizer_path, TEXTS)
    write_weights(folder, weights, check_weights(model.config, weights), "float32", "100KB")
    write_settings(folder, huggingface_config(model.config, tokenizer, 64, "float32"))
    return folder


# What a stranger can do with what the package has saved.
STRANGER = """
import sys
sys.modules["loopmem_pretrain"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_stranger_loads_what_the_package_saves(fresh, folder, tmp_path):
    """A model that it loaded, and one that never was an export."""
    model = LoopMemForCausalLM(LoopMemConfig(**SIZES)) if fresh else LoopMemForCausalLM.from_pretrained(folder)
    model.eval().save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "saved"), str(tmp_path / "logits")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), model(torch.arange(12)[None]).logits)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["package", "folder"])
def test_loads_both_ways(how, folder, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", PROGRAM, how, str(folder), str(tmp_path / "saved")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr


def test_base_model_takes_a_language_model(folder):
    """In this process, with the package's classes."""
    from transformers import AutoModel, AutoModelForCausalLM

    import loopmem_pretrain.hf  # noqa: F401

    ids = torch.arange(12)[None]
    base, model = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "loopmem_pretrain.hf.modeling_loopmem"
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), model(ids).logits)
    assert not any(name.startswith("lm_head") for name, _ in base.named_parameters())


def test_importing_any_of_the_package_registers_the_model_type():
    code = "import loopmem_pretrain.hf.configuration_loopmem; from transformers import AutoConfig; "
    code += "assert AutoConfig.for_model('loopmem').max_loops"
    subprocess.run([sys.executable, "-c", code], check=True)
