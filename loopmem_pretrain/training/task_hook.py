"""Task suites scored while training, on the weights of the training engine.

All ranks take part. Every rank writes the same requests and scores its share of the batches, as many as the others do,
since under ZeRO 3 each forward pass is a collective; then all have all scores.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from loopmem_pretrain.data.manifest import load_manifest
from loopmem_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from loopmem_pretrain.eval.scoring import Window, WindowScore, token_scores
from loopmem_pretrain.eval.suites import TaskRequests, TaskScores, measured, open_tasks, score_task
from loopmem_pretrain.parallel.agreement import together

if TYPE_CHECKING:
    from loopmem_pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)


class Suites(NamedTuple):
    """What is scored, and how text becomes tokens."""

    tasks: list[TaskRequests]
    tokenizer: Tokenizer


class TaskHook:
    """Every `evaluation.interval_steps` and at the end: the same items of the same tasks."""

    def __init__(self, trainer: "Trainer") -> None:
        """Read the items, before the first step.

        Raises:
            EnvironmentFault: lm-evaluation-harness is not installed.
            ConfigError: unknown tasks.
            DataError: items that are missing or damaged.
        """
        config = trainer.config.evaluation
        folder = Path(trainer.config.data.datasets[0].path)
        self.suites = together(
            lambda: Suites(
                open_tasks(config.tasks, config.data_dir, config.limit, config.seed),
                load_tokenizer(folder / load_manifest(folder).tokenizer.file),
            )
        )
        self.has_warned = False

    def after_step(self, trainer: "Trainer") -> None:
        if trainer.position.step % trainer.config.evaluation.interval_steps and not trainer.ending:
            return
        from loopmem_pretrain.eval.harness import WindowLM

        tasks, tokenizer = self.suites
        with trainer.pause("validation"):
            model = WindowLM(
                lambda windows: scores_of_ranks(trainer, windows),
                tokenizer.encode,
                tokenizer.eos_id,
                trainer.config.data.seq_length,
            )
            scores = [score_task(task, model) for task in tasks]
        trainer.pending["task_scores"] = _flat(tasks, scores)
        self._mind_the_context(trainer, scores)

    def _mind_the_context(self, trainer: "Trainer", scores: list[TaskScores]) -> None:
        short = [
            f"{score.shortened} of {sum(map(len, task.requests))} of {task.name}"
            for task, score in zip(self.suites.tasks, scores, strict=True)
            if score.shortened
        ]
        if short and not self.has_warned and trainer.rank == 0:
            self.has_warned = True
            log.warning(
                "prompts that do not fit into data.seq_length %d lose their beginning: %s",
                trainer.config.data.seq_length,
                ", ".join(short),
            )

    def close(self, trainer: "Trainer") -> None: ...


def _flat(tasks: list[TaskRequests], scores: list[TaskScores]) -> dict[str, float]:
    """{"arc_easy/accuracy": ..., "commonsense/accuracy": the mean over its tasks here, ...}."""
    each = {
        f"{task.name}/{measure}": score.metrics[metric].value
        for task, score in zip(tasks, scores, strict=True)
        for measure, metric in task.measures.items()
    }
    means = measured(tasks, scores)
    return each | {f"{suite}/{name}": mean.value for suite, own in means.items() for name, mean in own.items()}


def scores_of_ranks(trainer: "Trainer", windows: list[Window]) -> list[WindowScore]:
    """Scores of windows of up to data.seq_length inputs; a collective, every rank gives the same windows.

    Batches are padded to their longest window, or all to data.seq_length where loops are compiled, for one shape.
    """
    training, ranks = trainer.config.training, trainer.world_size
    by_length = sorted(range(len(windows)), key=lambda index: len(windows[index].ids), reverse=True)
    size = training.micro_batch_size
    batches = [by_length[start : start + size] for start in range(0, len(windows), size)]
    sums = torch.zeros(2, len(windows), dtype=torch.float64, device=trainer.device)
    for first in range(0, len(batches), ranks):
        mine = first + trainer.rank
        # The last round may have fewer batches than ranks: the others score one for the collectives, uncounted.
        chosen = batches[min(mine, len(batches) - 1)]
        longest = trainer.config.data.seq_length if training.compile == "loop" else len(windows[chosen[0]].ids) - 1
        tokens = torch.zeros(size if training.compile == "loop" else len(chosen), longest + 1, dtype=torch.long)
        for row, index in enumerate(chosen):
            tokens[row, : len(windows[index].ids)] = torch.tensor(windows[index].ids)
        tokens = tokens.to(trainer.device)
        logits = trainer.engine.logits(tokens[:, :-1])
        if mine >= len(batches):
            continue
        for row, index in enumerate(chosen):
            end = len(windows[index].ids) - 1
            scored = slice(end - windows[index].scored, end)
            sums[:, index] = token_scores(logits[row, scored], tokens[row, 1:][scored]).double().sum(1)
    dist.all_reduce(sums)
    nats, misses = sums.tolist()
    return [WindowScore(value, missed == 0) for value, missed in zip(nats, misses, strict=True)]
