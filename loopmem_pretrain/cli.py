"""The `loopmem` command: its parser, and how errors become messages and exit codes (subcommands: commands.py).

Errors that users cause are printed without a traceback, with what to do; errors.py lists the exit codes.
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loopmem_pretrain import __version__, commands
from loopmem_pretrain.cluster.command import add_slurm
from loopmem_pretrain.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_TERMINATED, LoopMemError
from loopmem_pretrain.progress import LinesBesideBars, unread_output_dropped


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="loopmem: %(message)s", handlers=[LinesBesideBars(sys.stderr)])
    logging.getLogger("loopmem_pretrain").setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`, and the rest
    try:
        with contextlib.nullcontext() if options.run is commands.train else _ended_by_sigterm():
            code = int(options.run(options))
        sys.stdout.flush()  # here, where a closed pipe is understood
        return code
    except LoopMemError as error:
        speaker = "loopmem" if rank == "0" else f"loopmem (rank {rank})"
        if not error.is_told:
            with unread_output_dropped(sys.stderr):
                print(f"{speaker}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        by_signal = isinstance(interrupt, Terminated)
        said = "ended by SIGTERM" if by_signal else "interrupted"
        if rank == "0":
            with unread_output_dropped(sys.stderr):
                print(f"loopmem: {said}; the same command continues where it can", file=sys.stderr, flush=True)
        return EXIT_TERMINATED if by_signal else EXIT_INTERRUPTED
    except BrokenPipeError:  # `loopmem ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


class Terminated(KeyboardInterrupt):
    """SIGTERM in a command that has no other use for it: all is put away as after Ctrl-C."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Command(argparse.ArgumentParser):
    """A subcommand: overrides may stand on both sides of its options, and a mistake shows its own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in argparse, which takes positional arguments at one place only and leaves the others over."""
        options, others = super().parse_known_args(args, namespace)
        if others and ("overrides" not in options or any(word.startswith("-") for word in others)):
            self.error(f"unrecognized arguments: {' '.join(others)}")
        if others:
            options.overrides = [*options.overrides, *others]
        return options, []


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their arguments; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="loopmem",
        description="Pretrain transformers whose layers loop adaptively and read gated memory banks.",
        epilog="exit codes: 0 done or stopped cleanly, 1 bug, 2 config or usage, 3 data, 4 checkpoint, "
        "5 conversion mismatch, 6 environment, 7 training gave up, 8 hang, "
        "130 interrupted from the keyboard, 143 by SIGTERM",
    )
    parser.add_argument("--version", action="version", version=f"loopmem {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher puts it before the command
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)

    def command(name: str, run: Callable[[Any], int], help: str, among: Any = None) -> argparse.ArgumentParser:
        sub = (among or subcommands).add_parser(
            name, help=help, description=help, formatter_class=argparse.RawTextHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    for add in (
        commands.add_fetch_corpus,
        commands.add_train_tokenizer,
        commands.add_prepare_data,
        commands.add_train,
        commands.add_convert,
        commands.add_generate,
        commands.add_eval,
        commands.add_checkpoint,
        commands.add_plot,
        commands.add_report,
        commands.add_estimate,
        add_slurm,
        commands.add_demo,
    ):
        add(command)
    return parser
