"""The items of the task suites: read from a local folder of .jsonl files or from the Hugging Face hub.

Both give rows, and a row has the columns of the hub's data set or those of the common local files (`query`, `choices`,
`gold`). `FORMS` reads either into what the task files in tasks/ write prompts from. A row that fits neither is refused
with its file and line, before anything is scored.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.config.prepare import SourceConfig
from loopmem_pretrain.errors import DataError

Item = dict[str, Any]
"""One item of a task: texts, lists of texts and the number of the right one."""


class Items(list[Item]):
    """All items of a task, as the harness wants a split: a sequence that names its columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


def read_items(
    form: str,
    file: str,
    hub: str,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    category: str | None = None,
    prompt: str | None = None,
    data_dir: str | None = None,
    **_: Any,
) -> dict[str, Items]:
    """The items of one task under the key `test`; task files name this function and its arguments.

    Args:
        form: key of FORMS.
        file: name of the local file, read from `data_dir` where that is given.
        hub: data set on the hub, read where no `data_dir` is given, with its `subset`, `split` and `revision`.
        prompt: becomes the column `prompt`, with the item's other columns put in.
        category: only rows whose `category` is this; rows without one count where they come from the hub.
        _: what else the harness hands on from a task file's metadata.

    Raises:
        DataError: no file, no network, a row that does not fit, no row at all.
    """
    items = Items()
    for place, row in _local_rows(Path(data_dir) / file) if data_dir else _hub_rows(hub, subset, split, revision):
        if category is None or row.get("category", category) == category:
            items += _items_of(form, place, row)
    if not items:
        where = f"{data_dir}/{file}" if data_dir else hub
        of = f" of category {category!r}" if category else ""
        raise DataError(f"{where}: holds no item{of}", "restore the file, or leave this task out")
    # Written here, once: the harness would compile a template for each item and example, a millisecond each.
    for item in items:
        if prompt is not None:
            item["prompt"] = prompt.format(**item)
        if "continuation" in item:
            item["target"] = f" {item['continuation']}"
    return {"test": items}


def _local_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl file, each with what to call it."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _row(f"{path}:{number}", line)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", "put the file there, or leave this task out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error


