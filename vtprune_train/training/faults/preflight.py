"""Before the first step: does the worst micro-batch fit into memory?

Leaves parameters, optimizer, gradients and random states unchanged.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from vtprune_train.config.settings import Config
from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.index import SampleIndex
from vtprune_train.models.forward.recompute import Level, typical_stages
from vtprune_train.training import distributed as ranks
from vtprune_train.training.engine.settings import engine_config, offloads_optimizer, zero_stage
from vtprune_train.training.faults.trainer import Trainer
from vtprune_train.training.memory.predict import GIB, Estimate, MicroBatch
from vtprune_train.training.memory.track import peak_memory_bytes, track_allocations

log = logging.getLogger(__name__)

STEPS_LOOKED_AT = 64  # steps that are planned to see whether any has several micro-batches
LOOKED_AT = 1 << 20  # chunk size: number of samples whose lengths are held in memory
# Out-of-memory messages of allocators that raise a generic exception.
NO_MEMORY = ("out of memory", "defaultcpuallocator", "alloc_failed", "not enough memory", "cannot allocate memory")


class MemoryShortageError(ValueError):
    """The worst micro-batch does not fit into this rank's memory. The state of the other ranks is unknown."""


def needs_preflight(config: Config, device: torch.device) -> bool:
    """Whether to run the preflight check; ``auto`` enables it on GPUs. (Running out of host memory kills the process
    without an exception.)"""
    return config.train.preflight == "always" or (config.train.preflight == "auto" and device.type == "cuda")


def preflight(trainer: Trainer) -> None:
    """Run forward and backward on the worst micro-batches while reserving memory for the optimizer states, then
    allocate what the optimizer step will need in addition. All ranks call this together, with the same micro-batches.

    Raises:
        MemoryShortageError: this rank does not have enough memory; the message lists settings to change.
    """
    engine, device = trainer.engine, trainer.device
    step = densest_step(trainer)
    steps = range(trainer.state.step, min(trainer.state.step + STEPS_LOOKED_AT, trainer.end_step))
    worst, accumulates = ranks.from_rank_0(
        lambda: (worst_micro_batches(trainer), any(len(trainer.planner.plan(step).micro_batches) > 1 for step in steps))
    )
    batches = [trainer.collate(samples, step=step) for samples in worst]
    if accumulates and len(batches) == 1:
        batches *= 2
    estimate = heaviest_estimate(trainer, batches, accumulates)
    predicted = estimate.at(trainer.config.train.activation_checkpointing, accumulates)
    engine.train()
    with unchanged_random_states(device):
        try:
            with track_allocations(device) as memory:
                held_back = engine.missing_states()
                for number, batch in enumerate(batches):
                    boundary = number == len(batches) - 1 or not accumulates
                    with memory.phase("backward"), engine.accumulate(last=boundary):
                        engine.backward(engine(batch.to(device)).loss_sum)
                    if boundary:
                        with memory.phase("step"):  # allocate all at once, then free
                            [torch.empty(size, dtype=torch.uint8, device=device) for size in predicted.states.step]
                        engine.zero_grad()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fitting = estimate.least_that_fits(memory_bytes(device))
            raise MemoryShortageError(advice(trainer.config, batches, device, error, fitting)) from error
    peaks = [max(peaks) for peaks in zip(*ranks.gather((memory.peaks["backward"], memory.peaks["step"])), strict=True)]
    log.info(
        "preflight: %s fit: peak %s of %s (%s in the backward pass, predicted %s; %s in the optimizer step, predicted "
        "%s), with %s reserved for optimizer states",
        describe(batches), readable(max(peaks)), readable(memory_bytes(device)),
        readable(peaks[0]), readable(predicted.backward), readable(peaks[1]), readable(predicted.stepping),
        readable(sum(tensor.nbytes for tensor in held_back)),
    )  # fmt: skip
    if device.type == "cuda":
        log.info("preflight: %s", estimate.advice(memory_bytes(device)))
        del held_back
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def heaviest_estimate(trainer: Trainer, batches: Sequence[PackedBatch], accumulates: bool) -> Estimate:
    """Memory estimate for the heaviest micro-batch."""
    config, model, collate = trainer.config, trainer.engine.module, trainer.collate
    num_layers = model.config.get_text_config().num_hidden_layers
    drops = collate.method.drops(num_layers) if collate.method is not None else ()
    order, settings = typical_stages(collate.layout, drops, num_layers), engine_config(config)
    sizes = [MicroBatch.of(batch) for batch in batches]
    estimates = [Estimate.of(config, model, settings, ranks.world_size(), size, order) for size in sizes]
    level = config.train.activation_checkpointing
    return max(estimates, key=lambda estimate: estimate.at(level, accumulates).peak)


