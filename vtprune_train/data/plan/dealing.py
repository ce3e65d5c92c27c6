"""Deals the samples of a step to ranks and micro-steps, on the host.

Tokens BEFORE dropping determine memory: no micro-batch has more than ``max_tokens``. Cost AFTER dropping determines how
long ranks wait for each other: within each micro-step the micro-batches have about equal cost, and so do the ranks'
totals. Every rank deals every step itself and must get the same result, so the result depends only on the arguments.

Shape suffixes: N samples, B micro-batches, P pairs of micro-batches, K slots per micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

ROUNDS = 12  # maximum rounds of exchanges between micro-batches
WORTH = 1e-4  # stop after a round that reduces the step's cost by less than this share
PLACES = 64  # with more samples per micro-batch, exchanges are not needed
EVEN = 1e-3  # pairs of micro-batches that differ by less than this share of the mean cost are not changed

MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]


def deal(tokens: np.ndarray, costs: np.ndarray, world_size: int, max_tokens: int) -> MicroBatches:
    """Deal samples to ``world_size`` ranks, in the fewest micro-steps that one of two packings achieves.

    The first packing assigns the costliest samples to the cheapest micro-batches with room. If that does not fit, the
    second assigns the longest samples to the fullest micro-batch with room (best fit decreasing). Then micro-batches
    exchange samples in pairs, and micro-batches of similar cost share a micro-step, because ranks wait for each other
    at its end.

    Args:
        tokens: [N] tokens before dropping.
        costs: [N] cost after dropping, in any unit, not negative.
        world_size: number of ranks.
        max_tokens: maximum tokens of a micro-batch; no sample has more.

    Returns:
        ``micro_batches[m][r]``: positions in ``tokens`` of the samples of rank r in micro-step m, ascending; empty
        if there are fewer samples than ranks.
    """
    tokens, costs = np.asarray(tokens, dtype=np.int64), np.asarray(costs, dtype=np.float64)
    assert tokens.max(initial=0) <= max_tokens, "the planner refuses longer samples"
    micro_steps = max(1, -(-fewest_bins(tokens, max_tokens) // world_size))
    while (bin_of := _pack(tokens, costs, micro_steps * world_size, max_tokens)) is None:
        micro_steps += 1
    held = _exchange(bin_of, tokens, costs, micro_steps, world_size, max_tokens)
    return _to_ranks(held, costs, micro_steps, world_size)


def _pack(tokens: np.ndarray, costs: np.ndarray, num_bins: int, max_tokens: int) -> np.ndarray | None:
    """[N] the micro-batch of each sample, or ``None`` if neither packing fits."""
    if (bin_of := _by_cost(tokens, costs, num_bins, max_tokens)) is not None:
        return bin_of
    return _by_length(tokens, num_bins, max_tokens)


def _by_cost(tokens: np.ndarray, costs: np.ndarray, num_bins: int, max_tokens: int) -> np.ndarray | None:
    """[N] the micro-batch of each sample: the costliest samples go to the cheapest micro-batches, a few at a time;
    samples that do not fit go to the micro-batches with most room. ``None`` if that does not fit."""
    order = np.argsort(-costs, kind="stable")
    bin_of = np.full(len(tokens), -1)
    load, room = np.zeros(num_bins), np.full(num_bins, max_tokens)
    at_a_time = max(1, num_bins // 8)
    first = min(num_bins, len(order))
    chunks = [order[:first], *np.split(order[first:], np.arange(at_a_time, len(order) - first, at_a_time))]

    def put(samples: np.ndarray, bins: np.ndarray) -> None:
        bin_of[samples] = bins
        load[bins] += costs[samples]
        room[bins] -= tokens[samples]

    for chunk in chunks:
        bins = _smallest(load, len(chunk))
        fits = tokens[chunk] <= room[bins]
        put(chunk[fits], bins[fits])
    left = np.flatnonzero(bin_of < 0)
    left = left[np.argsort(-tokens[left], kind="stable")]
    while len(left):
        chunk = left[:at_a_time]
        bins = _smallest(-room, len(chunk))
        fits = tokens[chunk] <= room[bins]
        if not fits[0]:
            return None
        put(chunk[fits], bins[fits])
        left = np.concatenate([chunk[~fits], left[at_a_time:]])
    return bin_of


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` smallest keys, ascending; the first ones among equal keys."""
    if count >= len(keys):
        return np.argsort(keys, kind="stable")[:count]
    largest = np.partition(keys, count - 1)[count - 1] if count else 0
    below, equal = np.flatnonzero(keys < largest), np.flatnonzero(keys == largest)
    smallest = np.concatenate([below, equal[: count - len(below)]])
    return smallest[np.argsort(keys[smallest], kind="stable")]


def _by_length(tokens: np.ndarray, num_bins: int, max_tokens: int) -> np.ndarray | None:
    """[N] the micro-batch of each sample by best fit decreasing; ``None`` if the samples do not fit."""
    bin_of = np.full(len(tokens), -1)
    by_room = {max_tokens: list(range(num_bins))}
    rooms = [max_tokens]  # distinct amounts of free room, ascending
    for sample in np.argsort(-tokens, kind="stable").tolist():
        place = bisect_left(rooms, int(tokens[sample]))
        if place == len(rooms):
            return None
        bin_of[sample] = number = by_room[rooms[place]].pop()
        left = rooms[place] - int(tokens[sample])
        if not by_room[rooms[place]]:
            del by_room[rooms.pop(place)]
        if left not in by_room:
            insort(rooms, left)
        by_room.setdefault(left, []).append(number)
    return bin_of


