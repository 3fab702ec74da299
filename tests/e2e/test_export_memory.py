"""An export takes the memory of its largest part, not of the model: weights stay mapped from the disk."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.data.manifest import load_manifest
from tests.unit.hf.conftest import native_model

MB = 2**20

# As in test_merge_memory.py, and the memory of the process that loads the exported folder too.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
from loopmem_pretrain.quiet import prepare_imports
prepare_imports("cpu")
from safetensors.torch import load_file
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.hf.export import export

def anonymous(process):
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peaks[0] = max(peaks[0], anonymous("self"))
        children = Path("/proc/self/task").glob("*/children")
        for child in " ".join(path.read_text() for path in children).split():
            peaks[1] = max(peaks[1], anonymous(child))
        time.sleep(0.002)

config, weights, tokenizer, out, dtype = sys.argv[1:]
peaks = [0, 0]
threading.Thread(target=watch, daemon=True).start()
text = "Anna buys three apples. "
export(
    ModelConfig(**json.loads(config)), load_file(weights), tokenizer, out, sample_texts=[text], dtype=dtype,
    seq_length=32
)
print(*peaks)
"""


def peaks(tmp_path, sentences, layers: int, dtype: str) -> tuple[int, int]:
    """Most private memory of the exporting process and of the one that loads the folder, in bytes."""
    config = ModelConfig(
        vocab_size=5000,
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_loops=2,
    )
    path = tmp_path / f"{layers}.safetensors"
    save_file(dict(native_model(config).named_parameters()), path)
    command = [
        sys.executable,
        "-c",
        MEASURE,
        json.dumps(config.model_dump()),
        str(path),
        str(sentences / load_manifest(sentences).tokenizer.file),
        str(tmp_path / f"out-{layers}"),
        dtype,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    own, child = map(int, result.stdout.split())
    return own, child


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_an_export(tmp_path, sentences, dtype):
    small, large = (peaks(tmp_path, sentences, layers, dtype) for layers in (1, 17))
    more_weights = 4 * 16 * (3 * 256 * 4096 + 4 * 256 * 256)
    largest_part = more_weights // 16
    assert more_weights > 200 * MB
    for name, before, after in zip(("export", "verification"), small, large, strict=True):
        assert after - before <= largest_part + 16 * MB, f"{name}: {(after - before) / MB:.0f} MB"
