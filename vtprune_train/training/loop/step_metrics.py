"""Counts and speed of a step, for ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.feed import Fetched
from vtprune_train.training.loop.metrics import device_peak_flops
from vtprune_train.training.memory.track import peak_memory_bytes

# Counts of the collator that are summed over the micro-batches of a step.
COUNTED = (
    "flops",
    "flops_dense",
    "flops_selector",
    "visual_tokens",
    "visual_tokens_entering",
    "visual_tokens_leaving",
    "cache_values",
)


def counts(
    collate: Collator, batches: Sequence[PackedBatch], measured: Mapping[int, dict[str, float]], dtype: str
) -> dict[str, float]:
    """This rank's counts of a step, under the same names on every rank.

    Args:
        measured: by position, costs of those micro-batches whose costs were counted on the device.
        dtype: of the key-value cache.
    """
    names = [*COUNTED, *(f"tokens_stage_{i}" for i in range(collate.num_stages))]
    costs = [measured.get(index, batch.costs) for index, batch in enumerate(batches)]
    sums = {name: sum(cost.get(name, 0.0) for cost in costs) for name in names}
    sums["cache_bytes"] = sums.pop("cache_values") * getattr(torch, dtype).itemsize
    return {"unreadable": float(sum(len(batch.unreadable) for batch in batches)), **sums}


def waits(data_wait: float) -> dict[str, float]:
    """This rank's wait for data under its name, and 0 for all other ranks, to be summed over ranks."""
    return {f"data_wait_{rank}": data_wait * (rank == ranks.rank()) for rank in range(ranks.world_size())}


def speed(now: Fetched, totals: dict[str, float], seconds: float, device: torch.device) -> dict[str, Any]:
    """The step's time, throughput and memory; removes the :func:`waits` from ``totals``."""
    peak = device_peak_flops(device)
    return {
        "step_time": seconds,
        "data_wait": now.data_wait,
        "data_wait_share": now.data_wait / seconds,
        "data_wait_longest": max(totals.pop(f"data_wait_{rank}") for rank in range(ranks.world_size())),
        "batches_ready": now.batches_ready,
        "tokens_per_second": totals["tokens_stage_0"] / seconds,
        "mfu": totals["flops"] / seconds / (peak * ranks.world_size()) if peak else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def dropping(collate: Collator, step: int, consistency: float) -> dict[str, Any]:
    """Pruning metrics of a step: the keep ratio of each stage after the first, and, if the run has full-token steps,
    whether this is one; with a teacher, the KL divergence."""
    phases = collate.phases
    if phases is None or phases.method is None:
        return {}
    numbers: dict[str, Any] = {"keep": phases.keep(step, collate.cost.decoder.num_layers)}
    phase = phases.of(step)
    if phases.full.share:
        numbers["full_tokens"] = phase.full_tokens
    if phase.teacher is not None:
        numbers["consistency_loss"] = finite(consistency)
    return numbers


def finite(number: float) -> float | None:
    """``None`` instead of NaN and infinity, which JSON lacks."""
    return number if math.isfinite(number) else None
