"""What a folder that was begun takes up again, and what it refuses."""

# ruff: noqa: F811 - the fixtures that are imported are what tests name
from pathlib import Path

import pytest

from loopmem_pretrain.config.prepare import SourceConfig
from loopmem_pretrain.data.prepare import prepare
from loopmem_pretrain.errors import DataError
from tests.unit.data.test_prepare import (  # noqa: F401 - fixtures
    content,
    corpus,
    interrupt,
    megatron,
    recipe,
    small_batches,
    undisturbed,
)


def test_a_recipe_that_is_corrected_before_the_first_shard_begins_anew(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """As after a misspelt field of the text: there is nothing to keep, and nothing to delete by hand."""
    right = recipe(corpus, tmp_path)
    wrong = right.model_copy(update={"sources": (right.sources[0].model_copy(update={"text_field": "texd"}),)})
    with pytest.raises(DataError, match="broken lines"):
        prepare(wrong)
    stages: list[str] = []
    prepare(right, lambda done, total, info: stages.append(info["stage"]))
    assert "hash sources" not in stages  # known from before
    assert content(tmp_path) == undisturbed


def test_of_many_differences_some_are_shown(corpus: Path, tmp_path: Path) -> None:
    interrupt(corpus, tmp_path / "out")
    for index in range(30):
        (tmp_path / f"{index:02}.jsonl").write_text('{"text": "a"}\n')
    other = (SourceConfig(paths=(str(tmp_path / "*.jsonl"),), origin="test", license="CC0"),)
    with pytest.raises(DataError, match=r"and \d+ more") as caught:
        prepare(recipe(corpus, tmp_path / "out", sources=other))
    assert len(caught.value.problem.splitlines()) == 12
