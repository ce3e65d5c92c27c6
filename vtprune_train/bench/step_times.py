"""Measures training steps of several recipes side by side, in one process.

All recipes take the same steps one after another, each time starting with a different recipe, so that drift of the
machine affects all of them equally. A step is what training repeats: read and collate the samples, forward, backward,
optimizer. The steps are spread over the whole training, because some recipes change their number of tokens meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtprune_train.config.settings import Config
from vtprune_train.core.stream import IGNORE, PackedBatch
from vtprune_train.data.images import image_size
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.models.patch import unprune
from vtprune_train.training.engine.start import start_distributed
from vtprune_train.training.faults.rank_failures import connect
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.feed import Fetched
from vtprune_train.training.loop.run import prepare
from vtprune_train.training.loop.trainer import Trainer

WARM_UP = 2  # steps of each recipe that are not counted


def step_times(configs: Mapping[str, Config], padded: str | None, num_steps: int) -> dict[str, list[float]]:
    """Seconds of ``num_steps`` training steps of every recipe.

    Args:
        configs: the settings of each recipe, with the same ``train.max_steps``. Their run folders are created.
        padded: name of a further row: the model of the first recipe, which must be dense, as transformers runs it, on
            padded batches of the same samples; ``None`` leaves it out.
        num_steps: steps that are counted.
    """
    device = start_distributed(next(iter(configs.values())).train.collective_timeout)
    watchdog = Watchdog(connect())
    rows: dict[str, _Row] = {name: _Row(prepare(config, device, watchdog)) for name, config in configs.items()}
    if padded is not None:
        first = next(iter(configs.values()))
        folder = {"run": first.run.model_copy(update={"name": f"{first.run.name}_padded"})}
        rows[padded] = _PaddedRow(prepare(first.model_copy(update=folder), device, watchdog))
    total = next(iter(rows.values())).trainer.total_steps
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for number, step in enumerate([0] * WARM_UP + spread(total, num_steps)):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            began = time.perf_counter()
            rows[name].step(step)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    watchdog.close()
    return seconds


def spread(total: int, count: int, seed: int = 0) -> list[int]:
    """``count`` of ``total`` steps in ascending order: one at random from each of ``count`` equal parts, so that a
    recipe whose steps differ periodically is not sampled at its period."""
    offsets = np.random.default_rng(seed).random(count)
    return [int(total * (part + offset) / count) for part, offset in enumerate(offsets)]


class _Row:
    """A recipe."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.engine.train()

    def step(self, number: int) -> None:
        """One training step."""
        self.trainer.single_step(self._fetch(number))

    def _fetch(self, number: int) -> Fetched:
        """The batches of a step."""
        trainer = self.trainer
        loader = StepLoader(
            trainer.collate, trainer.planner, first_step=number, end_step=number + 1, rank=0, workers=0,
            device=trainer.device,
        )  # fmt: skip
        [(plan, batches)] = loader
        return Fetched(plan, batches, 0.0, None)


class _PaddedRow(_Row):
    """The dense model in transformers' own code, on padded batches. The samples are read and packed in the same way, so
    that only the model's time differs."""

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        unprune(trainer.engine.module)

    def step(self, number: int) -> None:
        engine, now = self.trainer.engine, self._fetch(number)
        supervised = sum(len(batch.targets) for batch in now.batches)
        for index, (packed, samples) in enumerate(zip(now.batches, now.plan.micro_batches, strict=True)):
            with engine.accumulate(last=index == len(now.batches) - 1):
                sizes = image_sizes(self.trainer.collate, samples[0])
                output = engine(**padded_batch(packed, sizes), use_cache=False)
                engine.backward(output.loss * (len(packed.targets) / supervised))
        engine.squared_grad_norm()
        engine.step()


def image_sizes(collate: Collator, samples: Sequence[int]) -> list[tuple[int, int]]:
    """``(height, width)`` of the images of samples, in order."""
    index = collate.index
    files = [file for sample in samples for file in index.files(sample, index.record(sample))]
    return [image_size(file.source) for file in files if not isinstance(file.source, tuple)]  # tuples: videos


def padded_batch(batch: PackedBatch, image_sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Inputs of a transformers LLaVA-NeXT for a packed dense batch: ``input_ids``, ``attention_mask`` and ``labels``
    [S, longest], padded on the right, and the pixels.

    Args:
        batch: a batch in which nothing is dropped.
        image_sizes: (height, width) of its images.
    """
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels[batch.plan.predict_rows + 1] = batch.targets
    lengths = list(batch.plan.stages[0].segment_lengths)

    def pad(values: Tensor, filling: int) -> Tensor:
        return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=filling)

    return {
        "input_ids": pad(batch.input_ids, 0),
        "attention_mask": pad(torch.ones_like(batch.input_ids), 0),
        "labels": pad(labels, IGNORE),
        "pixel_values": batch.pixel_values,
        "image_sizes": torch.tensor(image_sizes),
    }
