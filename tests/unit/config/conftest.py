"""A small valid configuration as text, so that tests can damage one line of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.errors import ConfigError

GOOD = """\
run_dir: runs/test
model:
  vocab_size: 96
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  max_loops: 3
  local_slots: 8
data:
  datasets:
    - path: tokens
  seq_length: 16
training:
  train_steps: 20
  global_batch_size: 8
  micro_batch_size: 2
  precision: fp32
optimizer:
  lr: 1e-2
schedule:
  warmup_steps: 2
  min_lr: 1e-5
"""


class Files:
    """Writes config files into a folder and loads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "run.yaml"

    def load(self, text: str, *overrides: str) -> RunConfig:
        self.path.write_text(text, encoding="utf-8")
        return load_config(RunConfig, self.path, overrides, run_problems)

    def problems(self, text: str, *overrides: str) -> str:
        """What is said about a bad configuration, with the folder left out."""
        with pytest.raises(ConfigError) as caught:
            self.load(text, *overrides)
        assert caught.value.fix
        return caught.value.problem.replace(f"{self.folder}/", "")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def bad(files: Files) -> Callable[..., str]:
    """bad("hidden_size: 32", "hidden_size: x", *overrides): the one line said about GOOD with that replaced."""

    def say(old: str, new: str, *overrides: str) -> str:
        assert GOOD.count(old) == 1, f"{old!r} must occur once"
        lines = files.problems(GOOD.replace(old, new), *overrides).splitlines()
        assert lines[0] == "1 problem in the configuration", lines
        return lines[1].strip()

    return say
