"""`loopmem slurm prepare`: a recipe of data as jobs, the tokenizer and then shards, by an array over its files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loopmem_pretrain.cluster import submit
from loopmem_pretrain.cluster.chain import job_name
from loopmem_pretrain.cluster.other_jobs import TaskJob, one_task
from loopmem_pretrain.cluster.render import log_in
from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems
from loopmem_pretrain.config.site import SiteConfig
from loopmem_pretrain.data.corpus import find_files
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.data.tokenizer import find_tokenizer
from loopmem_pretrain.errors import ConfigError, LoopMemError

RECIPE = "recipe.yaml"
"""Beside the package of a submission."""


class Preparation(NamedTuple):
    """A checked recipe."""

    config: PrepareConfig
    code: Path
    """Where the package is copied to, and jobs run."""
    inputs: list[str]
    """Of an array, a file for each element; empty for one job."""
    scripts: dict[str, str]
    """By name, each for the one before."""

    @property
    def parts(self) -> list[str]:
        """Folders of token shards that come of it."""
        parts = [f"{self.config.output_dir}/part-{number:05d}" for number in range(1, len(self.inputs) + 1)]
        return parts or [self.config.output_dir]


def plan(
    recipe: str,
    overrides: Sequence[str],
    site: SiteConfig,
    at_once: int | None,
    faults: list[LoopMemError] | None = None,
) -> Preparation:
    """Check a recipe and render its scripts; changes nothing.

    Args:
        recipe: file like those in data_prep/.
        overrides: key=value.
        at_once: an array with an element for each input file, of which so many may run; None makes one job.
        faults: takes what is wrong with output_dir, for scripts that are only looked at; None raises it.

    Raises:
        ConfigError: a wrong recipe, one that cannot be cut up by files, or other inputs than OUTPUT was begun with.
        DataError: inputs that are not there.
        EnvironmentFault: output_dir is on a disk of this machine alone.
    """
    config = _absolute(load_config(PrepareConfig, recipe, overrides, prepare_problems))
    output = Path(config.output_dir)
    with submit.noted(faults):
        submit.check_shared(output, site, "output_dir")
    folder = output / "slurm"
    inputs = [] if at_once is None else _inputs(config, folder / "inputs.txt")
    code = submit.code_folder(folder)
    settings = {
        "RECIPE": str(code / RECIPE),
        "INPUTS": str(folder / "inputs.txt") if inputs else "",
        "OUTPUT": str(output),
        "TASK": "prepare-data",
    }
    name, folders = job_name(output), [str(output)]
    jobs = {}
    if inputs and config.tokenizer.train and find_tokenizer(config.tokenizer.path) is None:
        one = {**settings, "TASK": "train-tokenizer", "INPUTS": ""}
        log = log_in(folder, "train_tokenizer-%j.out")
        jobs["train_tokenizer"] = TaskJob("prepare_data", f"{name}-tokenizer", log, code, one, folders)
    options = {"array": f"1-{len(inputs)}%{at_once}"} if inputs else {}
    log = log_in(folder, f"prepare_data-{'%A_%a' if inputs else '%j'}.out")
    jobs["prepare_data"] = TaskJob("prepare_data", f"{name}-prepare", log, code, settings, folders, options=options)
    return Preparation(config, code, inputs, {each: one_task(job, site) for each, job in jobs.items()})


def _absolute(config: PrepareConfig) -> PrepareConfig:
    """Paths that do not depend on where the job starts."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    sources = []
    for source in config.sources:
        # those of a hub data set are names in it, unless there are such files here
        data_files = tuple(absolute(name) if Path(name).exists() else name for name in source.data_files)
        paths = tuple(absolute(path) for path in source.paths)
        sources.append(source.model_copy(update={"paths": paths, "data_files": data_files}))
    tokenizer = config.tokenizer.model_copy(update={"path": absolute(config.tokenizer.path)})
    changes = {"output_dir": absolute(config.output_dir), "sources": tuple(sources), "tokenizer": tokenizer}
    return config.model_copy(update=changes)


def _inputs(config: PrepareConfig, known: Path) -> list[str]:
    """The files of a recipe's only source; the number of each is that of its part."""
    source = config.sources[0]
    if len(config.sources) > 1 or source.kind != "files":
        raise ConfigError(
            "--array gives each file of one source to an element, and this recipe has others",
            "leave --array out, or write a recipe with an output_dir of its own for each source",
        )
    if source.max_documents is not None:
        raise ConfigError(
            f"sources.0.max_documents={source.max_documents} would be counted in each element of --array anew",
            "leave --array out, or give sources.0.max_documents=null",
        )
    inputs = [str(path) for path in find_files(source)]
    before = known.read_text(encoding="utf-8").splitlines() if known.exists() else inputs
    if inputs[: len(before)] != before:
        raise ConfigError(
            f"the parts in {config.output_dir} are of other files: what the recipe names now does not begin with "
            f"those of {known}",
            "choose another output_dir for the new files",
        )
    return inputs


def submit_preparation(ready: Preparation) -> dict[str, str]:
    """Let SLURM check the scripts, freeze what will run below OUTPUT/slurm, and submit; the jobs' ids by script.

    Raises:
        EnvironmentFault: as `submit.submit` says.
    """
    for name, script in ready.scripts.items():
        submit.check_script(name, script)
    folder = Path(ready.config.output_dir) / "slurm"
    submit.freeze(ready.code, RECIPE, dump_config(ready.config))
    if ready.inputs:
        write_file(folder / "inputs.txt", "".join(f"{name}\n" for name in ready.inputs).encode())
    return submit.submit_scripts(folder, ready.scripts)
