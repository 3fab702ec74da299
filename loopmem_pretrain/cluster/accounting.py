"""What SLURM's accounting says of a run's jobs: every time each of them held nodes, with its end and its GPU hours."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from loopmem_pretrain.cluster import slurm
from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.tools.tables import table

FIELDS = ("JobID", "State", "Start", "ElapsedRaw", "NNodes", "NodeList", "AllocTRES")


class Held(NamedTuple):
    """One time that a job held its nodes; a job that was requeued has several."""

    job: str
    state: str
    """As SLURM names it: COMPLETED, REQUEUED, NODE_FAIL, ..."""
    began: str
    seconds: float
    nodes: int
    node_list: str
    gpus: int
    """0 where the site does not account GPUs (AccountingStorageTRES=gres/gpu)."""


def ask(jobs: Sequence[str], since: float) -> list[Held]:
    """What sacct says of the jobs from then on (seconds since the epoch): a site may count jobs from 1 again.

    Raises:
        EnvironmentFault: there is no accounting, or it knows none of the jobs.
    """
    said = slurm.ask(
        *("sacct", "--duplicates", "--allocations", "--parsable2", "--noheader"),
        *(f"--jobs={','.join(jobs)}", f"--format={','.join(FIELDS)}"),
        f"--starttime={time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(since))}",
        patience=0,
    )
    found = parse(said)
    if not found:
        raise EnvironmentFault("sacct knows no start of its jobs", "look again in a minute, when it has been written")
    return found


def parse(said: str) -> list[Held]:
    """Lines of `sacct --parsable2` with FIELDS; what has not begun is left out."""
    found = []
    for line in said.splitlines():
        job, state, began, seconds, nodes, node_list, resources = line.split("|")
        if began in ("Unknown", "None"):
            continue
        gpus = re.search(r"gres/gpu=(\d+)", resources)
        # "CANCELLED by 1000"
        found.append(
            Held(job, state.split()[0], began, float(seconds), int(nodes), node_list, int(gpus[1]) if gpus else 0)
        )
    return sorted(found, key=lambda held: (held.began, held.job))


def rows(found: Sequence[Held]) -> list[str]:
    """A line for each time."""
    lines = [["job", "began", "hours", "nodes", "GPUs", "state"]]
    for held in found:
        began = held.began[5:16].replace("T", " ")
        lines.append([held.job, began, f"{held.seconds / 3600:.2f}", held.node_list, str(held.gpus), held.state])
    return table(lines)


def hours(found: Sequence[Held]) -> str:
    """What all of them have cost, and how they ended."""
    node_hours = sum(held.seconds * held.nodes for held in found) / 3600
    gpu_hours = sum(held.seconds * held.gpus for held in found) / 3600
    gpus = f"{gpu_hours:,.2f} GPU hours" if any(held.gpus for held in found) else "GPUs are not accounted"
    states = Counter(held.state for held in found)
    ends = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{node_hours:,.2f} node hours, {gpus}; {ends}"