def densest_step(trainer: Trainer) -> int:
    """Return the upcoming step that keeps the most tokens."""
    phases, first = trainer.collate.phases, trainer.state.step
    if phases is None or not phases.vary:
        return first
    return phases.densest(first, trainer.end_step)


def worst_micro_batches(trainer: Trainer) -> list[list[int]]:
    """Micro-batches with the highest decoder load (text is never dropped) and vision-tower load (tiles)."""
    index: SampleIndex = trainer.collate.index
    near = {name: np.zeros(0, dtype=np.int64) for name in ("text", "tiles")}
    most, limit = trainer.config.train.global_batch_size, trainer.config.data.max_tokens
    for start in range(0, len(index), LOOKED_AT):  # bounded memory: merge the best so far with the next chunk
        piece = np.arange(start, min(start + LOOKED_AT, len(index)))
        samples = np.concatenate([np.union1d(*near.values()), piece])
        lengths = index.lengths(samples)
        near = {name: samples[foremost(getattr(lengths, name), lengths.tokens, 8 * most)] for name in near}
    selections: list[list[int]] = []
    for name, samples in near.items():
        lengths = index.lengths(samples)
        weight = getattr(lengths, name)
        if weight.any():
            selections.append(sorted(samples[heaviest(lengths.tokens, weight, limit, most)].tolist()))
    return [samples for number, samples in enumerate(selections) if samples not in selections[:number]]


def foremost(weight: np.ndarray, tokens: np.ndarray, number: int) -> np.ndarray:
    """Sorted indices of the samples with the highest weight and of those with the highest weight per token, ``number``
    of each."""
    keys = (weight, weight / np.maximum(tokens, 1))
    return np.unique(np.concatenate([np.argsort(-key, kind="stable")[:number] for key in keys]))


def heaviest(tokens: np.ndarray, weight: np.ndarray, max_tokens: int, most: int) -> list[int]:
    """Greedily select at most ``most`` samples with large total ``weight`` [samples] whose ``tokens`` [samples] (before
    dropping) fit into ``max_tokens``; tries ordering by weight and by weight per token and returns the heavier
    result."""

    def fill(key: np.ndarray) -> list[int]:
        selected: list[int] = []
        room = max_tokens
        for sample in np.argsort(-key, kind="stable").tolist():
            if tokens[sample] <= room and len(selected) < most:
                selected.append(sample)
                room -= int(tokens[sample])
        return sorted(selected)

    return max((fill(weight), fill(weight / np.maximum(tokens, 1))), key=lambda samples: int(weight[samples].sum()))


@contextmanager
def unchanged_random_states(device: torch.device) -> Iterator[None]:
    """Context manager that restores all RNG states."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def memory_bytes(device: torch.device) -> int:
    """Total memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def readable(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{1024 * size / GIB:.2f} MiB"


def describe(batches: Sequence[PackedBatch]) -> str:
    distinct = {id(batch): batch for batch in batches}.values()
    parts = [
        f"{len(b.sample_ids)} samples with {len(b.input_ids)} tokens, {MicroBatch.of(b).tiles} tiles or patches"
        for b in distinct
    ]
    return "worst micro-batches (" + "; ".join(parts) + ")"


def advice(
    config: Config, batches: Sequence[PackedBatch], device: torch.device, error: BaseException, fitting: Level | None
) -> str:
    """Describe the failure and list the settings that can still be changed; ``fitting`` is the recomputation level that
    is estimated to fit."""
    settings = config.deepspeed_config()
    stage = zero_stage(settings)
    ways = [f"lower data.max_tokens={config.data.max_tokens} (at least data.max_length={config.data.max_length})"]
    if config.train.activation_checkpointing != "all":
        level = "all" if fitting in (None, config.train.activation_checkpointing) else fitting
        ways.append(f"set train.activation_checkpointing={level}{' (estimated to fit)' if fitting == level else ''}")
    if stage < 3:
        ways.append(f"use a higher ZeRO stage (now {stage}): deepspeed=configs/deepspeed/zero{max(2, stage + 1)}.json")
    if not offloads_optimizer(settings):
        ways.append("move optimizer states to host memory with deepspeed=configs/deepspeed/zero3_offload.json")
    if len(config.model.train) > 1:
        ways.append("train fewer parts (model.train), or use LoRA for the language model")
    return (
        f"out of memory before the first step on rank {ranks.rank()}: {describe(batches)} do not fit "
        f"(peak {readable(peak_memory_bytes(device))}, {device} has {readable(memory_bytes(device))})\n"
        + "\n".join(f"- {way}" for way in ways)
        + f"\ntrain.preflight=never skips this check. Allocator error: {str(error).splitlines()[0]}"
    )
