"""What the subcommands of `loopmem` and the verbs of `loopmem slurm` share."""

import argparse
from typing import Any, Protocol


class AddCommand(Protocol):
    """Adds a subcommand, run by `run`, to those of `loopmem`, or to the verbs `among`."""

    def __call__(self, name: str, run: Any, help: str, among: Any = None) -> argparse.ArgumentParser: ...


def with_config(parser: argparse.ArgumentParser, example: str = "training.train_steps=100") -> argparse.ArgumentParser:
    """Add what commands that read a configuration have in common."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file (see configs/ and data_prep/)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"overrides, such as {example}")
    return parser
