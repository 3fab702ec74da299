"""The task suites: task files of lm-evaluation-harness in tasks/, their items, and what a model scores on them.

`loopmem eval --tasks` and the evaluation inside training both come here. The harness writes the prompts; the loop over
items is ours, since it also tells what the harness does not: prompts that lost their beginning, a hash of them all.
"""

import json
import logging
import math
import random
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.errors import ConfigError, DataError, EnvironmentFault

TASKS = Path(__file__).with_name("tasks")
"""The task files."""


class Mean(NamedTuple):
    """A mean over items or tasks."""

    value: float
    standard_error: float | None
    """None for one item."""


class TaskRequests(NamedTuple):
    """A task's items as requests to a model: what is scored, whatever the model is."""

    name: str
    suite: str
    measures: dict[str, str]
    """Which of its metrics counts as the task's `accuracy`, which as its `bits_per_byte`."""
    items: list[dict[str, Any]]
    """Those that are scored."""
    of: int
    """Items the task has."""
    requests: list[list[Any]]
    """The harness's requests for each item."""
    prompt_sha256: str
    """Of all prompts and continuations, in order, as JSON."""
    task: Any
    """The harness's task."""


class TaskScores(NamedTuple):
    """A task under one setting."""

    metrics: dict[str, Mean]
    shortened: int
    """Prompts that did not fit into the context with their continuation and lost their beginning."""
    mean_loops: float | None = None
    """With early exit: loops that a predicted token ran, mean over layers."""


def open_tasks(
    names: Sequence[str], data_dir: str | Path | None, limit: int | None = None, seed: int = 0
) -> list[TaskRequests]:
    """Read the data of tasks and write their prompts; each task once, in the order asked for.

    Args:
        names: tasks or suites.
        data_dir: folder of .jsonl files; None reads from the Hugging Face hub.
        limit: items a task, drawn with `seed`; None takes all.
        seed: of the drawing.

    Raises:
        EnvironmentFault: lm-evaluation-harness is not installed.
        ConfigError: unknown names.
        DataError: data that is missing or damaged, of all tasks at once (from the hub, of the first).
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} is not valid", "give 1 or more, or leave it out to score all items")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EnvironmentFault(
            f"task suites need lm-evaluation-harness: {error}", "pip install 'loopmem_pretrain[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises on every task with data of its own
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"data_dir": None if data_dir is None else str(data_dir)},
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ConfigError(
            f"unknown tasks: {', '.join(unknown)}" if unknown else "no task is named",
            f"valid are the suites {', '.join(sorted(manager.all_groups))}, and the tasks "
            f"{', '.join(sorted(manager.all_subtasks))}",
        )
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"{data_dir}: no such folder", "give the folder that holds the tasks' .jsonl files")
    wanted = dict.fromkeys(task for name in names for task in _tasks_of(manager, name))
    opened, missing = [], []
    for name in wanted:
        try:
            opened.append(_requests(manager.load([name])["tasks"][name], limit, seed))
        except DataError as error:
            if data_dir is None:  # the hub: what keeps one set away keeps all away, after a long wait for each
                raise
            missing.append((name, error))
    if len(missing) == 1 and len(wanted) == 1:
        raise missing[0][1]
    if missing:
        problems = "\n  ".join(f"{name}: {error.problem}" for name, error in missing)
        there = ",".join(task.name for task in opened)
        fix = f"mend the data, or score what is there: {there}" if there else missing[0][1].fix
        raise DataError(f"{len(missing)} of {len(wanted)} tasks have no usable data\n  {problems}", fix)
    return opened


def _tasks_of(manager: Any, name: str) -> list[str]:
    """The tasks of a suite, in its file's order, without their data; a task is its own."""
    entry = manager.task_index[name]
    return list(entry.cfg["task"]) if name in manager.all_groups else [name]


def _requests(task: Any, limit: int | None, seed: int) -> TaskRequests:
    docs, name = task.eval_docs, task.config.task
    numbers = range(len(docs))
    if limit is not None and limit < len(docs):
        numbers = sorted(random.Random(seed).sample(numbers, limit))  # type: ignore[assignment]
    requests = []
    for number in numbers:
        prompt = task.fewshot_context(docs[number], task.config.num_fewshot)
        made = task.construct_requests(docs[number], prompt, metadata=(name, number, 1))
        requests.append(made if isinstance(made, list) else [made])
    texts = [request.args for item in requests for request in item]
    metadata = task.config.metadata
    return TaskRequests(
        name,
        metadata["suite"],
        metadata["measures"],
        [docs[number] for number in numbers],
        len(docs),
        requests,
        sha256(json.dumps(texts).encode()).hexdigest(),
        task,
    )


def score_task(task: TaskRequests, model: Any) -> TaskScores:
    """What a model of the harness (`eval/harness.py:WindowLM`) scores on a task.

    Raises:
        CheckpointError: the model gives a cross-entropy that is not finite.
    """
    before = model.shortened
    answers = iter(model.loglikelihood([request for item in task.requests for request in item], disable_tqdm=True))
    values: dict[str, list[float]] = {}
    for item, requests in zip(task.items, task.requests, strict=True):
        for name, value in task.task.process_results(item, [next(answers) for _ in requests]).items():
            values.setdefault(name, []).append(value)
    kept = task.task.aggregation()  # the task file's metrics
    metrics = {name: mean(each) for name, each in values.items() if name in kept}
    return TaskScores(metrics, model.shortened - before)


def mean(values: Sequence[float]) -> Mean:
    """Of items, with the standard error of a mean of independent ones."""
    n, value = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Mean(value, None)
    return Mean(value, math.sqrt(math.fsum((each - value) ** 2 for each in values) / (n - 1) / n))


def mean_of_means(means: Sequence[Mean]) -> Mean:
    """Of tasks, each counting the same; its error is of the items within them, not of the choice of tasks."""
    errors = [each.standard_error for each in means]
    value = math.fsum(each.value for each in means) / len(means)
    if any(error is None for error in errors):
        return Mean(value, None)
    return Mean(value, math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(means))


def measured(tasks: Sequence[TaskRequests], scores: Sequence[TaskScores]) -> dict[str, dict[str, Mean]]:
    """{suite: {`accuracy` or `bits_per_byte`: mean over those of its tasks that have it}}."""
    found: dict[str, dict[str, list[Mean]]] = {}
    for task, score in zip(tasks, scores, strict=True):
        for measure, metric in task.measures.items():
            found.setdefault(task.suite, {}).setdefault(measure, []).append(score.metrics[metric])
    return {suite: {name: mean_of_means(each) for name, each in means.items()} for suite, means in found.items()}
