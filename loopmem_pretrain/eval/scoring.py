"""The cross-entropy of documents that may be longer than the model's context.

A document is scored as [end of document, token 1, ... token n]: what stands before it in training, then its text. Every
token after the first is predicted exactly once. Windows of `context` inputs begin every context // 2 tokens, and each
predicts the tokens that no window before it has: in the first window from all that stand before, in later ones from at
least context - context // 2 + 1 tokens, more than half the context.

Attention is causal and halting is per token, so windows of a batch are padded at their ends: padding changes nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmem_pretrain.model.backend import wide

LOGIT_BYTES = 1 << 26
"""Memory for the logits that exist at once: a batch's would be gigabytes at a large vocabulary."""


class Window(NamedTuple):
    """A stretch of a document."""

    document: int
    """Which document of the domain."""
    ids: Sequence[int]
    """Token ids: all but the last are inputs."""
    scored: int
    """So many at the end are predicted here; those before them are context."""


class Setting(NamedTuple):
    """How the model is run."""

    num_loops: int | None
    """Every layer is applied so often; None for a model that does not loop."""
    gates_closed: bool = False
    """Without the memory, as if every gate were 0."""


def stride_of(context: int) -> int:
    """Tokens from the beginning of one window to the next: half the context."""
    return max(1, context // 2)


def windows(document: int, ids: Sequence[int], context: int) -> Iterator[Window]:
    """Cut `ids` so that each of ids[1:] is predicted once."""
    done = start = 0
    while done < len(ids) - 1:
        end = min(start + context, len(ids) - 1)
        yield Window(document, ids[start : end + 1], end - done)
        done, start = end, start + stride_of(context)


@contextmanager
def gates_closed(model: Any) -> Iterator[None]:
    """Within the block no layer reads memory: inject(h) = h, which is what gates of 0 give."""
    memory = model.model.memory
    model.model.memory = None
    try:
        yield
    finally:
        model.model.memory = memory


def window_nats(model: Any, some: Sequence[Window], batch_size: int, setting: Setting) -> list[float]:
    """Cross-entropy of each window, summed over the tokens it predicts, in nats.

    Args:
        model: a LoopMemLM or a LoopMemForCausalLM in evaluation mode.
        some: windows of any lengths.
        batch_size: windows in one forward pass.
        setting: how the model is run.
    """
    by_length = sorted(range(len(some)), key=lambda index: len(some[index].ids), reverse=True)  # little padding
    nats = [0.0] * len(some)
    with torch.inference_mode(), gates_closed(model) if setting.gates_closed else nullcontext():
        for start in range(0, len(some), batch_size):
            chosen = by_length[start : start + batch_size]
            values = _batch_nats(model, [some[index] for index in chosen], setting.num_loops).tolist()
            for index, value in zip(chosen, values, strict=True):
                nats[index] = value
    return nats


def _batch_nats(model: Any, batch: list[Window], num_loops: int | None) -> Tensor:
    """[B], float64."""
    device = next(model.parameters()).device
    longest = max(len(window.ids) for window in batch)
    tokens = torch.tensor([[*window.ids, *[0] * (longest - len(window.ids))] for window in batch], device=device)
    ends = torch.tensor([len(window.ids) - 1 for window in batch], device=device).unsqueeze(1)
    scored = torch.tensor([window.scored for window in batch], device=device).unsqueeze(1)
    positions = torch.arange(longest - 1, device=device)
    counts = (positions < ends) & (positions >= ends - scored)
    hidden, _ = model.model(tokens[:, :-1], num_loops)
    rows = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    hidden, targets = hidden[counts], tokens[:, 1:][counts]
    parts = [slice(start, start + rows) for start in range(0, len(targets), rows)]
    nats = torch.cat([_nats(model.lm_head(hidden[part]), targets[part]) for part in parts])
    sums = torch.zeros(len(batch), dtype=torch.float64, device=device)
    return sums.index_add_(0, counts.nonzero()[:, 0], nats.double())


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="none")
