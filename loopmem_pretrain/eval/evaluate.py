"""`loopmem eval`: a run or an exported folder on held-out text and task suites, as a dictionary that JSON can hold.

The same command on the same machine gives the same numbers.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from loopmem_pretrain import __version__
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.eval.documents import Domain, prepared_domains, text_domains
from loopmem_pretrain.eval.opening import Opened, identity_of, open_for_scoring, place_of, settings_of
from loopmem_pretrain.eval.perplexity import DomainScores, Ratio, Scorer, measure
from loopmem_pretrain.eval.scoring import Setting, stride_of
from loopmem_pretrain.eval.suites import Mean, TaskRequests, TaskScores, measured, open_tasks, score_task
from loopmem_pretrain.inference.opening import is_exported
from loopmem_pretrain.model.flops import forward_flops_at
from loopmem_pretrain.progress import ProgressBar
from loopmem_pretrain.quiet import prepare_imports
from loopmem_pretrain.words import counted


def evaluate(
    path: str | Path,
    *,
    text: Sequence[str] = (),
    text_field: str | None = None,
    data: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    num_loops: Sequence[str] = (),
    exit_threshold: Sequence[float] = (),
    exit_rule: str = "halting",
    max_documents: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    command: str = "",
) -> dict[str, Any]:
    """Score documents and tasks; docs/evaluation.md says what the numbers mean.

    Args:
        path: run folder (its newest checkpoint), one of its checkpoints, or an exported folder.
        text: files to score, one domain each.
        text_field: of their lines or rows; None is `text`.
        data: folders of prepared data, whose validation splits are scored; without text, data and tasks, the run's own.
        tasks: task suites or single tasks.
        data_dir: folder with their items; None reads from the Hugging Face hub.
        limit: items a task, drawn with `seed`; None scores all.
        seed: of the drawing; None is 0.
        num_loops: forced numbers of loops, or `all`; empty runs the model as it was trained.
        exit_threshold: early exit at each of these; empty as the model's config says, and all loops where it says none.
        exit_rule: when tokens leave, `halting` or `confidence`.
        max_documents: of each domain: of prepared data spread over the split, of a file the first; None scores all.
        batch_size: windows in one forward pass; the numbers do not depend on it.
        device: `cpu`, `cuda` or `cuda:N`.
        command: recorded as it is.

    Raises:
        ConfigError: a value that cannot be meant, an unknown task, or nothing to score.
        DataError: text, prepared data or tasks that cannot be scored, or a tokenizer that does not fit the model.
        CheckpointError: no whole checkpoint, or a model that gives no finite cross-entropy.
        ConversionError: an exported folder that is damaged.
        EnvironmentFault: tasks without lm-evaluation-harness, or a device that is not there.
    """
    for name, value in (("--batch-size", batch_size), ("--max-documents", max_documents)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is not valid", "give 1 or more")
    about_tasks = {"--data-dir": data_dir, "--limit": limit, "--seed": seed}
    if not tasks and (idle := [name for name, value in about_tasks.items() if value is not None]):
        raise ConfigError(f"{', '.join(idle)}: only tasks ask for that", "add --tasks, or leave it out")
    if max_documents is not None and tasks and not (text or data):
        raise ConfigError("--max-documents: tasks have no documents", "use --limit, or add --text or --data")
    if text_field is not None and not text:
        raise ConfigError("--text-field is about the files of --text", "add --text, or leave it out")
    prepare_imports("cpu")
    place = place_of(path)
    requests = open_tasks(tasks, data_dir, limit, seed or 0) if tasks else []
    domains = _domains(place, text, text_field or "text", data, max_documents) if text or data or not tasks else []
    opened = open_for_scoring(place, batch_size, device)
    settings = settings_of(opened.model, num_loops, exit_threshold, exit_rule)
    codec = opened.codec
    scorer = Scorer(opened.model, codec.encode, codec.decode, codec.eos_id, opened.context, batch_size)
    results = [_with_bar(scorer, domain, settings, max_documents) for domain in domains]
    max_loops, model_config = opened.model.config.max_loops, opened.model.config
    return {
        "command": command,
        "version": __version__,
        "model": identity_of(opened),
        "context": opened.context,
        "stride": stride_of(opened.context),
        "batch_size": batch_size,
        "device": device,
        "max_documents": max_documents,
        "limit": limit,
        "seed": seed or 0,
        "max_loops": max_loops,
        "domains": [_plain(result, model_config, opened.context) for result in results],
        "lm_eval": metadata.version("lm_eval") if requests else None,
        **(_tasks(opened, requests, settings) if requests else {"tasks": [], "suites": []}),
    }


def write_evaluation(path: str | Path, evaluation: dict[str, Any]) -> None:
    """Write what `evaluate` returned as JSON, whole or not at all.

    Raises:
        EnvironmentFault: disk full, no permission.
    """
    write_file(Path(path), (json.dumps(evaluation, indent=1, allow_nan=False) + "\n").encode())


def _domains(
    place: Path, text: Sequence[str], text_field: str, data: Sequence[str], max_documents: int | None
) -> list[Domain]:
    if text:
        return text_domains(text, text_field)
    if data:
        return prepared_domains(data, max_documents)
    if is_exported(place):
        raise ConfigError(
            f"{place}: an exported folder has no validation split", "add --text FILE, --data PREPARED or --tasks NAMES"
        )
    from loopmem_pretrain.hf.convert import open_checkpoint

    own = open_checkpoint(place).config.data.datasets
    return prepared_domains([dataset.path for dataset in own], max_documents)


def _with_bar(scorer: Scorer, domain: Domain, settings: list[Setting], max_documents: int | None) -> DomainScores:
    bar = ProgressBar(f"eval {domain.name}", 0, unit="window")

    def show(windows: int, documents: int) -> None:
        bar.update(windows, counted(documents, "document"))

    try:
        return measure(scorer, domain, settings, max_documents, show)
    finally:
        bar.close()


def _tasks(opened: Opened, tasks: list[TaskRequests], settings: list[Setting]) -> dict[str, Any]:
    """Every task under every setting, and the suites' means."""
    scores = {task.name: _score(opened, task, settings) for task in tasks}
    max_loops, suites = opened.model.config.max_loops, []
    by_setting = [measured(tasks, [scores[task.name][index] for task in tasks]) for index in range(len(settings))]
    for suite in dict.fromkeys(task.suite for task in tasks):
        rows = [
            {**_plain_setting(setting, max_loops), **_all_named(means[suite])}
            for setting, means in zip(settings, by_setting, strict=True)
        ]
        suites.append({"suite": suite, "tasks": [task.name for task in tasks if task.suite == suite], "scores": rows})
    return {"tasks": [_plain_task(task, scores[task.name], settings, opened) for task in tasks], "suites": suites}


