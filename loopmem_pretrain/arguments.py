"""What the subcommands of `loopmem` and the verbs of `loopmem slurm` share."""

import argparse
from typing import Any, Protocol


class AddCommand(Protocol):
    """Adds a subcommand, run by `run`, to those of `loopmem`, or to the verbs `among`."""

    def __call__(self, name: str, run: Any, help: str, among: Any = None) -> argparse.ArgumentParser: ...


class Once(argparse.Action):
    """An option that counts once: argparse would take the last of two, and leave the first out in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice; a file that builds on others names them under `base:`")
        setattr(namespace, self.dest, values)


def with_config(parser: argparse.ArgumentParser, example: str = "training.train_steps=100") -> argparse.ArgumentParser:
    """Add what commands that read a configuration have in common."""
    help_ = "YAML file (see configs/ and data_prep/)"
    parser.add_argument("--config", required=True, action=Once, metavar="FILE", help=help_)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"overrides, such as {example}")
    return parser
