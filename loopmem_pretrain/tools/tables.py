"""Numbers and tables for a terminal."""

from collections.abc import Sequence


def human_bytes(size: float) -> str:
    """1234567 -> "1.23 MB": three digits, powers of 1000."""
    return human(size, "B")


def human(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M": three digits, powers of 1000."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    index = 0
    while value >= 999.5 and index < len(prefixes) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[index]}{unit}".rstrip()


def human_seconds(seconds: float) -> str:
    """0.0123 -> "12.3 ms"."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented lines of equal columns: the first aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
