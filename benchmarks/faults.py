"""Break runs on purpose and see what is lost: killed processes, damaged files, full disks, other sizes.

Small runs on gloo ranks, forked from a preloaded process. Prints Markdown; exits with 1 where anything was lost.

    python benchmarks/faults.py > benchmarks/results/faults_cpu.md
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from machine import header

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "DP 2, ZeRO 1": ({}, 2),
    "DP 2, ZeRO 2": ({"zero_stage": 2}, 2),
    "DP 2, ZeRO 3": ({"zero_stage": 3}, 2),
    "TP 2, banks sharded, SP": ({TP: 2, "memory_placement": "sharded", "sequence_parallel": True}, 2),
    "PP 2": ({PP: 2}, 2),
    "TP 2, PP 2": ({TP: 2, PP: 2}, 4),
    "TP 2, DP 2, ZeRO 3": ({TP: 2, "zero_stage": 3}, 4),
}
STEPS, INTERVAL = 12, 3

# Where a rank is killed: (function, what its call number `count` does). `die()` is SIGKILL to the process itself.
MOMENTS: dict[str, tuple[str, str]] = {
    "start-up, before the data is opened": ("training.trainer.open_training", "die()"),
    "start-up, before the model is built": ("training.trainer.TrainingEngine.__init__", "die()"),
    "at any time": ("training.trainer.Trainer.train", "later(at_call / 2); result = call()"),
    "in a step": ("training.engine.TrainingEngine.train_batch", "later(0.05); result = call()"),
    "after a step": ("training.engine.TrainingEngine.train_batch", "call(); die()"),
    "in a validation": ("training.engine.TrainingEngine.evaluate", "later(0.01); result = call()"),
    "in a line of metrics.jsonl": ("training.loggers.JsonlLogger.log", "self.file.write(b'{\"st'); die()"),
    "save: before the copy": ("checkpoint.saving.make_folder", "call(); die()"),
    "save: in the copy": ("checkpoint.snapshot.HostBuffers.copy", "call(); die()"),
    "save: before the loss of its weights is known": ("checkpoint.probe.Sample.content", "die()"),
    "save: before a file": ("checkpoint.saving.write_state", "die()"),
    "save: in a file": ("checkpoint.saving.write_state", "args[0].write_bytes(b'PK' * 5000); die()"),
    "save: before the hashes": ("checkpoint.saving.hash_files", "die()"),
    "save: before a rank's record": ("checkpoint.saving.leave_record", "die()"),
    "save: before the manifest": ("checkpoint.store.CheckpointStore.publish", "die()"),
    "save: manifest written, not renamed": ("checkpoint.store.sync_folder", "call(); die()"),
    "save: renamed, `latest` not moved": ("checkpoint.store.sync_folder", "call(); die()"),
    "save: in the removal of old ones": ("checkpoint.store.CheckpointStore.prune", "die()"),
}
INJECT = """
import functools, importlib, os, signal, threading
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def later(seconds):
    threading.Timer(seconds, die).start()
