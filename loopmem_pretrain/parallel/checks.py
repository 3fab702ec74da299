"""Whether weights are what they should be: the same bits on all ranks that hold them, and finite.

Weights that several ranks hold (over data-parallel ranks; norms, routers and gates over tensor-parallel ranks; tied
weights over pipeline stages) stay equal only as long as every rank gives them the same gradient. Nothing in training
notices when one does not: the loss goes on falling, and the copies drift apart.

    lines = replica_differences(parameters, group, "data-parallel")
    if lines: raise replicas_differ(lines, step)
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain.errors import TrainingGaveUp

# Elements fingerprinted at a time: three int64 buffers of this length are all the memory a check needs (24 MiB).
CHUNK = 1 << 20

# Odd 64-bit constants as signed numbers: of splitmix64 (positions, first and second multiplication) and xxHash (sizes).
_POSITION, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_SIZE = -0x61C8864E7A143579
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replica_differences(
    named_parameters: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup | None, kind: str
) -> list[str]:
    """Parameters that are not the same bits on all ranks of `group`, as one line each; empty where all agree.

    A collective: every rank of `group` calls it with the same names in the same order, and gets the same answer. It
    costs one pass over the parameters, one all-gather of 8 bytes a parameter, and one read of the device. Two different
    tensors pass for equal with probability 2^-64. NaNs are compared by their bits, like everything else.

    Args:
        named_parameters: public names and tensors; all on the device of the group's backend.
        group: the ranks that should agree; None is all of them.
        kind: what the group is called in the messages, such as "tensor-parallel".
    """
    names, fingerprints = [], []
    for name, parameter in named_parameters:
        names.append(name)
        fingerprints.append(fingerprint(parameter))
    ranks = dist.get_process_group_ranks(group)
    if not names or len(ranks) == 1:
        return []
    mine = torch.stack(fingerprints)
    gathered = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(gathered, mine, group=group)
    table = torch.stack(gathered)
    differs = (table != table[0]).any(dim=0)
    rows: list[list[int]] = torch.cat([differs[None].long(), table]).tolist()  # the one read of the device
    return [
        _describe(name, [row[column] for row in rows[1:]], ranks, kind)
        for column, name in enumerate(names)
        if rows[0][column]
    ]


def replicas_differ(lines: Sequence[str], step: int) -> TrainingGaveUp:
    """The named error for what `replica_differences` found after `step`, to be raised on every rank."""
    shown = [*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])]
    return TrainingGaveUp(
        f"weights that must be identical on several ranks are not, at step {step:,}\n    " + "\n    ".join(shown),
        "resume from a checkpoint written before the drift; if it comes again on the same rank, suspect its device, "
        "if on all of them, report it with the configuration",
    )


def are_finite(parameters: Iterable[Tensor], device: torch.device) -> bool:
    """Whether all parameters are finite on all ranks, each of which looks at what it holds; a collective.

    Costs one pass over the parameters and one read of the device.
    """
    bad = torch.zeros((), dtype=torch.int32, device=device)
    for parameter in parameters:
        bad |= ~held_part(parameter).isfinite().all().to(device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def held_part(parameter: Tensor) -> Tensor:
    """What this rank holds of `parameter`: under ZeRO 3 its share without the padding, else all of it."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    share = parameter.ds_tensor.detach()
    first = dist.get_rank(parameter.ds_process_group) * share.numel()  # type: ignore[attr-defined]
    return share.flatten()[: max(0, parameter.ds_numel - first)]  # type: ignore[attr-defined]


def fingerprint(tensor: Tensor) -> Tensor:
    """64 bits, int64 [], that depend on every bit of `tensor` and on its place; computed on its device, not read.

    The sum over elements of mix(bits + place): without the mix, equal and opposite changes would cancel; without the
    place, exchanged elements would. Integer sums wrap and do not depend on the order in which a device adds.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_SAME_WIDTH[tensor.element_size()])
    total = torch.full((), bits.numel(), dtype=torch.int64, device=bits.device) * _SIZE
    places = torch.arange(min(CHUNK, bits.numel()), device=bits.device) * _POSITION
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        chunk += places[: chunk.numel()]
        chunk += _wrapped(start * _POSITION)
        chunk.mul_(_FIRST)
        chunk ^= (chunk >> 32) & 0xFFFFFFFF  # the shift copies the sign, the mask takes it off again
        chunk.mul_(_SECOND)
        chunk ^= (chunk >> 29) & 0x7FFFFFFFF
        total += chunk.sum()
    return total


def _wrapped(number: int) -> int:
    """`number` modulo 2^64 as a signed 64-bit number, as the device computes it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _describe(name: str, values: list[int], ranks: list[int], kind: str) -> str:
    """What most ranks hold is taken for right; between equal halves, what the first rank holds."""
    right = Counter(values).most_common(1)[0][0]  # first met first, where counts are equal
    odd = [rank for rank, value in zip(ranks, values, strict=True) if value != right]
    holds = f"rank {odd[0]} holds" if len(odd) == 1 else f"ranks {_list(odd)} hold"
    return f"{name} differs between {kind} ranks {_list(ranks)}: {holds} other bits"


def _list(ranks: list[int]) -> str:
    """Ranks in words; long groups shortened."""
    return ", ".join(map(str, ranks if len(ranks) <= 16 else [*ranks[:8], "...", ranks[-1]]))
