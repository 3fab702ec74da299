"""What `loopmem eval --card` puts into the README.md of an exported folder: numbers, and what they depend on.

The section stands between two comment marks that the export has put there; what is outside them is not touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.hf.card import EVALUATION_BEGINS, EVALUATION_ENDS, markdown_table
from loopmem_pretrain.tools.evaluation import (
    documents_of,
    domain_rows,
    measures_of,
    suite_rows,
    task_rows,
    text_warnings,
    untrained_settings,
    warnings,
)

CARD = "README.md"


def check_card(folder: str | Path) -> None:
    """Refuse a folder whose card has no place for an evaluation; before hours are spent on one.

    Raises:
        ConfigError: no exported folder, no README.md, or one without the two marks.
        EnvironmentFault: README.md cannot be read.
    """
    _around(Path(folder))


def write_card(folder: str | Path, evaluation: Mapping[str, Any]) -> Path:
    """Replace the evaluation in a card by what `eval/evaluate.py:evaluate` returned; returns the card's path.

    Raises:
        ConfigError, EnvironmentFault: as check_card says; disk full, no permission.
    """
    before, after = _around(Path(folder))
    write_file(Path(folder) / CARD, f"{before}\n{section(evaluation)}\n{after}".encode())
    return Path(folder) / CARD


def section(evaluation: Mapping[str, Any]) -> str:
    """The evaluation as Markdown."""
    model = evaluation["model"]
    lines = [
        "### Measured",
        "",
        f"With loopmem_pretrain {evaluation['version']}, {model['dtype']} on {evaluation['device']}; sha256 of "
        f"weights, tokenizer and config `{model['sha256']}`:",
        "",
        "```",
        evaluation["command"],
        "```",
        "",
        "A row is a setting: every layer applied so often, memory gates closed, or early exit by a rule at a "
        "threshold. Loops run are the mean over layers of the tokens scored, and MFLOPs/token what that is forward in "
        f"a window of {evaluation['context']:,} tokens, by formula, reads of memory counted in every row.",
        "",
    ]
    if evaluation["domains"]:
        lines += _domains(evaluation)
    if evaluation["tasks"]:
        lines += _tasks(evaluation)
    if told := untrained_settings(evaluation)[1:]:
        lines += ["```", *told, "```", ""]
    return "\n".join(lines)


def _domains(evaluation: Mapping[str, Any]) -> list[str]:
    context, domains = evaluation["context"], evaluation["domains"]
    tables = [domain_rows(domain) for domain in domains]
    rows = [
        [domain["name"], *row, _short(domain["text_sha256"])]
        for domain, (_, *scored) in zip(domains, tables, strict=True)
        for row in scored
    ]
    sizes = [
        [
            domain["name"],
            documents_of(domain),
            *(f"{domain[key]:,}" for key in ("tokens", "bytes")),
            domain["text_sha256"],
        ]
        for domain in domains
    ]
    told = text_warnings(evaluation)
    return [
        f"Held-out text, whole documents in windows of {context:,} tokens that overlap by "
        f"{context - evaluation['stride']:,}; +- is one standard error, by document:",
        "",
        *markdown_table(["text", *tables[0][0], "sha256"], rows),
        "",
        *markdown_table(["text", "scored", "tokens", "bytes", "sha256"], sizes),
        *(["", "```", *told[1:], "```"] if told else []),
        "",
    ]


def _tasks(evaluation: Mapping[str, Any]) -> list[str]:
    tasks = evaluation["tasks"]
    tables = [task_rows(task, measures_of(tasks)) for task in tasks]
    rows = [
        [task["task"], *row, _short(task["prompt_sha256"])]
        for task, (_, *scored) in zip(tasks, tables, strict=True)
        for row in scored
    ]
    sizes = [
        [
            task["task"],
            str(task["version"]),
            f"{task['items']:,}",
            f"{task['of']:,}",
            f"{task['requests']:,}",
            task["prompt_sha256"],
        ]
        for task in tasks
    ]
    means, *scored = suite_rows(tasks, evaluation["suites"])
    told = warnings(evaluation)
    return [
        f"Tasks, by lm-evaluation-harness {evaluation['lm_eval']}; +- is one standard error, by item:",
        "",
        *markdown_table(["task", *tables[0][0], "prompts"], rows),
        "",
        *markdown_table(means, scored),
        "",
        *markdown_table(["task", "version", "items", "of", "requests", "sha256 of prompts and continuations"], sizes),
        *(["", "```", *told[1:], "```"] if told else []),
        "",
    ]


def _short(digest: str) -> str:
    """As the tables of `loopmem eval` have it."""
    return digest[:8]


def _around(folder: Path) -> tuple[str, str]:
    """The card up to its first mark and from its second on, both included."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--card: {folder} is no exported folder, so it has no model card",
            "export the run with `loopmem convert`, and evaluate the folder",
        )
    path = folder / CARD
    if not path.is_file():
        raise ConfigError(f"--card: {path} does not exist", "export the folder again")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--card: {path} is not UTF-8: {error}", "export the folder again") from error
    before, begins, rest = text.partition(EVALUATION_BEGINS)
    _, ends, after = rest.partition(EVALUATION_ENDS)
    if not ends or EVALUATION_BEGINS in rest or EVALUATION_ENDS in before + after:
        raise ConfigError(
            f"--card: {path} has no place for an evaluation: {EVALUATION_BEGINS} and then {EVALUATION_ENDS}, each once",
            "put these two lines where it is to stand, or export the folder again",
        )
    return before + begins, ends + after
