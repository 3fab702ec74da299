"""What every benchmark prints first: the command, the versions, the hardware."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def header(packages: Iterable[str]) -> str:
    """Markdown: the command line, then versions and hardware."""
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return (
        f"    {' '.join(['python', *sys.argv])}\n\n"
        f"Python {platform.python_version()}, {versions}; {processor()}, {os.cpu_count()} cores, {sys.platform}; "
        f"load {os.getloadavg()[0]:.1f} before the start."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
