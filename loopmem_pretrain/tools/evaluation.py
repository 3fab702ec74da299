"""The tables that `loopmem eval` prints, and their rows for the model card (tools/evaluation_card.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from loopmem_pretrain.tools.tables import table
from loopmem_pretrain.words import counted

Row = Mapping[str, Any]

HEADINGS = ["loops", "perplexity", "+-", "bits/byte", "+-"]
COST_HEADINGS = ["loops run", "MFLOPs/token"]
MEASURES = {"accuracy": "accuracy", "bits_per_byte": "bits/byte"}


def describe(evaluation: Mapping[str, Any]) -> str:
    """What `eval/evaluate.py:evaluate` returned, for a reader: a table a domain, and tables of the tasks."""
    model, context, stride = evaluation["model"], evaluation["context"], evaluation["stride"]
    step = "" if model["step"] is None else f"step {model['step']:,}, "
    lines = [f"{model['path']}: {step}{model['dtype']}, sha256 {model['sha256'][:12]}..."]
    if evaluation["domains"]:
        lines.append(
            f"whole documents in windows of {context:,} tokens that overlap by {context - stride:,}; "
            "+- is one standard error, by document"
        )
    for domain in evaluation["domains"]:
        sizes = ", ".join(counted(domain[f"{noun}s"], noun) for noun in ("token", "byte"))
        rows = domain_rows(domain)
        kept = len(HEADINGS) + (len(COST_HEADINGS) if _is_early(domain) else 0)
        lines += ["", f"{domain['name']}: {documents_of(domain)}, {sizes}", *table([row[:kept] for row in rows])]
    lines += text_warnings(evaluation)
    if evaluation["tasks"]:
        lines += _tasks(evaluation)
    return "\n".join([*lines, *untrained_settings(evaluation)])


def documents_of(domain: Row) -> str:
    """How many were scored, and of how many, or that they are the first of a file."""
    scored, of = domain["documents"], domain["of"]
    if of is None:
        return f"the first {counted(scored, 'document')}"
    return counted(of, "document") if scored == of else f"{scored:,} of {counted(of, 'document')}"


def domain_rows(domain: Row) -> list[list[str]]:
    """Headings, and one row a setting: its perplexity and bits per byte, loops run and FLOPs."""
    rows = [
        [_setting(score), *_with_error(score, "perplexity"), *_with_error(score, "bits_per_byte"), *_cost(score)]
        for score in domain["scores"]
    ]
    return [[*HEADINGS, *COST_HEADINGS], *rows]


def task_rows(task: Row, measures: Sequence[str]) -> list[list[str]]:
    """Headings, and one row a setting: the task's measures, loops run and FLOPs."""
    rows = [[_setting(score), *_measured(task, score, measures), *_cost(score)] for score in task["scores"]]
    return [["loops", *_measure_headings(measures), *COST_HEADINGS], *rows]


def measures_of(tasks: Sequence[Row]) -> list[str]:
    """Those of `MEASURES` that any of the tasks has."""
    return [measure for measure in MEASURES if any(measure in task["measures"] for task in tasks)]


def _is_early(scored: Row) -> bool:
    return any(score["exit_threshold"] is not None for score in scored["scores"])


def _measure_headings(measures: Sequence[str]) -> list[str]:
    return [
        heading
        for measure in measures
        for heading in (MEASURES[measure], "+-", *(["by"] if measure == "accuracy" else []))
    ]


def _measured(task: Row, score: Row, measures: Sequence[str]) -> list[str]:
    """Each measure with its error, empty where the task has none; `by` is the metric that is its accuracy."""
    cells = []
    for measure in measures:
        metric = task["measures"].get(measure)
        cells += ["", ""] if metric is None else _with_error(score, metric)
        cells += [metric or ""] if measure == "accuracy" else []
    return cells


def _cost(score: Row) -> list[str]:
    loops = "-" if score["mean_loops"] is None else f"{score['mean_loops']:.3f}"
    return [loops, f"{score['flops_per_token'] / 1e6:,.3f}"]


def _setting(score: Row) -> str:
    loops = "no loops" if score["num_loops"] is None else str(score["num_loops"])
    if score["exit_threshold"] is not None:
        loops += f", {score['exit_rule']} {score['exit_threshold']:g}"
    return loops + (
        " (extrapolation)" if score["extrapolation"] else " (memory gates closed)" if score["gates_closed"] else ""
    )


def _with_error(score: Row, name: str) -> list[str]:
    error = score[f"{name}_standard_error"]
    if error is None:
        return [f"{score[name]:,.4f}", "-"]
    return [f"{score[name]:,.4f}", f"{error:#.2g}".removesuffix(".") if error < 99.5 else f"{error:,.0f}"]


