"""`make demo`: the whole job on real text, as the `loopmem` commands a user would type, printed before they run."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.errors import EXIT_DONE, ConfigError

RECIPE, CONFIG = "data_prep/demo.yaml", "configs/train/demo.yaml"
PROMPT = "My fellow citizens, the people of this Union"


def run_demo(run_dir: str) -> int:
    """Run all stages below `run_dir`; returns the exit code of the first that fails, or 0.

    Every stage continues or repeats harmlessly, so an interrupted demo is simply started again.

    Raises:
        ConfigError: not started from the project's root, where the demo's configs are.
    """
    for file in (RECIPE, CONFIG):
        if not Path(file).is_file():
            raise ConfigError(f"{file} is not here", "run the demo from the root of the repository")
    began = time.monotonic()
    for title, command in stages(run_dir):
        print(f"\n== {title}\n$ {shlex.join(['loopmem', *command])}", flush=True)
        start = time.monotonic()
        code = _run(command)
        if code:
            return code
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {run_dir}/report.html in a browser.")
    return EXIT_DONE


def _run(command: list[str]) -> int:
    """Exit code of `loopmem COMMAND`, also where the demo is to end: a training saves before it does."""
    stage = subprocess.Popen([sys.executable, "-m", "loopmem_pretrain", *command])
    try:
        return stage.wait()
    except KeyboardInterrupt as end:
        if type(end) is not KeyboardInterrupt:  # Ctrl-C has reached the stage too, SIGTERM has not
            stage.terminate()
        stage.wait()
        raise


def stages(run_dir: str) -> list[tuple[str, list[str]]]:
    """(title, arguments of loopmem) of every stage."""
    data = f"{run_dir}/data"
    recipe = ["--config", RECIPE]
    if run_dir != "runs/demo":
        prepared = load_config(PrepareConfig, RECIPE, (), prepare_problems)
        corpus = [path.replace("runs/demo", run_dir) for source in prepared.sources for path in source.paths]
        recipe += [f"sources.{index}.paths=[{path}]" for index, path in enumerate(corpus)]
        recipe += [f"tokenizer.path={data}/tokenizer", f"output_dir={data}/tokens"]
    overrides = [f"run_dir={run_dir}", f"data.datasets.0.path={data}/tokens"] if run_dir != "runs/demo" else []
    config = load_config(RunConfig, CONFIG, overrides, run_problems)
    train = ["train", "--config", CONFIG, "--ranks", str(_ranks()), *overrides]
    half = config.training.train_steps // 2
    return [
        ("Real text: speeches, literature, and worked mathematics", ["fetch-corpus", f"{data}/corpus"]),
        ("A tokenizer of its own", ["train-tokenizer", *recipe]),
        ("Text becomes token shards", ["prepare-data", *recipe]),
        (f"Pretraining, stopped on purpose after step {half}", [*train, "--stop-at-step", str(half)]),
        ("The same command resumes where it stopped", train),
        ("The model leaves in Hugging Face format", ["convert", run_dir, f"{run_dir}/hf", "--overwrite"]),
        (
            "The exported model writes, through transformers",
            [
                "generate",
                f"{run_dir}/hf",
                "--prompt",
                PROMPT,
                "--max-new-tokens",
                "60",
                "--save",
                f"{run_dir}/sample.txt",
            ],
        ),
        ("The report", ["report", run_dir]),
    ]


def _ranks() -> int:
    """Two ranks, on GPUs or on the CPU (the demo's batch is small); one where there is just one GPU."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 1 if gpus == 1 else 2
