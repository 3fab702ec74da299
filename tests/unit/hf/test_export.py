"""Export: what is written loads with torch and transformers alone and computes the same; what does not, vanishes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from loopmem_pretrain.errors import ConfigError, ConversionError, EnvironmentFault
from loopmem_pretrain.hf.export import (
    export,
    huggingface_config,
    write_settings,
    write_tokenizer,
)
from loopmem_pretrain.hf.load import load_hf
from loopmem_pretrain.hf.staging import staged
from loopmem_pretrain.hf.verify import reference_model
from loopmem_pretrain.hf.weights import check_weights, check_written, write_weights
from loopmem_pretrain.model.early_exit import EarlyExit, exit_forward
from tests.unit.hf.conftest import TEXTS, VARIANTS, model_config, native_model

SEQ_LENGTH = 48

# Run where loopmem_pretrain cannot be imported: uses a folder as any user of transformers would.
STRANGER = """
import json, sys, warnings
sys.modules["loopmem_pretrain"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, saved, prompt = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model(**ids, labels=ids["input_ids"], output_loop_stats=True)
output.loss.backward()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer([prompt, prompt[:9]], return_tensors="pt", padding=True, return_token_type_ids=False)
    cached, recomputed = (
        model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=keep)[:, -8:].tolist()
        for keep in (True, False)
    )
    early = model(ids["input_ids"], exit_threshold=0.6, output_loop_stats=True)
    alone, both = (
        model.generate(**some, max_new_tokens=8, do_sample=False, exit_threshold=0.6)[0, -8:].tolist()
        for some in (ids, batch)
    )
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
same = torch.equal(again(ids["input_ids"]).logits, output.logits)
print(json.dumps({
    "class": type(model).__module__.split(".")[0], "dtype": str(model.dtype), "loss": output.loss.item(),
    "context": config.max_position_embeddings, "loops": [s.expected_loops().mean().item() for s in output.loop_stats],
    "grads": all(p.grad is not None for p in model.parameters()), "tokens": tokens[0].tolist(), "saved_same": same,
    "batch_same": cached == recomputed and cached[0] == tokens[0, -8:].tolist(), "early_same": alone == both,
    "early": early.logits[0, -1, :5].tolist(), "ran": [s.loops.float().mean().item() for s in early.loop_stats],
}))
"""


def as_stranger(folder: Path, work: Path, prompt: str) -> dict:
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-P", "-c", STRANGER, str(folder), str(work / "saved"), prompt]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=120, cwd=work
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    return tensors


@pytest.fixture(scope="module")
def full(tmp_path_factory, tokenizer_path):
    """One float32 export of a model with everything: (folder, report, model)."""
    model = native_model(model_config("full"))
    folder = tmp_path_factory.mktemp("export") / "out"
    report = export(
        model.config, dict(model.named_parameters()), tokenizer_path, folder, sample_texts=TEXTS, seq_length=SEQ_LENGTH
    )
    return folder, report, model


# ------------------------------------------------------------------------------------------------- what is written


def test_the_tokenizer_knows_the_context(full):
    """`truncation=True`, as scripts for fine-tuning have it, cuts there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(full[0])
    assert tokenizer.model_max_length == SEQ_LENGTH
    assert len(tokenizer("fox " * 500, truncation=True).input_ids) == SEQ_LENGTH


def test_report(full):
    folder, report, model = full
    assert report.folder == folder and report.weight_files == ("model.safetensors",)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.weight_bytes == 4 * report.parameters
    comparison = report.comparison
    assert comparison.texts == 3 and 0 < comparison.tokens <= 3 * SEQ_LENGTH
    assert comparison.max_abs_difference <= comparison.tolerance == pytest.approx(1e-5 * max(1, comparison.scale))
    assert abs(comparison.reference_loss - comparison.exported_loss) <= comparison.tolerance
    assert comparison.reference_loss > 1
    # 2 layers of 3 loops, each with two gates, a state and a halting probability, and the logits
    assert comparison.places == 3 * (2 * 3 * 4 + 1)
    assert 1 <= comparison.greedy_tokens <= 16
    assert len(comparison.expected_loops) == 2 and all(1 < loops < 3 for loops in comparison.expected_loops)


def test_folder_holds_every_file_and_nothing_else(full):
    folder, _, _ = full
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_loopmem.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_loopmem.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_config_spells_out_every_field(full):
    folder, _, model = full
    values = json.loads((folder / "config.json").read_text())
    for key, value in model.config.model_dump().items():
        assert values[key] == value
    assert values["format_version"] == 1
    assert values["model_type"] == "loopmem" and values["max_position_embeddings"] == SEQ_LENGTH
    assert values["eos_token_id"] == 2 and values["dtype"] == "float32"