def _row(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise DataError(f"{place}: broken JSON: {error}", "restore the file: each line is one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object", "restore the file: each line is one JSON object")
    return row


def _hub_rows(name: str, subset: str | None, split: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    from loopmem_pretrain.data.corpus import Cursor
    from loopmem_pretrain.data.hub import hub_rows

    source = SourceConfig(
        kind="hub", name=name, config=subset, split=split, revision=revision, origin="evaluation", license="evaluation"
    )
    try:
        for row in hub_rows(source, Cursor()):
            if isinstance(row.record, dict):
                yield row.place, row.record
    except DataError as error:
        fix = "check the network, or put the data into a folder (--data-dir, evaluation.data_dir)"
        raise DataError(error.problem, fix) from error


class Form(NamedTuple):
    """One way a row of a task may look."""

    keys: tuple[str, ...]
    """Its columns; others are not read."""
    read: Callable[[Item], list[Item]]
    """The items of a row."""


def _items_of(form: str, place: str, row: dict[str, Any]) -> list[Item]:
    for keys, read in FORMS[form]:
        if all(key in row for key in keys):
            try:
                items = read(row)
            except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
                problem = f"{place}: its {', '.join(keys)} do not make an item: {type(error).__name__}: {error}"
                raise DataError(problem, "restore the file, or leave this task out") from error
            for item in items:
                _check(item, place)
            return items
    valid = " or ".join(", ".join(keys) for keys, _ in FORMS[form])
    raise DataError(f"{place}: has the keys {', '.join(sorted(row))}; an item has {valid}", "give a file of this task")


def _check(item: Item, place: str) -> None:
    """Texts are texts, there are choices, and the right one is among them."""
    for key, value in item.items():
        texts = value if isinstance(value, list) else [value]
        if key != "gold" and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
            raise DataError(f"{place}: {key} is {value!r}: a text, or a list of texts, must not be empty", _RESTORE)
        if key != "gold":
            _check_unicode(texts, key, place)
    choices = item.get("choices", item.get("contexts"))
    if choices is not None and (type(item["gold"]) is not int or not 0 <= item["gold"] < len(choices)):
        raise DataError(f"{place}: gold is {item['gold']!r}, and there are {len(choices)} choices", _RESTORE)


def _check_unicode(texts: list[str], key: str, place: str) -> None:
    """JSON can escape half of a surrogate pair, which is no character: no tokenizer takes it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!a} at character {error.start + 1}"
            raise DataError(f"{place}: {key} is no Unicode text: {half} is half a surrogate pair", _RESTORE) from None


_RESTORE = "restore the file, or correct that line"


def _question(text: str) -> str:
    return text.removeprefix("Question:").strip()


def _arc(row: Item) -> list[Item]:
    options = row["choices"]
    gold = options["label"].index(row["answerKey"])
    return [{"question": row["question"].strip(), "choices": _stripped(options["text"]), "gold": gold}]


def _query(row: Item) -> list[Item]:
    return [{"question": _question(row["query"]), "choices": _stripped(row["choices"]), "gold": row["gold"]}]


def _piqa(row: Item) -> list[Item]:
    choices = _stripped([row["sol1"], row["sol2"]])
    return [{"question": row["goal"].strip(), "choices": choices, "gold": int(row["label"])}]


def _siqa(row: Item) -> list[Item]:
    choices = _stripped([row["answerA"], row["answerB"], row["answerC"]])
    return [{"question": f"{row['context']} {row['question']}", "choices": choices, "gold": int(row["label"]) - 1}]


LETTERED = re.compile(r"Context: (.*?)\nQuestion: (.*?)\nChoices:\n(.*)\nAnswer:", re.DOTALL)


def _lettered(row: Item) -> list[Item]:
    """A query that lists its options by letter: they become the choices, instead of their letters."""
    match = LETTERED.fullmatch(row["query"].strip())
    if match is None:
        raise ValueError("query is not 'Context: ... Question: ... Choices: ... Answer:'")
    context, question, options = match.groups()
    choices = [line.split(". ", 1)[1] for line in options.split("\n")]
    return [{"question": f"{context} {question}", "choices": _stripped(choices), "gold": row["gold"]}]


def _hellaswag(row: Item) -> list[Item]:
    question = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    choices = [_without_brackets(ending) for ending in row["endings"]]
    return [{"question": question, "choices": choices, "gold": int(row["label"])}]


def _without_brackets(text: str) -> str:
    """As in the harness: [title] and other marks of WikiHow are no text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _winogrande(row: Item) -> list[Item]:
    before, after = row["sentence"].split("_")
    contexts = [before + row["option1"], before + row["option2"]]
    return [{"contexts": contexts, "continuation": after.strip(), "gold": int(row["answer"]) - 1}]


def _winogrande_local(row: Item) -> list[Item]:
    contexts = _stripped(row["context_options"])
    return [{"contexts": contexts, "continuation": row["continuation"].strip(), "gold": row["gold"]}]


def _last_word(row: Item) -> list[Item]:
    context, word = row["text"].rsplit(" ", 1)
    return [{"context": context, "continuation": word}]


def _continuation(row: Item) -> list[Item]:
    return [{"context": row["context"].rstrip(), "continuation": row["continuation"].strip()}]


def _qasper(row: Item) -> list[Item]:
    item = {key: row[key].strip() for key in ("title", "abstract", "question")}
    return [{**item, "choices": ["no", "yes"], "gold": ["no", "yes"].index(row["answer"])}]


def _qasper_paper(row: Item) -> list[Item]:
    """All yes-or-no questions of a paper, one item an answer."""
    paper = {key: row[key].strip() for key in ("title", "abstract")}
    items = []
    for question, answers in zip(row["qas"]["question"], row["qas"]["answers"], strict=True):
        for answer in answers["answer"]:
            if not answer["unanswerable"] and answer["yes_no"] is not None:
                gold = int(answer["yes_no"])
                items.append({**paper, "question": question.strip(), "choices": ["no", "yes"], "gold": gold})
    return items


def _math(row: Item) -> list[Item]:
    return [{"problem": row["problem"].strip(), "continuation": row["solution"].strip()}]


def _math_local(row: Item) -> list[Item]:
    return [{"problem": row["context"].strip(), "continuation": row["chain_of_thought"].strip()}]


def _stripped(texts: list[str]) -> list[str]:
    return [text.strip() for text in texts]


_CHOICE = ("query", "choices", "gold")
FORMS: dict[str, tuple[Form, ...]] = {
    "arc": (Form(_CHOICE, _query), Form(("question", "choices", "answerKey"), _arc)),
    "piqa": (Form(_CHOICE, _query), Form(("goal", "sol1", "sol2", "label"), _piqa)),
    "social_iqa": (
        Form(_CHOICE, _lettered),
        Form(("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
    ),
    "hellaswag": (
        Form(_CHOICE, _query),
        Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    ),
    "winogrande": (
        Form(("context_options", "continuation", "gold"), _winogrande_local),
        Form(("sentence", "option1", "option2", "answer"), _winogrande),
    ),
    "lambada": (Form(("context", "continuation"), _continuation), Form(("text",), _last_word)),
    "qasper": (
        Form(("title", "abstract", "question", "answer"), _qasper),
        Form(("title", "abstract", "qas"), _qasper_paper),
    ),
    "math": (Form(("context", "chain_of_thought", "category"), _math_local), Form(("problem", "solution"), _math)),
}
"""How a row of each kind of task may look: the local file's columns, then the hub's."""
