"""The baseline ``random``: every method has to beat it."""

from __future__ import annotations

import numpy as np
from pydantic import NonNegativeInt

from vtprune_train.core.stream import SpanLayout
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import Baseline
from vtprune_train.pruning.ops.selection import picked_on_host

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64 output function, uint64 -> uint64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draws(seed: int, key: int, number: int, count: int) -> np.ndarray:
    """[count] pseudorandom uint64 values that depend only on the arguments, not on the batch, rank or step."""
    state = np.zeros(1, dtype=np.uint64)
    for word in (seed, key, number):
        state = mixed(state + GOLDEN + np.uint64(word % 2**64))
    return mixed(state + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


class Random(Baseline):
    """Keep floor(keep * n) random tokens per image; the draw is seeded by the sample's text, the image index within the
    sample and ``seed``.

    Args:
        keep: keep ratio, in (0, 1].
        layer: decoder layer before which tokens are dropped; 0: before the decoder.
        positions: ``keep`` keeps the positions of the kept tokens; ``renumber`` numbers them 0, 1, ...
        seed: change it to get a different draw.
    """

    seed: NonNegativeInt = 0

    name = "random"
    trains = "yes; a sample keeps the same tokens in every epoch"

    def choose(self, candidates: Candidates) -> Selection:
        return Selection(picked_on_host(candidates.boundary, self._pick))

    def _pick(self, span: SpanLayout) -> np.ndarray:
        order = np.argsort(draws(self.seed, span.key, span.number, span.before), kind="stable")
        return np.sort(order[: span.after])