def test_generation_leaves_out_what_pads_the_vocabulary(full, tokenizer):
    folder, _, model = full
    suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == list(range(tokenizer.vocab_size, model.config.vocab_size)) != []


def test_weights_are_the_parameters(full):
    folder, _, model = full
    tensors = stored(folder)
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter), name


def test_stranger_loads_it_with_torch_and_transformers_alone(full, tmp_path, tokenizer):
    folder, _, model = full
    said = as_stranger(folder, tmp_path, TEXTS[0])
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    expected = model(ids[:, :-1], labels=ids[:, 1:])
    assert said["class"] == "transformers_modules" and said["dtype"] == "torch.float32"
    assert said["loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    assert said["context"] == SEQ_LENGTH and len(said["loops"]) == 2 and said["grads"]
    assert said["saved_same"] and said["batch_same"] and said["early_same"]
    hidden, stats = exit_forward(model.model, ids, EarlyExit(0.6, "halting"))
    assert said["early"] == pytest.approx(model.lm_head(hidden)[0, -1, :5].tolist(), rel=1e-4, abs=1e-5)
    assert said["ran"] == [layer.loops.float().mean().item() for layer in stats] != [3.0, 3.0]
    for _ in range(8):
        tokens = model(ids).logits[:, -1:, : tokenizer.vocab_size]  # what pads the vocabulary is never written
        ids = torch.cat((ids, tokens.argmax(-1)), dim=1)
    assert said["tokens"] == ids[0].tolist()


def test_bfloat16_tied_and_sharded(tmp_path, tokenizer_path):
    model = native_model(model_config("tied"))
    head = {"lm_head.weight": model.lm_head.weight}  # some checkpoints name a tied head too
    report = export(
        model.config,
        dict(model.named_parameters()) | head,
        tokenizer_path,
        tmp_path / "out",
        sample_texts=TEXTS,
        dtype="bfloat16",
        seq_length=SEQ_LENGTH,
        max_shard_size="20KB",
    )
    tensors = stored(tmp_path / "out")
    assert len(report.weight_files) > 1 and report.weight_bytes == 2 * report.parameters
    assert "lm_head.weight" not in tensors
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter.to(torch.bfloat16)), name
    loaded, _ = load_hf(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_and_computes_the_same(variant, tmp_path, tokenizer, tokenizer_path):
    """As export writes it, loaded in this process."""
    model = native_model(model_config(variant))
    with staged(tmp_path / "out") as folder:
        write_tokenizer(folder, tokenizer_path, TEXTS)
        weights = dict(model.named_parameters())
        write_weights(folder, weights, check_weights(model.config, weights), "float32")
        write_settings(folder, huggingface_config(model.config, tokenizer, SEQ_LENGTH, "float32"))
    loaded, _ = load_hf(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode(TEXTS[1])])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_reference_shares_the_memory_of_the_weights(tokenizer):
    model = native_model(model_config("tied"))
    reference = reference_model(model.config, dict(model.named_parameters()))
    weight = model.model.embed_tokens.weight
    assert reference.model.embed_tokens.weight.data_ptr() == reference.lm_head.weight.data_ptr() == weight.data_ptr()


# ------------------------------------------------------------------------------------- weights that are refused


def refused_weights(tmp_path, tokenizer_path, weights, variant="full") -> str:
    with pytest.raises(ConversionError) as caught:
        export(
            model_config(variant), weights, tokenizer_path, tmp_path / "out", sample_texts=TEXTS, seq_length=SEQ_LENGTH
        )
    assert list(tmp_path.iterdir()) == []
    return caught.value.problem


def parameters(variant="full") -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in native_model(model_config(variant)).named_parameters()}


def test_missing_weight(tmp_path, tokenizer_path):
    weights = parameters()
    del weights["model.norm.weight"]
    assert "model.norm.weight: missing" in refused_weights(tmp_path, tokenizer_path, weights)


def test_unexpected_weight(tmp_path, tokenizer_path):
    weights = {**parameters(), "model.extra": torch.zeros(2)}
    assert "model.extra: unexpected" in refused_weights(tmp_path, tokenizer_path, weights)


def test_weight_of_another_shape(tmp_path, tokenizer_path):
    weights = {**parameters(), "model.norm.weight": torch.ones(33)}
    problem = refused_weights(tmp_path, tokenizer_path, weights)
    assert "model.norm.weight: shape [33], expected [32]" in problem


