"""The order of samples in an epoch, computed for any position without a list of all samples.

It is a keyed permutation of ``[0, n)``: a Feistel network on ``Z_a x Z_b`` with ``a = ceil(sqrt(n))`` and
``b = ceil(n / a)`` alternately adds a keyed hash of one half to the other half, and a result outside ``[0, n)`` goes
through the network again ("cycle walking"). Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA
2002), sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vtprune_train.core.rounding import round_of

ROUNDS = 8


def permuted(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Apply the permutation of ``[0, size)`` selected by ``key`` (non-negative integers) to ``positions`` [P]. Returns
    [P] int64."""
    assert size > 0 and (not len(positions) or (positions.min() >= 0 and positions.max() < size)), "outside [0, size)"
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = np.random.SeedSequence([size, *key]).generate_state(ROUNDS, np.uint64)
    result = np.asarray(positions, dtype=np.uint64)
    result = _network(result, rows, columns, keys)
    while len(outside := np.flatnonzero(result >= size)):
        result[outside] = _network(result[outside], rows, columns, keys)
    return result.astype(np.int64)


def _network(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(columns))
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + _hash(left, key) % np.uint64(columns)) % np.uint64(columns)
        else:
            left = (left + _hash(right, key) % np.uint64(rows)) % np.uint64(rows)
    return left * np.uint64(columns) + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of SplitMix64 applied to ``values`` and ``key``; arithmetic wraps at 64 bits."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class EpochOrder:
    """The sample at each position of each epoch of a mixture, determined by the seed and the epoch.

    Each source is traversed repeatedly, in a new order each time, and an epoch takes the next ``weight x size`` samples
    of it (rounded half to even): weight 0.5 takes one half in one epoch and the other half in the next, weight 2 takes
    every sample twice. The samples of all sources are then shuffled together.

    Args:
        sizes: number of samples of each source; samples are numbered consecutively across sources.
        seed: the run's seed.
        weights: weight of each source, above 0; 1 by default. An epoch takes at least one sample of each source.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None):
        weights = [1.0] * len(sizes) if weights is None else weights
        self.sizes, self.seed = [int(size) for size in sizes], seed
        pairs = zip(self.sizes, weights, strict=True)
        self.counts = [max(1, round_of(weight, size)) if size else 0 for size, weight in pairs]
        self._ends = np.cumsum(self.counts)
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.counts)

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at positions ``[start, stop)`` of ``epoch``, at most to its end: [positions] int64."""
        positions = permuted(np.arange(start, min(stop, len(self))), len(self), [self.seed, epoch])
        source = np.searchsorted(self._ends, positions, side="right")
        result = np.zeros(len(positions), dtype=np.int64)
        for number in np.unique(source).tolist():
            of_source = source == number
            draws = positions[of_source] - (self._ends[number] - self.counts[number]) + epoch * self.counts[number]
            result[of_source] = self._starts[number] + self._walk(number, draws)
        return result

    def _walk(self, source: int, draws: np.ndarray) -> np.ndarray:
        """The samples of a source at ``draws``, positions in the sequence of all draws from it in the run."""
        passes, places = np.divmod(draws, self.sizes[source])
        result = np.zeros(len(draws), dtype=np.int64)
        for number in np.unique(passes).tolist():
            of_pass = passes == number
            result[of_pass] = permuted(places[of_pass], self.sizes[source], [self.seed, number, source + 1])
        return result
