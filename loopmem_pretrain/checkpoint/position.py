"""How far a run has come."""

from dataclasses import dataclass, field


@dataclass
class Position:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """The next sample of the order: samples consumed, and those left out."""
    tokens: int = 0
    """Training tokens consumed."""
    skipped_ranges: list[list[int]] = field(default_factory=list)
    """[first, last) samples of the order that rewinds left out."""
