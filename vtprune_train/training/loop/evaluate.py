"""Held-out evaluation: loss, and greedy exact match by teacher forcing.

An answer counts if the most likely token is right at every position. This gives the same result as greedy decoding, in
a single forward pass: the first wrong token ends the match in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.order import EpochOrder
from vtprune_train.data.plan.planner import Planner
from vtprune_train.training import distributed as ranks


def evaluate(
    model: nn.Module,
    collate: Collator,
    *,
    max_tokens: int,
    device: torch.device,
    workers: int,
    mark: Callable[[str], None],
    worker_timeout: float | None = None,
    shuffle_images: bool = False,
) -> dict[str, float]:
    """Evaluate on all samples of ``collate.index``; all ranks call this together.

    Args:
        model: pruned model; its train/eval mode is restored.
        max_tokens: maximum number of tokens per batch, before dropping.
        mark: watchdog callback, called for every batch.
        worker_timeout: seconds after which a decode process counts as hung.
        shuffle_images: pair each sample with the images and videos of another sample, to measure how well the model
            does without the right ones.

    Returns:
        ``loss`` (mean over supervised tokens), ``exact_match`` (share of answers), ``answers``, and ``unreadable``,
        number of samples skipped because an image could not be read.
    """
    image_samples = exchange_images(collate) if shuffle_images else None
    loader = _loader(
        collate, max_tokens, device=device, workers=workers, timeout=worker_timeout, image_samples=image_samples
    )
    was_training = model.training
    model.eval()
    sums = {"loss_sum": 0.0, "tokens": 0.0, "exact": 0.0, "answers": 0.0, "unreadable": 0.0}
    with torch.no_grad():
        for _, batches in loader:
            for batch in batches:
                mark("evaluating")
                for name, value in _sums(model, batch, device).items():
                    sums[name] += value
    model.train(was_training)
    total = ranks.sum_over_ranks(sums, device)
    return {
        "loss": total["loss_sum"] / max(total["tokens"], 1),
        "exact_match": total["exact"] / max(total["answers"], 1),
        "answers": total["answers"],
        "unreadable": total["unreadable"],
    }


def _sums(model: nn.Module, batch: PackedBatch, device: torch.device) -> dict[str, float]:
    """Sums contributed by one batch."""
    for sample, reason in batch.unreadable:
        ranks.log.warning("evaluation: left out %s: %s", sample, reason)
    batch = batch.to(device)
    output = model(batch)
    exact = torch.ones(batch.num_answers, device=device)
    exact.scatter_reduce_(0, batch.answer_of_target, output.correct.float(), reduce="amin")
    loss_sum, num_exact = torch.stack([output.loss_sum.float(), exact.sum()]).tolist()  # the only device-to-host copy
    return {
        "loss_sum": loss_sum,
        "tokens": len(batch.targets),
        "exact": num_exact,
        "answers": batch.num_answers,
        "unreadable": len(batch.unreadable),
    }


def _loader(collate: Collator, max_tokens: int, **loading: Any) -> StepLoader:
    """All samples once, in batches of about ``max_tokens`` per rank; ``loading`` is passed to :class:`StepLoader`."""
    index = collate.index
    batch_size = max(1, min(len(index), ranks.world_size() * max_tokens * len(index) // index.total_tokens))

    def measure(_: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = index.lengths(samples).tokens
        return tokens, tokens.astype(np.float64)

    planner = Planner(
        EpochOrder([len(index)], seed=0),
        measure,
        longest=index.longest,
        global_batch_size=batch_size,
        max_tokens=max(max_tokens, index.longest),
        world_size=ranks.world_size(),
    )
    return StepLoader(collate, planner, first_step=0, end_step=planner.steps_per_epoch, rank=ranks.rank(), **loading)


def exchange_images(collate: Collator) -> Sequence[int]:
    """Map each sample to a different one with the same numbers of images and videos in the same order, using a fixed
    derangement (if there are at least two)."""
    samples = np.arange(len(collate.index))
    kinds = np.array(_kinds(collate, samples))
    partner = samples.copy()
    for kind in np.unique(kinds):
        members = np.random.default_rng(0).permutation(np.flatnonzero(kinds == kind))
        partner[members] = np.roll(members, 1)
    return partner.tolist()


def _kinds(collate: Collator, samples: np.ndarray) -> list[str]:
    """The kinds of each sample's images and videos, in order. Those of data with videos are read from the records,
    because the index counts the frames of InternVL's videos as images."""
    index = collate.index
    if collate.layout.video is None:
        span_sample = index.lengths(samples).span_sample
        return ["image " * count for count in np.bincount(span_sample, minlength=len(samples)).tolist()]
    return [" ".join(file.kind for file in index.files(sample, index.record(sample))) for sample in samples.tolist()]
