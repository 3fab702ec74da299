"""Items of the task suites: two forms of rows, one form of items, and what is refused."""

import json

import pytest

from loopmem_pretrain.errors import DataError
from loopmem_pretrain.eval.task_data import FORMS, read_items
from tests.tasks import HUB, LOCAL

FORM_OF = {
    "arc_easy.jsonl": "arc",
    "arc_challenge.jsonl": "arc",
    "siqa.jsonl": "social_iqa",
    "lambada_openai.jsonl": "lambada",
    **{f"{name}.jsonl": name for name in ("hellaswag", "piqa", "winogrande", "qasper", "math")},
}


def read(folder, file, lines, **arguments):
    (folder / file).write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    where = {"form": FORM_OF[file], "file": file, "hub": "nobody/nothing", "split": "test", "data_dir": str(folder)}
    return read_items(**where, **arguments)["test"]


def test_every_form_has_rows_here():
    assert set(FORM_OF.values()) == set(FORMS) and set(FORM_OF) == set(LOCAL) == set(HUB)


@pytest.mark.parametrize("file", FORM_OF)
def test_local_and_hub_rows_give_the_same_items(tmp_path, file):
    local, hub = read(tmp_path, file, LOCAL[file][:1]), read(tmp_path, file, [HUB[file]])
    if file == "siqa.jsonl":  # the local rows have two of the hub's three answers
        assert hub[0]["choices"].pop() == "old"
    assert local == hub
    assert list(local.features) == list(local[0])


def test_prompts_and_targets_are_written(tmp_path):
    (item,) = read(tmp_path, "math.jsonl", [HUB["math.jsonl"]], prompt="Problem:\n{problem}\n\nSolution:")
    assert item["prompt"] == "Problem:\nWhat is $0+0$?\n\nSolution:" and item["target"] == " It is $\\boxed{0}$."


@pytest.mark.parametrize("file", ["arc_easy.jsonl", "qasper.jsonl", "lambada_openai.jsonl"])
def test_a_data_set_is_streamed(tmp_path, file):
    """A folder in place of a name on the hub: `datasets` reads both alike."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(json.dumps(HUB[file]) + "\n")
    streamed = read_items(FORM_OF[file], file, str(tmp_path / "set"), "test")["test"]
    assert streamed == read(tmp_path, file, [HUB[file]])


def test_a_category_is_chosen(tmp_path):
    items = read(tmp_path, "math.jsonl", LOCAL["math.jsonl"], category="algebra")
    assert [item["problem"] for item in items] == ["What is $0+0$?", "What is $7+7$?"]
    with pytest.raises(DataError, match="holds no item of category 'topology'"):
        read(tmp_path, "math.jsonl", LOCAL["math.jsonl"], category="topology")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"query": "a", ', "piqa.jsonl:2: broken JSON"),
        (b'{"query": "\xff"}', "piqa.jsonl:2: broken JSON"),
        (b"[1, 2]", "piqa.jsonl:2: not a JSON object"),
        (
            {"question": "a", "gold": 0},
            "piqa.jsonl:2: has the keys gold, question; an item has query, choices, gold or ",
        ),
        ({"query": "a", "choices": ["b", "c"], "gold": 2}, "piqa.jsonl:2: gold is 2, and there are 2 choices"),
        ({"query": "a", "choices": ["b", "c"], "gold": True}, "piqa.jsonl:2: gold is True"),
        ({"query": "a", "choices": ["b", "c"], "gold": "0"}, "piqa.jsonl:2: gold is '0'"),
        ({"query": "a", "choices": ["b", " "], "gold": 0}, "piqa.jsonl:2: choices is .* must not be empty"),
        ({"query": "a", "choices": [], "gold": 0}, "piqa.jsonl:2: choices is .* must not be empty"),
        ({"query": "a", "choices": [1, 2], "gold": 0}, "piqa.jsonl:2: its query, choices, gold do not make an item"),
        (
            b'{"query": "a \\ud83e b", "choices": ["b", "c"], "gold": 0}',
            r"piqa.jsonl:2: question is no Unicode text: '\\ud83e' at character 3",
        ),
        ({"query": "a", "choices": ["b", "\udd8a"], "gold": 1}, "piqa.jsonl:2: choices is no Unicode text"),
        ({"query": 5, "choices": ["b", "c"], "gold": 0}, "piqa.jsonl:2: its query, choices, gold do not make an item"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, line, problem):
    with pytest.raises(DataError, match=problem):
        read(tmp_path, "piqa.jsonl", [LOCAL["piqa.jsonl"][0], line])


def test_options_that_are_not_lettered(tmp_path):
    with pytest.raises(DataError, match=r"siqa.jsonl:1: .*query is not 'Context"):
        read(tmp_path, "siqa.jsonl", [{"query": "How is Ann?", "choices": ["A"], "gold": 0}])


def test_a_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match="holds no item"):
        read(tmp_path, "piqa.jsonl", [])
    (tmp_path / "piqa.jsonl").unlink()
    (tmp_path / "piqa.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_items("piqa", "piqa.jsonl", "nobody/nothing", "test", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        read_items("piqa", "nowhere.jsonl", "nobody/nothing", "test", data_dir=str(tmp_path))
