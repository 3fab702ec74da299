"""The order of samples as arithmetic: no shuffled list is stored, so nothing about it has to be saved or rebuilt.

Two pure functions of their arguments decide which sample is the i-th of a run:

- `BlendCycle`: which data set the i-th sample comes from, and the how-many-th draw from that data set it is;
- `permuted`: which sample of a data set its k-th draw is, epoch after epoch, each sample exactly once an epoch.

Changing either changes every run's data: then also change ORDER, which checkpoints remember.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import isqrt

ORDER = "cycle65536-feistel6-v1"
CYCLE = 65536

_ROUNDS = 6
_MASK = (1 << 64) - 1


class BlendCycle:
    """65,536 draws, repeated for ever, in which every data set has its share, spread as evenly as it can be.

    Args:
        weights: positive, in any unit; rounded to whole draws of the cycle by largest remainders.

    Raises:
        ValueError: no weights, or one that gets no draw in the cycle (a share below about 1/131,072).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        import numpy as np

        self.counts = _shares(weights)
        """Draws of each data set in one cycle; they add up to 65,536."""
        # The k-th of a data set's c draws wants to stand at (k + 1/2)/c of the cycle. Sorting all wishes gives an
        # order in which no data set is ever more than a draw or so ahead of its share.
        wishes = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        owners = np.concatenate([np.full(c, d, dtype=np.int32) for d, c in enumerate(self.counts)])
        ranks = np.concatenate([np.arange(c, dtype=np.int32) for c in self.counts])
        by_wish = np.argsort(wishes, kind="stable")
        self._owner, self._rank = owners[by_wish], ranks[by_wish]

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(data set, draw): sample `sample_index` of the blend is draw number `draw` from that data set."""
        cycle, entry = divmod(sample_index, CYCLE)
        dataset = int(self._owner[entry])
        return dataset, cycle * self.counts[dataset] + int(self._rank[entry])

    def drawn(self, samples: int) -> list[int]:
        """How many of the blend's first `samples` samples come from each data set."""
        cycles, entry = divmod(samples, CYCLE)
        return [cycles * c + int((self._owner[:entry] == d).sum()) for d, c in enumerate(self.counts)]

    def samples_before(self, dataset: int, draw: int) -> int:
        """The blend's index of draw number `draw` from `dataset`: the inverse of `locate`."""
        cycle, rank = divmod(draw, self.counts[dataset])
        return cycle * CYCLE + int((self._owner == dataset).nonzero()[0][rank])


def permuted(draw: int, size: int, seed: int, dataset: int) -> int:
    """The sample, 0 ... size - 1, that is draw number `draw` from a data set of `size` samples.

    Epoch draw // size is a pseudorandom permutation of its own: a Feistel network over pairs (left, right) with
    left < a, right < b and a * b just above size; a result outside the data set is sent through again until it is
    inside ("cycle walking"), which keeps the map a bijection. O(1) in time and memory.
    """
    epoch, position = divmod(draw, size)
    keys = _round_keys(seed, dataset, epoch)
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = position // b, position % b
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _mix(key ^ left)) % b
            else:
                left = (left + _mix(key ^ right)) % a
        position = left * b + right
        if position < size:
            return position


@lru_cache(maxsize=1024)  # one entry a data set and epoch in use
def _round_keys(seed: int, dataset: int, epoch: int) -> tuple[int, ...]:
    digest = blake2b(f"{ORDER} {seed} {dataset} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(x: int) -> int:
    """A 64-bit hash: every input bit changes about half of the output bits."""
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return x ^ (x >> 32)


def _shares(weights: Sequence[float]) -> list[int]:
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights must be positive, got {list(weights)}")
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    if sum(weights) == math.inf:  # of weights that are finite themselves
        return _shares([weight / max(weights) for weight in weights])
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda d: counts[d] - exact[d])
    for d in by_remainder[: CYCLE - sum(counts)]:
        counts[d] += 1
    if min(counts) == 0:
        d = counts.index(0)
        raise ValueError(f"weight {weights[d]} is a share of {exact[d] / CYCLE:.1e}, too small for one draw in {CYCLE}")
    return counts