def inject(target, action, at_call, only_rank):
    module, _, name = target.partition(":")
    owner = importlib.import_module("loopmem_pretrain." + module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, count = getattr(owner, name), 0
    @functools.wraps(original)
    def injected(*args, **kwargs):
        nonlocal count
        count += 1
        due = count == (1 if target.endswith("Trainer.train") else at_call)
        if not due or only_rank not in (None, int(os.environ["RANK"])):
            return original(*args, **kwargs)
        call = lambda: original(*args, **kwargs)
        scope = {"args": args, "at_call": at_call, "self": args[0] if args else None, "call": call}
        exec(action, {**globals(), **scope, "die": die, "later": later}, scope)
        return scope.get("result")
    setattr(owner, name, injected)
"""


class Kill(NamedTuple):
    layout: str
    moment: str
    at_call: int
    rank: int | None
    """None: every rank that comes there"""


def on_ranks(config: Any, ranks: int, **options: Any) -> str:
    """How a start ended: done, interrupted, the named error, or which ranks died."""
    from tests.distributed import run_ranks
    from tests.e2e.test_training import ON_RANK

    stop, first, before = (options.get(key) for key in ("stop_at_step", "first", "before"))
    try:
        status, error = run_ranks(ON_RANK, ranks, config, stop, before or "", first or "", timeout=100)[0]
    except AssertionError as failure:
        return "died" if "exit code -9" in str(failure) else f"unexpected: {failure}"
    return status or f"{type(error).__name__}: {error.problem}"


class Bench:
    """A scratch folder with prepared data, and the runs that nothing disturbed."""

    def __init__(self, folder: Path) -> None:
        from tests.prepared import prepare_sentences

        self.folder = folder
        self.data = prepare_sentences(folder / "data")
        self._undisturbed: dict[str, list[Any]] = {}
        self.failures: list[str] = []

    def config(self, run_dir: Path, parallel: dict[str, Any], **sections: Any) -> Any:
        from tests.e2e.test_training import config_for

        return config_for(
            run_dir,
            self.data,
            model={"num_hidden_layers": 4, "num_key_value_heads": 4},
            parallel=parallel,
            training={"train_steps": STEPS, "global_batch_size": 12, "micro_batch_size": 1},
            checkpoint={"interval_steps": INTERVAL, "keep_last": 2, **sections.pop("checkpoint", {})},
            validation={"interval_steps": 4, "num_samples": 12},
            logging={"interval_steps": 1, "peak_tflops": 0.05},
            **sections,
        )

    def undisturbed(self, layout: str) -> list[Any]:
        """What a run of this layout logs where nothing happens to it."""
        if layout not in self._undisturbed:
            parallel, ranks = LAYOUTS[layout]
            run_dir = self.folder / f"undisturbed {layout}"
            self.require(on_ranks(self.config(run_dir, parallel), ranks) == "done", f"undisturbed {layout}")
            self._undisturbed[layout] = logged(run_dir)
        return self._undisturbed[layout]

    def require(self, holds: bool, what: str) -> str:
        if not holds:
            self.failures.append(what)
            print(f"LOST: {what}", file=sys.stderr, flush=True)
        return "yes" if holds else "**no**"


def logged(run_dir: Path) -> list[Any]:
    """The numbers of each step, the last line of a step that was trained twice."""
    from tests.e2e.test_training import EXACT

    by_step = {}
    for text in (run_dir / "metrics.jsonl").read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        by_step[line["step"]] = {key: line[key] for key in EXACT if key in line}
    return [by_step[step] for step in sorted(by_step)]


def newest(run_dir: Path) -> int:
    """Step of the newest published checkpoint, 0 where there is none."""
    steps = [int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*")]
    return max(steps, default=0)


def kills(count: int, seed: int) -> Iterator[Kill]:
    """Every moment at least once, then random ones; layouts in turn, ranks and calls at random."""
    draw = random.Random(seed)
    moments = list(MOMENTS)
    for number in range(count):
        moment = moments[number] if number < len(moments) else draw.choice(moments)
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        at_call = 1 if "start-up" in moment else draw.randint(1, 3)
        if MOMENTS[moment][0].endswith("sync_folder"):  # called before and after each renaming
            at_call = 2 * at_call - ("not renamed" in moment)
        only_rank_zero = any(word in moment for word in ("manifest", "latest", "removal", "metrics", "before the copy"))
        rank = 0 if only_rank_zero else draw.choice([None, *range(LAYOUTS[layout][1])])
        yield Kill(layout, moment, at_call, rank)


def kill_runs(bench: Bench, count: int, seed: int) -> None:
    print(f"## Killed (SIGKILL) at {count} moments\n")
    print(
        f"Each run has {STEPS} steps, a checkpoint every {INTERVAL} and a validation every 4; it is killed once, the "
        "n-th time that the moment comes, and started again. Identical: every loss, gradient norm, validation loss and "
        "loop statistic of every step is the same number as in a run that was not killed.\n"
    )
    print("| layout | killed | rank | n-th time | steps logged | newest checkpoint | trained again | identical |")
    print("|---|---|---|---|---|---|---|---|")
    for number, kill in enumerate(kills(count, seed)):
        parallel, ranks = LAYOUTS[kill.layout]
        expected, run_dir = bench.undisturbed(kill.layout), bench.folder / f"kill {number}"
        config = bench.config(run_dir, parallel)
        target, action = MOMENTS[kill.moment]
        module, attribute = split_target(target)
        first = INJECT + f"inject({module + ':' + attribute!r}, {action!r}, {kill.at_call}, {kill.rank})"
        ended = on_ranks(config, ranks, first=first)
        bench.require(ended == "died", f"{kill} was not killed but {ended}")
        reached = logged(run_dir)[-1]["step"] if (run_dir / "metrics.jsonl").exists() and logged(run_dir) else 0
        whole = newest(run_dir)
        # At most the save that was under way, and the steps since, may be missing.
        kept = bench.require(reached - whole < 2 * INTERVAL, f"{kill}: step {reached} reached, checkpoint {whole}")
        ended = on_ranks(config, ranks)
        same = bench.require(ended == "done" and logged(run_dir) == expected, f"{kill} ended {ended}, or other numbers")
        again = max(0, reached - whole)
        rank = "all" if kill.rank is None else str(kill.rank)
        print(
            f"| {kill.layout} | {kill.moment} | {rank} | {kill.at_call} | {reached} | {whole} | {again} | "
            f"{same if kept == 'yes' else kept} |",
            flush=True,
        )
        shutil.rmtree(run_dir)
    print()


def split_target(target: str) -> tuple[str, str]:
    """training.engine.TrainingEngine.save -> (training.engine, TrainingEngine.save)."""
    parts = target.split(".")
    return ".".join(parts[:2]), ".".join(parts[2:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_files(bench: Bench) -> None:
    print("## Every file of a checkpoint, deleted, cut short, one bit flipped\n")
    print(
        "The newest of two checkpoints is damaged in one file. `loopmem checkpoint verify` must find it, and a start "
        "must go on from the older checkpoint to the same numbers.\n"
    )
    print("| layout | files | damages | found | recovered, identical |\n|---|---|---|---|---|")
    for layout in ("DP 2, ZeRO 1", "DP 2, ZeRO 3"):
        parallel, ranks = LAYOUTS[layout]
        expected, source = bench.undisturbed(layout), bench.folder / "damage"
        bench.require(on_ranks(bench.config(source, parallel), ranks, stop_at_step=6) == "interrupted", "stop")
        names = sorted(path.name for path in (source / "checkpoints" / "step_00000006").iterdir())
        tried = found = recovered = 0
        for name in [*names, "latest"]:
            for kind, damage in DAMAGES.items():
                tried += 1
                run_dir = bench.folder / "damaged"
                shutil.copytree(source, run_dir)
                inner = Path("checkpoints") if name == "latest" else Path("checkpoints", "step_00000006")
                damage(run_dir / inner / name)
                found += bench.require(name == "latest" or finds(run_dir), f"{kind} {name}: not found") == "yes"
                ended = on_ranks(bench.config(run_dir, parallel), ranks)
                lines = logged(run_dir)  # the start that was stopped at step 6 has validated there, too
                lines[5] = {key: value for key, value in lines[5].items() if key in expected[5]}
                same = ended == "done" and lines == expected
                recovered += bench.require(same, f"{kind} {name}: {ended}, or other numbers") == "yes"
                shutil.rmtree(run_dir)
        print(f"| {layout} | {len(names) + 1} | {tried} | {found} | {recovered} |", flush=True)
        shutil.rmtree(source)
    print()


def finds(run_dir: Path) -> bool:
    """Whether `loopmem checkpoint verify` says that the checkpoint of step 6 is damaged."""
    from loopmem_pretrain.cli import main as loopmem

    return loopmem(["checkpoint", "verify", os.fspath(run_dir / "checkpoints" / "step_00000006")]) == 4


def full_disks(bench: Bench) -> None:
    print("## A full disk and a folder that cannot be written\n")
    print(
        "| what | first start | newest whole checkpoint | started again with room | identical |\n|---|---|---|---|---|"
    )
    layout = "DP 2, ZeRO 1"
    parallel, ranks = LAYOUTS[layout]
    for megabytes in (1, 2, 3):
        mount = bench.folder / "small"
        mount.mkdir(exist_ok=True)
        size = f"size={megabytes}m"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], capture_output=True).returncode:
            print(f"| a disk of {megabytes} MB | not tried: mounting one takes rights that are missing here | | | |")
            continue
        run_dir = mount / "run"
        ended = on_ranks(bench.config(run_dir, parallel), ranks)
        whole = newest(run_dir)
        clean = ended.startswith("EnvironmentFault: cannot save")
        bench.require(clean, f"disk of {megabytes} MB: {ended}")
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        again = on_ranks(bench.config(run_dir, parallel), ranks)
        same = again == "done" and logged(run_dir) == bench.undisturbed(layout)
        said = ended.split(": rank")[0].split(" in /")[0]
        print(
            f"| a disk of {megabytes} MB | {said} | step {whole} | {again} | {bench.require(same, f'{megabytes} MB')} |"
        )
        subprocess.run(["umount", mount], check=True)
    for asynchronous in (True, False):
        run_dir = bench.folder / f"read-only {asynchronous}"
        config = bench.config(run_dir, parallel, checkpoint={"asynchronous": asynchronous})
        read_only = """
import loopmem_pretrain.checkpoint.saving as saving
make = saving.make_folder
def refuse(store, step, token):
    make(store, step, token)
    if step == 6:
        (store.folder / store.incomplete_name(step, token)).rmdir()
saving.make_folder = refuse
"""
        ended = on_ranks(config, ranks, first=read_only)
        whole = newest(run_dir)
        again = on_ranks(config, ranks)
        same = again == "done" and logged(run_dir) == bench.undisturbed(layout)
        way = "in the background" if asynchronous else "while training waits"
        print(
            f"| the folder of step 6 vanishes, saved {way} | {ended.split(':')[0]} | step {whole} | {again} | "
            f"{bench.require(same, f'read-only {asynchronous}: {ended}')} |"
        )
    print()


CHAINS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "TP 2, 1, 4, 2": [({TP: 2}, 2), ({}, 1), ({TP: 4}, 4), ({TP: 2}, 2)],
    "PP 2, 1, 4, 2": [({PP: 2}, 2), ({}, 1), ({PP: 4}, 4), ({PP: 2}, 2)],
    "DP 2, 4, 3, 1, 2": [({}, 2), ({}, 4), ({}, 3), ({}, 1), ({}, 2)],
    "ZeRO 1, 2, 3, 2, 1, 3, 1 on 2 ranks": [({"zero_stage": stage}, 2) for stage in (1, 2, 3, 2, 1, 3, 1)],
    "TP 2: banks whole, sharded, whole": [
        ({TP: 2, "memory_placement": place}, 2) for place in ("replicated", "sharded", "replicated")
    ],
    "TP 2: SP off, on, off": [({TP: 2, "sequence_parallel": on}, 2) for on in (False, True, False)],
    "TP 2 x PP 2, DP 3 ZeRO 3, TP 4 sharded SP, PP 2 x DP 2": [
        ({TP: 2, PP: 2}, 4),
        ({"zero_stage": 3}, 3),
        ({TP: 4, "memory_placement": "sharded", "sequence_parallel": True}, 4),
        ({PP: 2}, 4),
    ],
}


def resize(bench: Bench) -> None:
    print("## Other sizes\n")
    print(
        f"A run is stopped at step {STEPS // 2}; each size of the chain loads what the one before saved and saves it "
        "again without training. Same: SHA-256 over all float32 weights and both moments of Adam. Then the last size "
        "trains on; its losses are compared with those of a run that stayed at the first size.\n"
    )
    print("| chain | loads | weights and moments the same | largest relative difference of a loss |\n|---|---|---|---|")
    for name, chain in CHAINS.items():
        run_dir, stayed = bench.folder / "chain", bench.folder / "stayed"
        (first, ranks), (last, last_ranks) = chain[0], chain[-1]
        on_ranks(bench.config(run_dir, first), ranks, stop_at_step=STEPS // 2)
        shutil.copytree(run_dir, stayed)
        hashes = [state_hash(run_dir)]
        for parallel, ranks in chain[1:]:
            config = bench.config(run_dir, parallel)
            ended = on_ranks(config, ranks, stop_at_step=STEPS // 2, before="trainer.saver.save(wait=True)")
            bench.require(ended == "interrupted", f"{name}: {ended}")
            hashes.append(state_hash(run_dir))
        same = bench.require(len(set(hashes)) == 1, f"{name}: {hashes}")
        ended = on_ranks(bench.config(run_dir, last), last_ranks)
        ended_too = on_ranks(bench.config(stayed, first), chain[0][1])
        bench.require(ended == ended_too == "done", f"{name}: {ended}, {ended_too}")
        pairs = zip(logged(run_dir), logged(stayed), strict=True)
        difference = max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs)
        bench.require(difference < 1e-5, f"{name}: loss differs by {difference}")
        print(f"| {name} | {len(chain) - 1} | {same} | {difference:.1e} |", flush=True)
        shutil.rmtree(run_dir)
        shutil.rmtree(stayed)
    print()


def state_hash(run_dir: Path) -> str:
    """Of every float32 weight and moment of the newest checkpoint, in the order of their names."""
    from loopmem_pretrain.checkpoint.store import CheckpointStore
    from loopmem_pretrain.checkpoint.universal import STATES, merge

    checkpoint = CheckpointStore(run_dir).latest()
    assert checkpoint is not None
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        merged = merge(checkpoint, Path(folder) / "merged")
        for name in sorted(merged.names):
            for state in STATES:
                digest.update(name.encode() + merged.read(name, state).contiguous().numpy().tobytes())
    return digest.hexdigest()


PARTS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "kills": lambda bench, options: kill_runs(bench, options.kills, options.seed),
    "damage": lambda bench, options: damage_files(bench),
    "disks": lambda bench, options: full_disks(bench),
    "resize": lambda bench, options: resize(bench),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    print("# What faults cost\n")
    print(header(["torch", "deepspeed"]) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part in options.parts:
            PARTS[part](bench, options)
    print(f"{len(bench.failures)} failures." + "".join(f"\n- {failure}" for failure in bench.failures))
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
