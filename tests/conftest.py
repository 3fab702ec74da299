"""Shared by all tests: one thread a process, no network, caches of Hugging Face in a folder of the test's own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are dealt out to the processes.

    All of tests/slurm goes to one process: a second cluster would have the same cgroups. The full product of layouts,
    hours of one file, goes to all: by its models, each of which is compared with one plain process.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/slurm/"):
                return "tests/slurm"
            file, _, test = nodeid.partition("::")
            if test.startswith("test_everything["):
                return test.partition("tied=")[0] + test.partition("tied=")[2].partition(" ")[0]
            return file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of generated sentences, vocabulary 320. Read only."""
    from tests.prepared import prepare_sentences

    return prepare_sentences(tmp_path_factory.mktemp("sentences"))