def fewest_bins(tokens: np.ndarray, max_tokens: int) -> int:
    """A lower bound of the number of micro-batches (Martello and Toth's bound L2): each sample over half a micro-batch
    needs its own, and the small samples that do not fit beside these need more."""
    ascending = np.sort(tokens)
    total = np.concatenate([[0], np.cumsum(ascending)])
    half = np.searchsorted(ascending, max_tokens // 2, side="right")
    small = np.concatenate([[0], np.unique(ascending[:half])])  # thresholds below which samples are ignored
    first = np.searchsorted(ascending, small, side="left")
    alone = np.searchsorted(ascending, max_tokens - small, side="right")  # from here on, samples fit beside none
    room_beside = (alone - half) * max_tokens - (total[alone] - total[half])
    beyond = total[half] - total[first] - room_beside
    return int((len(ascending) - half + np.maximum(0, -(-beyond // max_tokens))).max())


class _Bins:
    """Micro-batches while they are balanced by swaps of samples.

    ``held`` [B, K] has the samples of each, padded with N, a sample without tokens and cost; ``load`` and ``filled``
    [B] are their cost and tokens.
    """

    def __init__(self, bin_of: np.ndarray, tokens: np.ndarray, costs: np.ndarray, num_bins: int):
        counts = np.bincount(bin_of, minlength=num_bins)
        order = np.argsort(bin_of, kind="stable")
        self.held = np.full((num_bins, int(counts.max(initial=0)) + 1), len(bin_of))
        self.held[bin_of[order], np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)] = order
        self.costs, self.tokens = np.append(costs, 0.0), np.append(tokens, 0)
        self.load, self.filled = self.costs[self.held].sum(axis=1), self.tokens[self.held].sum(axis=1)

    def even_out(self, heavy: np.ndarray, light: np.ndarray, max_tokens: int) -> None:
        """Swap, in each pair of ``heavy`` and ``light`` [P], the two samples that make their costs most equal, if a
        swap improves them; swapping with the padding moves a sample."""
        pairs = np.arange(len(heavy))
        gap = (self.load[heavy] - self.load[light]) / 2
        gives, takes = self.held[heavy], self.held[light]  # [P, K]
        shift = self.costs[gives][:, :, None] - self.costs[takes][:, None, :]  # [P, K, K]
        longer = self.tokens[gives][:, :, None] - self.tokens[takes][:, None, :]
        room, spare = max_tokens - self.filled[light], self.filled[heavy] - max_tokens
        off = np.abs(shift - gap[:, None, None])
        off[(longer > room[:, None, None]) | (longer < spare[:, None, None])] = np.inf
        pick = off.reshape(len(heavy), -1).argmin(axis=1)
        give, take = np.divmod(pick, self.held.shape[1])
        gains = off[pairs, give, take] < gap * (1 - 1e-9)
        pairs, give, take, heavy, light = pairs[gains], give[gains], take[gains], heavy[gains], light[gains]
        self.held[heavy, give], self.held[light, take] = takes[pairs, take], gives[pairs, give]
        for bins, sign in ((heavy, -1), (light, 1)):
            self.load[bins] += sign * shift[pairs, give, take]
            self.filled[bins] += sign * longer[pairs, give, take]


def _exchange(
    bin_of: np.ndarray, tokens: np.ndarray, costs: np.ndarray, micro_steps: int, world_size: int, max_tokens: int
) -> np.ndarray:
    """[B, K] the samples of each micro-batch after rounds of exchanges, which never increase the step's cost. The
    costliest micro-batch is paired with the cheapest and so on, first among all, then within each micro-step."""
    bins = _Bins(bin_of, tokens, costs, micro_steps * world_size)
    mean = float(costs.sum()) / world_size
    best, least = bins.held.copy(), _step_cost(bins.load, world_size)
    if bins.held.shape[1] > PLACES:
        return best
    for group in sorted({len(bins.load), world_size} - {1}, reverse=True):
        for _ in range(ROUNDS):
            ranked = np.argsort(-bins.load, kind="stable").reshape(-1, group)
            heavy, light = ranked[:, : group // 2].ravel(), ranked[:, : -(group // 2) - 1 : -1].ravel()
            uneven = bins.load[heavy] - bins.load[light] > EVEN * mean / micro_steps
            if not uneven.any():
                break
            bins.even_out(heavy[uneven], light[uneven], max_tokens)
            before = least
            if (cost := _step_cost(bins.load, world_size)) < least:
                best, least = bins.held.copy(), cost
            if least >= before * (1 - WORTH):
                break
    return best


def _step_cost(load: np.ndarray, world_size: int) -> float:
    """The cost of the step if ranks wait for each other after each micro-step."""
    return float(np.sort(load)[::-world_size].sum())


def _to_ranks(held: np.ndarray, costs: np.ndarray, micro_steps: int, world_size: int) -> MicroBatches:
    """Assign micro-batches of similar cost to the same micro-step; in each, the rank with the least cost so far takes
    the costliest."""
    padding = len(costs)
    load = np.append(costs, 0.0)[held].sum(axis=1)
    samples = [tuple(sorted(row)) for row in held.tolist()]
    counts = (held < padding).sum(axis=1).tolist()
    rank_load = np.zeros(world_size)
    dealt = []
    for bins in np.argsort(-load, kind="stable").reshape(micro_steps, world_size):
        ranks = np.argsort(rank_load, kind="stable")
        rank_load[ranks] += load[bins]
        of_rank = np.empty(world_size, dtype=np.int64)
        of_rank[ranks] = bins
        dealt.append(tuple(samples[number][: counts[number]] for number in of_rank.tolist()))
    return tuple(dealt)