def _score(opened: Opened, task: TaskRequests, settings: list[Setting]) -> list[TaskScores]:
    from loopmem_pretrain.eval.harness import WindowLM, scorer_of

    bar, codec = ProgressBar(f"eval {task.name}", 0, unit="window"), opened.codec
    done = 0

    def show(windows: int) -> None:
        nonlocal done
        done += windows
        bar.update(done, counted(len(task.items), "item"))

    try:
        scores = []
        for setting in settings:
            model = WindowLM(scorer_of(opened, setting, show), codec.encode, codec.eos_id, opened.context)
            score = score_task(task, model)
            early = setting.exit_threshold is not None
            scores.append(score._replace(mean_loops=model.loops / model.tokens) if early else score)
        return scores
    finally:
        bar.close()


def _plain_task(
    task: TaskRequests, scores: list[TaskScores], settings: list[Setting], opened: Opened
) -> dict[str, Any]:
    config = opened.model.config
    rows = [
        {
            **_plain_setting(setting, config.max_loops),
            **_cost(setting, score.mean_loops, config, opened.context),
            **_all_named(score.metrics),
        }
        for setting, score in zip(settings, scores, strict=True)
    ]
    return {
        "task": task.name,
        "version": task.task.VERSION,
        "suite": task.suite,
        "measures": task.measures,
        "items": len(task.items),
        "of": task.of,
        "requests": sum(len(item) for item in task.requests),
        "shortened": scores[0].shortened,
        "prompt_sha256": task.prompt_sha256,
        "scores": rows,
    }


def _plain(result: DomainScores, config: Any, context: int) -> dict[str, Any]:
    rows = [
        {
            **_plain_setting(score.setting, config.max_loops),
            **_cost(score.setting, score.mean_loops, config, context),
            "nats": score.nats,
            "document_nats": score.document_nats,
            **_named("perplexity", score.perplexity),
            **_named("bits_per_byte", score.bits_per_byte),
        }
        for score in result.scores
    ]
    return {**result._asdict(), "scores": rows}


def _cost(setting: Setting, mean_loops: float | None, config: Any, context: int) -> dict[str, Any]:
    """Loops a token, mean over layers, and its forward FLOPs in a window; those of open gates."""
    loops = setting.num_loops if mean_loops is None else mean_loops
    return {
        "mean_loops": loops,
        "flops_per_token": forward_flops_at(config, context, max(1, config.max_loops) if loops is None else loops),
    }


def _plain_setting(setting: Setting, max_loops: int) -> dict[str, Any]:
    return {**setting._asdict(), "extrapolation": (setting.num_loops or 0) > max_loops}


def _all_named(means: dict[str, Mean]) -> dict[str, float | None]:
    return {key: value for name, mean in means.items() for key, value in _named(name, mean).items()}


def _named(name: str, ratio: Ratio | Mean) -> dict[str, float | None]:
    return {name: ratio.value, f"{name}_standard_error": ratio.standard_error}
