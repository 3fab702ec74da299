"""Shared by all tests: one thread a process, no network, caches of Hugging Face in a folder of the test's own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of generated sentences, vocabulary 320. Read only."""
    from tests.prepared import prepare_sentences

    return prepare_sentences(tmp_path_factory.mktemp("sentences"))