def test_weight_of_another_type(tmp_path, tokenizer_path):
    weights = {**parameters(), "model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    assert "expected torch.float32" in refused_weights(tmp_path, tokenizer_path, weights)


def test_weight_that_is_not_finite(tmp_path, tokenizer_path):
    weights = parameters()
    weights["model.norm.weight"][3] = float("nan")
    assert "model.norm.weight: 1 of 32 values not finite" in refused_weights(tmp_path, tokenizer_path, weights)


def test_weight_that_is_not_finite_in_the_type_that_is_written(tmp_path):
    """The largest numbers of float32 are rounded up to infinity in bfloat16."""
    weights = {"a": torch.tensor([1.0, torch.finfo(torch.float32).max])}
    write_weights(tmp_path, weights, {"a": [2]}, "float32")
    with pytest.raises(ConversionError, match="a: 1 of 2 values not finite"):
        write_weights(tmp_path, weights, {"a": [2]}, "bfloat16")


def test_tied_head_that_is_not_the_embedding(tmp_path, tokenizer_path):
    weights = {**parameters("tied"), "lm_head.weight": torch.zeros(512, 32)}
    assert "lm_head.weight: tied" in refused_weights(tmp_path, tokenizer_path, weights, "tied")


def test_views_of_one_buffer_are_written_apart(tmp_path):
    """ZeRO checkpoints hand out views of a flat buffer."""
    weights = parameters()
    flat = torch.cat([value.flatten() for value in weights.values()])
    parts = flat.split([value.numel() for value in weights.values()])
    views = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
    write_weights(tmp_path, views, check_weights(model_config("full"), views), "float32", "20KB")
    tensors = stored(tmp_path)
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


# ------------------------------------------------------------------------------------------------ requests refused


def refused(error, tmp_path, tokenizer_path, **changes):
    request = {"sample_texts": TEXTS, "seq_length": SEQ_LENGTH, **changes}
    with pytest.raises(error) as caught:
        export(model_config("full"), parameters(), tokenizer_path, tmp_path / "out", **request)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
    return caught.value.problem


def test_unknown_dtype(tmp_path, tokenizer_path):
    assert "dtype 'float16' is not valid" in refused(ConfigError, tmp_path, tokenizer_path, dtype="float16")


def test_no_sample_texts(tmp_path, tokenizer_path):
    assert "no sample text" in refused(ConfigError, tmp_path, tokenizer_path, sample_texts=[])


def test_empty_sample_text(tmp_path, tokenizer_path):
    assert "sample text 1 is empty" in refused(ConfigError, tmp_path, tokenizer_path, sample_texts=["ab", ""])


def test_sequence_of_one_token(tmp_path, tokenizer_path):
    assert "seq_length 1" in refused(ConfigError, tmp_path, tokenizer_path, seq_length=1)


def test_tokenizer_larger_than_the_vocabulary(tmp_path, tokenizer_path):
    config = model_config("full").model_copy(update={"vocab_size": 300})
    with pytest.raises(ConversionError, match="has 400 tokens, the model's vocab_size is 300"):
        export(config, {}, tokenizer_path, tmp_path / "out", sample_texts=TEXTS, seq_length=SEQ_LENGTH)


def test_full_disk(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    script = (
        "import sys, torch; from pathlib import Path; from loopmem_pretrain.hf.weights import write_weights\n"
        "write_weights(Path(sys.argv[1]), {'a': torch.zeros(100_000)}, {'a': [100_000]}, 'float32')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        timeout=120,
    )
    assert EnvironmentFault.__name__ in done.stderr.splitlines()[-2], done.stderr
    assert "check the disk's space" in done.stderr or "free space" in done.stderr


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(EnvironmentFault, match="no room to write"):
        write_weights(tmp_path, {}, {"a": [10**16]}, "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_context_shorter_than_the_compared_prompt(tmp_path, tokenizer_path):
    model = native_model(model_config("plain"))
    weights, out = dict(model.named_parameters()), tmp_path / "out"
    report = export(model.config, weights, tokenizer_path, out, sample_texts=TEXTS[:1], seq_length=8)
    assert report.comparison.greedy_tokens > 0


def test_a_row_that_no_sample_text_reaches(tmp_path):
    """Comparing what models compute would not see it."""
    model = native_model(model_config("full"))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    shapes = check_weights(model.config, weights)
    other = {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"].clone()}
    other["model.embed_tokens.weight"][-1, -1] += 1e-6
    files = write_weights(tmp_path, other, shapes, "float32", "20KB")
    check_written(tmp_path, files, other, shapes, "float32")
    with pytest.raises(ConversionError) as caught:
        check_written(tmp_path, files, weights, shapes, "float32")
    assert "model.embed_tokens.weight: other numbers" in caught.value.problem and caught.value.problem.count(":") == 2
    (tmp_path / files[0]).write_bytes(b"")
    with pytest.raises(ConversionError, match=r"(?s)model-00001-of-.*: missing"):
        check_written(tmp_path, files, other, shapes, "float32")
