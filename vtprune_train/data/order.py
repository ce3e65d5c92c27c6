"""The order of an epoch as arithmetic: which sample stands at a position, without a list of all of them.

A keyed permutation of ``[0, n)`` is computed position by position: a Feistel network on ``Z_a x Z_b`` with
``a = ceil(sqrt(n))`` and ``b = ceil(n / a)`` adds a keyed hash of one half to the other half in turn, and a result
outside ``[0, n)`` goes through the network again ("cycle walking"). Source: Black and Rogaway, "Ciphers with Arbitrary
Finite Domains" (CT-RSA 2002), sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vtprune_train.core.rounding import round_of

ROUNDS = 8


def permuted(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where the permutation of ``[0, size)`` that ``key`` (non-negative integers) chooses sends ``positions`` [P]: [P]
    int64, different for different positions."""
    assert size > 0 and (not len(positions) or (positions.min() >= 0 and positions.max() < size)), "a place in [0, n)"
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
    """The finalizer of SplitMix64 over ``values`` and ``key``; sums and products wrap at 64 bits."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class EpochOrder:
    """Which sample stands at each position of each epoch of a mixture; decided by the seed and the epoch alone.

    Every source is walked through pass after pass, each pass in an order of its own, and an epoch takes the next
    ``weight x size`` of it (rounded, a half to the even number): weight 0.5 takes one half in one epoch and the other
    half in the next, weight 2 takes every sample twice. The takings of all sources are then shuffled together.

    Args:
        sizes: samples of each source; they are numbered through, source after source.
        seed: of the run.
        weights: of each source, above 0; all 1 by default. A source gives at least one sample an epoch.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None):
        weights = [1.0] * len(sizes) if weights is None else weights
        self.sizes, self.seed = [int(size) for size in sizes], seed
        pairs = zip(self.sizes, weights, strict=True)
        self.takings = [max(1, round_of(weight, size)) if size else 0 for size, weight in pairs]
        self._ends = np.cumsum(self.takings)
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.takings)

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at positions ``[start, stop)`` of ``epoch`` (to its end if it is shorter), [positions] int64."""
        positions = permuted(np.arange(start, min(stop, len(self))), len(self), [self.seed, epoch])
        source = np.searchsorted(self._ends, positions, side="right")
        result = np.zeros(len(positions), dtype=np.int64)
        for number in np.unique(source).tolist():
            own = source == number
            taken = positions[own] - (self._ends[number] - self.takings[number]) + epoch * self.takings[number]
            result[own] = self._starts[number] + self._walk(number, taken)
        return result

    def _walk(self, source: int, taken: np.ndarray) -> np.ndarray:
        """The samples of a source that are the ``taken``-th since the run began."""
        passes, places = np.divmod(taken, self.sizes[source])
        result = np.zeros(len(taken), dtype=np.int64)
        for number in np.unique(passes).tolist():
            own = passes == number
            result[own] = permuted(places[own], self.sizes[source], [self.seed, number, source + 1])
        return result