def _tasks(evaluation: Mapping[str, Any]) -> list[str]:
    tasks, suites = evaluation["tasks"], evaluation["suites"]
    if len(tasks[0]["scores"]) == 1:
        lines = [
            "",
            "+- is one standard error, by item; prompts: the beginning of their hash",
            *_one_setting(tasks),
        ]
        lines += ["", *table(suite_rows(tasks, suites))]
    else:
        many = _early_exit(tasks) if _is_early(tasks[0]) else None
        lines = many or [line for measure in MEASURES for line in _many_settings(tasks, measure)]
        lines += ["", "think harder (loops) or know more (memory)?  +- is one standard error, by item"]
        lines += table(suite_rows(tasks, suites))
    return lines + warnings(evaluation)


def untrained_settings(evaluation: Mapping[str, Any]) -> list[str]:
    """Where a row is another model than the trained one: what it does not tell, after an empty line."""
    trained = evaluation["max_loops"]
    scores = [score for scored in (*evaluation["domains"], *evaluation["tasks"]) for score in scored["scores"]]
    if not any(score["gates_closed"] or score["num_loops"] not in (None, trained) for score in scores):
        return []
    return [
        "",
        f"rows of other than {counted(trained, 'loop')}, or without memory, run the model as it was not trained; one",
        "that is trained so may do far better: what loops or memory are worth takes a run without them",
    ]


def text_warnings(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the domains' numbers has to know, after an empty line."""
    changed = [domain for domain in evaluation["domains"] if domain["changed"]]
    if not changed:
        return []
    return [
        "",
        "WARNING: the model's tokenizer changes or drops a part of these documents, which is not predicted:",
        *(f"  {domain['name']}: {domain['changed']:,} of {domain['documents']:,}" for domain in changed),
        "  bits/byte is too low there: do not compare it with that of a model that reads all of the text",
    ]


def warnings(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the tasks' numbers has to know, each after an empty line."""
    tasks, context, lines = evaluation["tasks"], evaluation["context"], list[str]()
    short = [task for task in tasks if task["shortened"]]
    if short:
        lines += ["", f"WARNING: prompts that did not fit into {context:,} tokens have lost their beginning:"]
        lines += [f"  {task['task']}: {task['shortened']:,} of {task['requests']:,}" for task in short]
        lines.append("  do not compare these numbers with those of a model that reads the prompts whole")
    if any(task["items"] < task["of"] for task in tasks):
        lines += ["", f"not the full sets: --limit {evaluation['limit']}, drawn with seed {evaluation['seed']}"]
    return lines


def _one_setting(tasks: Sequence[Row]) -> list[str]:
    """One row a task: its measures, with errors; `by` is the metric that is its accuracy."""
    having = measures_of(tasks)
    extra = COST_HEADINGS if _is_early(tasks[0]) else []
    rows = [["task", "items", "prompts", *_measure_headings(having), *extra]]
    for task in tasks:
        (score,) = task["scores"]
        rows.append([*_name(task), *_measured(task, score, having), *(_cost(score) if extra else [])])
    return table(rows)


def _early_exit(tasks: Sequence[Row]) -> list[str]:
    """One table a task, with one row a setting."""
    lines = ["", "+- is one standard error, by item; loops run and FLOPs are of the tokens scored"]
    for task in tasks:
        name, items, prompts = _name(task)
        lines += ["", f"{name}: {items} items, prompts {prompts}", *table(task_rows(task, measures_of([task])))]
    return lines


def _many_settings(tasks: Sequence[Row], measure: str) -> list[str]:
    """One row a task that has the measure, one column a setting."""
    having = [task for task in tasks if measure in task["measures"]]
    if not having:
        return []
    rows = [["task", "items", "prompts", *map(_column, having[0]["scores"])]]
    for task in having:
        name = task["measures"][measure]
        rows.append([*_name(task), *(f"{score[name]:.4f}" for score in task["scores"])])
    return ["", f"{MEASURES[measure]} by loops (* extrapolation; closed: memory gates closed)", *table(rows)]


def suite_rows(tasks: Sequence[Row], suites: Sequence[Row]) -> list[list[str]]:
    """Headings, and one row a setting, the suites' means as columns, with how many tasks they are means of."""
    columns = [(suite, name) for suite in suites for name in MEASURES if name in suite["scores"][0]]
    rows = [["mean at loops"]]
    for suite, name in columns:
        count = sum(name in task["measures"] for task in tasks if task["suite"] == suite["suite"])
        rows[0] += [f"{count} {suite['suite']} {MEASURES[name]}", "+-"]
    for index, score in enumerate(suites[0]["scores"]):
        cells = (cell for suite, name in columns for cell in _with_error(suite["scores"][index], name))
        rows.append([_setting(score), *cells])
    return rows


def _name(task: Row) -> list[str]:
    items = f"{task['items']:,}" if task["items"] == task["of"] else f"{task['items']:,} of {task['of']:,}"
    return [task["task"], items, task["prompt_sha256"][:8]]


def _column(score: Row) -> str:
    if score["gates_closed"]:
        return f"{score['num_loops']} closed"
    return f"{score['num_loops']}*" if score["extrapolation"] else str(score["num_loops"])
