"""`loopmem slurm ...`: one function a verb, heavy imports only inside the one that runs."""

import shlex
import sys
from typing import Any

from loopmem_pretrain.arguments import AddCommand, with_config
from loopmem_pretrain.cluster.health import LEVELS
from loopmem_pretrain.cluster.job import LAUNCHERS, MODES
from loopmem_pretrain.errors import EXIT_DONE, ConfigError, LoopMemError


def add_slurm(command: AddCommand) -> None:
    """`loopmem slurm ...`: jobs of a SLURM cluster (docs/slurm.md)."""
    help_ = "Training as jobs of a SLURM cluster: check and submit, see how it stands, end it."
    verbs = command("slurm", status, help_).add_subparsers(required=True, metavar="VERB")
    for name, run, help_ in (
        ("submit", submit, "Check config, plan and scripts, freeze them in the run folder, submit."),
        ("render", render, "Print the batch scripts that submit would send, and what the checks found."),
    ):
        verb = with_config(command(name, run, help_, verbs))
        verb.add_argument("--cluster", required=True, metavar="FILE", help="such as slurm/clusters/generic.yaml")
        verb.add_argument("--nodes", type=int, required=True, metavar="N", help="that train")
        verb.add_argument("--spare-nodes", type=int, default=0, metavar="N", help="that step in for broken ones")
        verb.add_argument(
            "--time", metavar="H:MM:SS", help="of a job; also minutes, or D-HH:MM:SS (default: the cluster's)"
        )
        verb.add_argument("--launcher", choices=LAUNCHERS, default="srun")
        verb.add_argument("--continue", dest="mode", choices=MODES, default="requeue")
        verb.add_argument("--health", choices=LEVELS, default="node", help="checks before training")
        verb.add_argument("--max-crashes", type=int, default=3, metavar="N", help="without a new checkpoint between")
        verb.add_argument("--after", metavar="JOB", help="start when that job has ended well")
        help_ = "a job that waits for the end of the run; may be given twice: conversion to RUN/hf comes first,\n"
        help_ += "RUN/evaluation.json after it"
        verb.add_argument("--then", action="append", choices=("convert", "evaluate"), default=[], help=help_)
    help_ = "Prepare data as jobs: the tokenizer, where it is to be trained, then the token shards."
    prepare_ = with_config(command("prepare", prepare, help_, verbs), "num_processes=8")
    prepare_.add_argument("--cluster", required=True, metavar="FILE", help="such as slurm/clusters/generic.yaml")
    help_ = "a job for each input file, N of them at once, into output_dir/part-00001 and so on (default: one job)"
    prepare_.add_argument("--array", type=int, metavar="N", help=help_)
    prepare_.add_argument(
        "--render", action="store_true", help="print the batch scripts and what the checks found, submit nothing"
    )
    for name, run, help_ in (
        ("status", status, "How a run stands: verdict, queue, every start, what it has cost."),
        ("logs", logs, "The end of a rank's log in the newest start."),
        ("cancel", cancel, "Cancel all jobs of a run."),
        ("stop", stop, "Ask a run to save, end, and stay ended."),
    ):
        verb = command(name, run, help_, verbs)
        verb.add_argument("run_dir", metavar="RUN")
        if name == "logs":
            verb.add_argument("--rank", type=int, default=0, metavar="N")
            verb.add_argument("--follow", action="store_true", help="go on as it grows")


def _plan(options: Any, faults: list[LoopMemError] | None = None) -> Any:
    from loopmem_pretrain.cluster.submit import Request, noted, plan
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.site import SiteConfig
    from loopmem_pretrain.data.dataset import check_datasets

    for name, least in (("nodes", 1), ("spare_nodes", 0), ("max_crashes", 0)):
        if getattr(options, name) < least:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not valid", f"give {least} or more"
            )
    site = load_config(SiteConfig, options.cluster)
    asked = {name: getattr(options, name) for name in Request._fields if name != "site"}
    ready = plan(Request(site=site, **asked), faults)
    if ready.after is None:  # else the job before may still be preparing them
        with noted(faults):
            check_datasets(ready.config)
    return ready


def submit(options: Any) -> int:
    from loopmem_pretrain.cluster import submit as submission

    ready = _plan(options)
    for note in ready.notes:
        print(note)
    jobs = submission.submit(ready)
    folder = shlex.quote(str(ready.run_dir))
    print(f"job {jobs.pop('pretrain')}; see `loopmem slurm status {folder}` and `loopmem slurm logs {folder}`")
    if jobs:
        print("when the run is done: " + ", then ".join(f"{task}, job {job}" for task, job in jobs.items()))
    return EXIT_DONE


def _tell_refusals(faults: list[LoopMemError]) -> None:
    """What `submit` would refuse: told beside the scripts, which are only printed."""
    for fault in faults:
        print(f"loopmem: a submission would be refused: {fault}", file=sys.stderr)


def render(options: Any) -> int:
    faults = list[LoopMemError]()
    ready = _plan(options, faults)
    for note in ready.notes:
        print(note, file=sys.stderr)
    _tell_refusals(faults)
    print("\n".join(ready.scripts.values()), end="")
    return EXIT_DONE


def prepare(options: Any) -> int:
    from loopmem_pretrain.cluster.prepare import plan, submit_preparation
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.site import SiteConfig

    if options.array is not None and options.array < 1:
        raise ConfigError(f"--array {options.array} is not valid", "give 1 or more")
    faults: list[LoopMemError] | None = [] if options.render else None
    ready = plan(options.config, options.overrides, load_config(SiteConfig, options.cluster), options.array, faults)
    if options.render:
        _tell_refusals(faults or [])
        print("\n".join(ready.scripts.values()), end="")
        return EXIT_DONE
    jobs = submit_preparation(ready)
    print(", then ".join(f"{name}, job {job}" for name, job in jobs.items()))
    print(f"logs: {ready.config.output_dir}/slurm; for the configuration of a run:\ndata:\n  datasets:")
    weight = ", weight: tokens" if len(ready.parts) > 1 else ""
    print(*(f"    - {{path: {part}{weight}}}" for part in ready.parts), sep="\n")
    print(f"training after it: loopmem slurm submit --after {jobs['prepare_data']} ...")
    return EXIT_DONE


def status(options: Any) -> int:
    from loopmem_pretrain.cluster import manage

    print(manage.status(options.run_dir))
    return EXIT_DONE


def logs(options: Any) -> int:
    from loopmem_pretrain.cluster import manage

    manage.show_log(options.run_dir, options.rank, options.follow)
    return EXIT_DONE


def cancel(options: Any) -> int:
    from loopmem_pretrain.cluster import manage

    print(manage.cancel(options.run_dir))
    return EXIT_DONE


def stop(options: Any) -> int:
    from loopmem_pretrain.cluster import manage

    print(manage.stop(options.run_dir))
    return EXIT_DONE
