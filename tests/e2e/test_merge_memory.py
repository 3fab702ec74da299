"""Merging takes the memory of a few parameters, not of the state, however many ranks saved it."""

import math
import subprocess
import sys

import pytest

from loopmem_pretrain.checkpoint.manifest import read_manifest
from tests.e2e.test_training import config_for, run

MB = 2**20

# getrusage's ru_maxrss would include what the process had before exec: the memory of pytest.
MEASURE = """
import sys, threading, time
from pathlib import Path
from loopmem_pretrain.quiet import prepare_imports
prepare_imports("cpu")
import deepspeed.checkpoint.ds_to_universal
from loopmem_pretrain.checkpoint.safe_load import allowed_classes
from loopmem_pretrain.checkpoint.universal import merge
allowed_classes()  # imports the rest

def now():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS")]

def watch():
    while True:
        seen.append(now())
        time.sleep(0.002)

seen = [now()]
threading.Thread(target=watch, daemon=True).start()
merge(Path(sys.argv[1]), Path(sys.argv[2]))
print(*(max(values) - values[0] for values in zip(*seen)))
"""


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_peak_of_merging(tmp_path, sentences, zero_stage):
    config = config_for(
        tmp_path / "run",
        sentences,
        model={"hidden_size": 248, "intermediate_size": 6001, "num_hidden_layers": 5},
        parallel={"zero_stage": zero_stage},
        training={"train_steps": 1, "micro_batch_size": 1, "global_batch_size": 4},
        schedule={"warmup_steps": 1},
    )
    assert run(config, ranks=4) == ("done", None)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    sizes = [math.prod(shape) for shape in read_manifest(checkpoint)["parameter_shapes"].values()]
    state, largest = 12 * sum(sizes), 4 * max(sizes)
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    own, with_mapped = map(int, result.stdout.split())
    assert state > 250 * MB
    assert own <= 4 * largest + 16 * MB, f"{own / MB:.0f} MB"
    # Pages of at most two of the four ranks' files, which the system takes back where memory is short.
    assert with_mapped <= 2 * state / 4 + 4 * largest + 32 * MB, f"{with_mapped / MB:.0f} MB"
