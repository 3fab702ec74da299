"""The cross-entropy of documents that may be longer than the model's context.

A document is scored as [end of document, token 1, ... token n]: what stands before it in training, then its text. Every
token after the first is predicted exactly once. Windows of `context` inputs begin every context // 2 tokens, and each
predicts the tokens that no window before it has: in the first window from all that stand before, in later ones from at
least context - context // 2 + 1 tokens, more than half the context.

Attention is causal and halting is per token, so windows of a batch are padded at their ends: padding changes nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.model.backend import wide
from loopmem_pretrain.model.early_exit import early_exit, exit_forward

BROKEN = "score an earlier checkpoint, or as many loops as the model was trained with"
"""What to do about a cross-entropy that is not finite, or a perplexity that no number can hold."""
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


class WindowScore(NamedTuple):
    """What a model gives the tokens that a window predicts."""

    nats: float
    """Their cross-entropy, summed."""
    is_greedy: bool
    """Whether each is the likeliest token where it stands."""
    loops: float | None = None
    """With early exit: the loops that they ran, mean over layers, summed."""


class Setting(NamedTuple):
    """How the model is run."""

    num_loops: int | None
    """Every layer is applied so often; None for a model that does not loop."""
    gates_closed: bool = False
    """Without the memory, as if every gate were 0."""
    exit_threshold: float | None = None
    """Tokens leave layers early, by `exit_rule` (docs/inference.md); None: all loops run."""
    exit_rule: str | None = None


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


def continuation_windows(number: int, ids: Sequence[int], scored: int, context: int) -> Iterator[Window]:
    """Windows that predict the last `scored` of `ids` once, from as much as fits of what stands before them.

    What does not fit is cut off on the left. A continuation longer than the context is cut into windows like a
    document, its first tokens predicted from half a context of the prompt.
    """
    if scored <= context:
        yield Window(number, ids[-(context + 1) :], scored)
        return
    kept = ids[-(scored + stride_of(context)) :]
    unscored = len(kept) - 1 - scored
    for window in windows(number, kept, context):
        yield window._replace(scored=window.scored - unscored)
        unscored = 0


@contextmanager
def gates_closed(model: Any) -> Iterator[None]:
    """Within the block no layer reads memory: inject(h) = h, which is what gates of 0 give."""
    memory = model.model.memory
    model.model.memory = None
    try:
        yield
    finally:
        model.model.memory = memory


def window_scores(model: Any, some: Sequence[Window], batch_size: int, setting: Setting) -> list[WindowScore]:
    """The score of each window.

    Args:
        model: a LoopMemLM or a LoopMemForCausalLM in evaluation mode.
        some: windows of any lengths.
        batch_size: windows in one forward pass.
        setting: how the model is run.
    """
    by_length = sorted(range(len(some)), key=lambda index: len(some[index].ids), reverse=True)  # little padding
    scores: dict[int, WindowScore] = {}
    with torch.inference_mode(), gates_closed(model) if setting.gates_closed else nullcontext():
        for start in range(0, len(some), batch_size):
            chosen = by_length[start : start + batch_size]
            sums = _batch_sums(model, [some[index] for index in chosen], setting).T.tolist()
            for index, (nats, misses, loops) in zip(chosen, sums, strict=True):
                scores[index] = WindowScore(nats, misses == 0, None if setting.exit_threshold is None else loops)
    return [scores[index] for index in range(len(some))]


def _batch_sums(model: Any, batch: list[Window], setting: Setting) -> Tensor:
    """Nats of each window, how many of its tokens are not the likeliest, the loops they ran: [3, B], float64."""
    device = next(model.parameters()).device
    longest = max(len(window.ids) for window in batch)
    tokens = torch.tensor([[*window.ids, *[0] * (longest - len(window.ids))] for window in batch], device=device)
    ends = torch.tensor([len(window.ids) - 1 for window in batch], device=device).unsqueeze(1)
    scored = torch.tensor([window.scored for window in batch], device=device).unsqueeze(1)
    positions = torch.arange(longest - 1, device=device)
    counts = (positions < ends) & (positions >= ends - scored)
    hidden, loops = _hidden(model, tokens[:, :-1], setting)
    rows = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    hidden, targets = hidden[counts], tokens[:, 1:][counts]
    parts = [slice(start, start + rows) for start in range(0, len(targets), rows)]
    each = torch.cat([token_scores(model.lm_head(hidden[part]), targets[part]) for part in parts], dim=1)
    sums = torch.zeros(3, len(batch), dtype=torch.float64, device=device)
    return sums.index_add_(1, counts.nonzero()[:, 0], torch.cat((each.double(), loops[counts][None])))


def _hidden(model: Any, tokens: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D], and the loops that each token ran [B, T], mean over layers; 0 without early exit."""
    early = early_exit(setting.exit_threshold, setting.exit_rule or "halting")
    if early is None:
        hidden, _ = model.model(tokens, setting.num_loops)
        all_loops = 0 if setting.exit_threshold is None else setting.num_loops or 0
        return hidden, torch.full(tokens.shape, float(all_loops), dtype=torch.float64, device=tokens.device)
    hidden, stats = exit_forward(model.model, tokens, early, setting.num_loops)
    return hidden, torch.stack([layer.loops for layer in stats]).double().mean(0)


def require_finite(nats: float, setting: Setting, where: str = "") -> None:
    """
    Raises:
        CheckpointError: the model has given a cross-entropy that is not finite; `where` says of what.
    """
    if not math.isfinite(nats):
        loops = "" if setting.num_loops is None else f" at {setting.num_loops} loops"
        raise CheckpointError(f"{where}the model's cross-entropy is {nats}{loops}", BROKEN)


def token_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [n] under logits [n, V], and 1 where it is not the likeliest token: [2, n]."""
    nats = F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="none")
    return torch.stack([nats, (logits.argmax(-1) != targets).to(nats.dtype)])
