"""Words of messages that depend on numbers."""


def counted(number: int, noun: str) -> str:
    """1 rank, 2,048 ranks; the noun is given in the singular and takes an s."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"
