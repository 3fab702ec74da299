"""A job script from a template of slurm/: the same file, with the values of the site and the run filled in.

A template is a plain batch script. What is replaced in it:

    #SBATCH --nodes=2                 the value; an option that is not there is added below the last one
    LAUNCHER=${LAUNCHER:-srun}        the value, quoted, so that the environment of sbatch no longer decides
    # Here go the modules ...         the modules and variables of the site
    "$@"                              the arguments of the run, quoted, before those that sbatch is given
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopmem_pretrain.config.site import SiteConfig
from loopmem_pretrain.errors import ConfigError, EnvironmentFault

TEMPLATES = Path(__file__).parents[2] / "slurm"

PLACE = "# Here go the modules and variables of your cluster."
_OPTION = re.compile(r"#SBATCH --([\w-]+)(?:=(.*))?$")
_SETTING = re.compile(r"([A-Z_]+)=\$\{\1:?[-?].*?\}(\s+#.*)?$")


def template_of(task: str) -> str:
    """A file of slurm/, by name without suffix.

    Raises:
        EnvironmentFault: the package does not run from a checkout of the repository.
    """
    if not TEMPLATES.is_dir():
        raise EnvironmentFault(
            f"there are no templates at {TEMPLATES}", "run loopmem from a checkout of the repository"
        )
    return (TEMPLATES / f"{task}.sbatch").read_text(encoding="utf-8")


def render(
    template: str,
    options: Mapping[str, str | None],
    settings: Mapping[str, str],
    setup: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> str:
    """The script. An option whose value is None is left out, one whose value is empty has none.

    Raises:
        ConfigError: a value cannot stand in an #SBATCH line, or the template has no such setting.
    """
    lines: list[str] = []
    rest, open_settings = dict(options), dict(settings)
    last = max(index for index, line in enumerate(template.splitlines()) if line.startswith("#SBATCH"))
    for index, line in enumerate(template.splitlines()):
        option, setting = _OPTION.match(line), _SETTING.match(line)
        if option and option[1] in rest:
            lines += _option_lines(option[1], rest.pop(option[1]))
        elif setting and setting[1] in open_settings:
            lines.append(f"{setting[1]}={shlex.quote(open_settings.pop(setting[1]))}{setting[2] or ''}")
        elif line == PLACE:
            lines += setup
        else:
            lines.append(line.replace('"$@"', shlex.join([*arguments, "$@"]).replace("'$@'", '"$@"')))
        if index == last:
            names = [name for name in rest if f"#SBATCH --{name}" not in template]
            lines += [text for name in names for text in _option_lines(name, rest.pop(name))]
    if open_settings:
        raise ConfigError(f"the template has no {', '.join(open_settings)}", "use a template of slurm/ as it is")
    return "\n".join(lines) + "\n"


def _option_lines(name: str, value: str | None) -> list[str]:
    if value is None:
        return []
    # sbatch takes an #SBATCH line apart at spaces and knows quotes; a line's end would begin another one.
    if re.search(r"[\n\r\"'\\#]", value):
        raise ConfigError(f"--{name}={value!r} cannot stand in an #SBATCH line", "leave out quotes, # and line ends")
    quoted = f'"{value}"' if " " in value else value
    return [f"#SBATCH --{name}={quoted}" if value else f"#SBATCH --{name}"]


def log_in(folder: Path, name: str) -> str:
    """A value of --output: a name with SLURM's patterns, such as %j, in a folder whose name means itself."""
    return f"{str(folder).replace('%', '%%')}/{name}"


def site_options(site: SiteConfig) -> dict[str, str | None]:
    """What sbatch is told on every job of the site."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    options: dict[str, str | None] = {name: value for name, value in named.items() if value}
    for text in site.sbatch:
        name, _, value = text.removeprefix("--").partition("=")
        options[name] = value
    return options


def gpu_options(site: SiteConfig, gpus: int | None = None) -> dict[str, str | None]:
    """How GPUs of a node are asked for, all unless told: one of three ways, or none of them."""
    options: dict[str, str | None] = dict.fromkeys(("gpus-per-node", "gpus-per-task", "gres"))
    count = site.gpus_per_node if gpus is None else gpus
    if count:
        each = {"gpus-per-node": str(count), "gpus-per-task": "1", "gres": f"gpu:{count}"}
        options[site.gpu_request] = each[site.gpu_request]
    return options


def site_setup(site: SiteConfig) -> list[str]:
    """Lines of bash: modules, then variables, each below its reason."""
    lines = [f"module load {shlex.quote(module)}" for module in site.modules]
    for variable in site.environment:
        lines += [f"# {' '.join(variable.reason.split())}", f"export {variable.name}={shlex.quote(variable.value)}"]
    return [f"# {site.name}", *lines] if lines else []


def container_settings(site: SiteConfig, folders: Sequence[str], code: Path) -> dict[str, str]:
    """How the ranks get into the container, with these folders visible inside; `code` is where they start."""
    box = site.container
    if box is None:
        return {}
    where = "WRAP" if box.kind == "apptainer" else "SRUN_OPTIONS"
    return {"RANK_PYTHON": box.python, where: shlex.join(container_words(site, folders, code, gpus=True))}


def container_words(site: SiteConfig, folders: Sequence[str], code: Path, gpus: bool) -> list[str]:
    """The container: a command before the interpreter (apptainer) or options of srun (pyxis); none without one."""
    box = site.container
    if box is None:
        return []
    mounts = [*dict.fromkeys([*box.mounts, *folders])]
    if box.kind == "apptainer":
        nvidia = ["--nv"] if gpus and site.gpus_per_node else []
        return ["apptainer", "exec", *nvidia, f"--bind={','.join(mounts)}", box.image]
    each = ",".join(f"{folder}:{folder}" for folder in mounts)
    # pyxis starts in the image's own folder, where the package is not
    return [f"--container-image={box.image}", f"--container-mounts={each}", f"--container-workdir={code}"]
