"""Batches of global steps, decoded by worker processes in the planner's order."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtprune_train.data.collate import Collator
from vtprune_train.data.planner import Planner, StepPlan
from vtprune_train.stream import PackedBatch, map_leaves


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one rank in one micro-step of ``step``, and whose pictures they get (their own if ``None``)."""

    step: int
    samples: tuple[int, ...]
    pictures_of: tuple[int, ...] | None = None


@dataclass
class _Parcel:
    """A batch on its way from a worker: pixels in shared memory, the many small tensors as one string of bytes. (In
    shared memory each would cost a file descriptor and a connection, and pickled as a tensor ten times an array.)"""

    small: bytes
    pixel_values: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> _Parcel:
        pixels = batch.pixel_values
        small = replace(batch, pixel_values=pixels.new_empty(0))
        return cls(pickle.dumps(map_leaves(small, Tensor, Tensor.numpy)), pixels)

    def open(self) -> PackedBatch:
        small = map_leaves(pickle.loads(self.small), np.ndarray, torch.from_numpy)
        return replace(small, pixel_values=self.pixel_values)

    def pin_memory(self) -> PackedBatch:
        return self.open().pin_memory()


class _Decoded(Dataset):
    def __init__(self, collate: Collator):
        self.collate = collate

    def __getitem__(self, micro_batch: MicroBatch) -> _Parcel:  # type: ignore[override]
        return _Parcel.of(self.collate(micro_batch.samples, micro_batch.pictures_of, step=micro_batch.step))


class _Order:
    """The micro-batches of one rank, step after step."""

    def __init__(self, plans: Sequence[int], planner: Planner, rank: int, pictures: Any):
        self.steps, self.planner, self.rank, self.pictures = plans, planner, rank, pictures

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            for ranks in self.planner.plan(step).micro_batches:
                samples = ranks[self.rank]
                pictures = None if self.pictures is None else tuple(self.pictures[s] for s in samples)
                yield MicroBatch(step, samples, pictures)

    def __len__(self) -> int:
        return sum(len(self.planner.plan(step).micro_batches) for step in self.steps)


def _unchanged(parcel: _Parcel) -> _Parcel:
    return parcel


def _opened(arrived: _Parcel | PackedBatch) -> PackedBatch:
    return arrived.open() if isinstance(arrived, _Parcel) else arrived


def _outlive_sigterm(worker: int) -> None:
    """Launchers and schedulers send SIGTERM to every process. A rank answers with a checkpoint, and needs its workers
    for the step it is in; they end only when their own rank tells them to."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StepLoader:
    """Iterates over ``(plan, batches)`` of global steps ``[first_step, end_step)`` for one rank.

    Args:
        collate: samples to batches; runs in the workers.
        planner: which samples.
        rank: this rank.
        workers: decode processes; 0 decodes in this one.
        device: batches for CUDA are pinned.
        pictures_of: whose pictures each sample gets, by sample index; its own if ``None``.
    """

    def __init__(
        self,
        collate: Collator,
        planner: Planner,
        *,
        first_step: int,
        end_step: int,
        rank: int,
        workers: int,
        device: torch.device,
        pictures_of: Sequence[int] | None = None,
    ):
        self.steps = range(first_step, end_step)
        self.planner = planner
        self.loader = DataLoader(
            _Decoded(collate),
            batch_size=None,
            sampler=_Order(self.steps, planner, rank, pictures_of),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=_outlive_sigterm,
        )

    def __iter__(self) -> Iterator[tuple[StepPlan, list[PackedBatch]]]:
        batches = iter(self.loader)
        for step in self.steps:
            plan = self.planner.plan(step)
            yield plan, [_opened(next(batches)) for _ in plan.micro_batches]
