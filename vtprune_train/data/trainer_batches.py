"""Micro-batches by token budget for transformers' Trainer, TRL, accelerate and custom loops.

A packed or pruned model computes no padding, so samples of any lengths can share a micro-batch. What limits a
micro-batch is the number of its tokens (memory), and what makes ranks wait for each other is its cost after dropping.
:func:`batch_by_tokens` changes a Trainer so that every optimizer step has the samples it would have had, dealt to the
ranks in micro-batches of at most ``max_tokens`` tokens and of about equal cost, the same number on each rank.
:class:`StepLoader` is the data loader behind it, for loops of your own.

Shape suffixes: N samples, S images and videos, L tokens.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from vtprune_train.core.flops import DecoderGeometry, TrainingCost, layers_per_stage, stage_lengths
from vtprune_train.core.stream import IGNORE
from vtprune_train.data.plan.dealing import deal
from vtprune_train.files.disk import replace_synced
from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of
from vtprune_train.models.forward.calls import is_pruned, unwrapped
from vtprune_train.models.patch import method_of

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]
MICRO_BATCHES = "micro_batches"
WORKER_SETTINGS = (
    "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "worker_init_fn",
    "in_order",
)  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Token counts of the samples of a dataset, as :func:`measure_lengths` returns them.

    Args:
        text: [N] int64, text tokens of each sample.
        supervised: [N] int64, labels that count in the loss.
        spans: [S] int64, visual tokens of each image or video.
        span_sample: [S] int64, the sample that each image or video belongs to.
    """

    text: np.ndarray
    supervised: np.ndarray
    spans: np.ndarray
    span_sample: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    @property
    def tokens(self) -> np.ndarray:
        """[N] int64, all tokens of each sample before dropping."""
        return self.text + np.bincount(self.span_sample, weights=self.spans, minlength=len(self)).astype(np.int64)

    def costs(self, model: HFModule) -> np.ndarray:
        """[N] float64, training FLOPs of each sample in the decoder and the head, after the drops of ``model``,
        which must be packed or pruned."""
        method, config = method_of(model), unwrapped(model).config.get_text_config()
        drops = () if method is None else method.drops(config.num_hidden_layers)
        cost = TrainingCost(DecoderGeometry.of(config), None, trains_decoder=True, trains_tower=False)
        stages = stage_lengths(self.text, self.spans, self.span_sample, drops)
        return cost.text(stages, layers_per_stage(drops, config.num_hidden_layers), self.supervised)

    def save(self, path: str | Path) -> None:
        """Write to an ``.npz`` file."""
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        replace_synced(Path(path), file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Lengths:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is another file, or damaged.
        """
        try:
            with np.load(path) as stored:
                return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold lengths ({error}); delete it to measure them again") from error


def measure_lengths(
    model: HFModule, dataset: Any, collate: Collate, *, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> Lengths:
    """Count the tokens of every sample by collating each once, alone.

    That processes every image once. For a large dataset, save the result and pass it to :func:`batch_by_tokens` or
    :class:`StepLoader` in later runs. With several ranks, each measures its share of the samples, and all return the
    whole.

    Args:
        model: a model of a supported family; it tells which token ids are visual.
        dataset: a map-style dataset.
        collate: turns a list of samples into a batch with ``input_ids``, ``labels`` and, if padded, ``attention_mask``.
        num_workers: processes that load samples.
        rank, world_size: of this process; with several, ``torch.distributed`` must be initialized.

    Raises:
        ValueError: a batch has no ``input_ids`` or no ``labels``.
    """
    config = unwrapped(model).config
    family_of(unwrapped(model))
    visual = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    count = _Count([token for token in visual if token is not None], collate)
    share = range(rank, len(dataset), world_size)
    loader = DataLoader(
        torch.utils.data.Subset(dataset, share), batch_size=1, collate_fn=count, num_workers=num_workers
    )
    measured = [(number, *counts) for number, counts in zip(share, loader, strict=True)]
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(shares, measured)
        measured = sorted(chain.from_iterable(shares))
    return Lengths(
        np.array([text for _, text, _, _ in measured], dtype=np.int64),
        np.array([supervised for _, _, supervised, _ in measured], dtype=np.int64),
        np.array([length for *_, spans in measured for length in spans], dtype=np.int64),
        np.array([number for number, *_, spans in measured for _ in spans], dtype=np.int64),
    )


@dataclass(frozen=True)
class _Count:
    """Counts the tokens of one sample; picklable, for worker processes."""

    visual_tokens: list[int]
    collate: Collate

    def __call__(self, samples: list[Any]) -> tuple[int, int, list[int]]:
        batch = self.collate(samples)
        labels = _labels(batch)
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        visual = torch.isin(ids, torch.tensor(self.visual_tokens)) & mask
        edges = np.diff(np.pad(visual.numpy().astype(np.int8), ((0, 0), (1, 1))), axis=1)
        starts, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
        spans = (ends[1] - starts[1]).tolist()
        return int(mask.sum()) - sum(spans), int((labels[:, 1:] != IGNORE).sum()), spans


def _labels(batch: Any) -> Tensor:
    for name in ("input_ids", "labels"):
        if not isinstance(batch, Mapping) or name not in batch:
            found = f"keys: {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"the collator returned a batch without {name!r} ({found}); batches by tokens need input_ids and "
                "labels, as collators for supervised fine-tuning return them"
            )
    return batch["labels"]


def _check(model: HFModule, dataset: Any, max_tokens: int) -> None:
    if not is_pruned(model):
        raise ValueError("batches by tokens need a model that computes no padding: call pack(model) or prune(model)")
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length; batches by tokens need a map-style dataset")
    _check_positive("max_tokens", max_tokens)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive whole number")


class Step(NamedTuple):
    """The samples of this rank's micro-batches in an optimizer step, and the supervised tokens on all ranks."""

    micro_batches: tuple[tuple[int, ...], ...]
    supervised: int


class StepSampler(Sampler[list[Step]]):
    """Yields a list with one :class:`Step` for each optimizer step (a list, because that is what a batch sampler
    yields).

    Args:
        order: a sampler of single samples; the order of an epoch. If it has ``set_epoch``, that is called.
        lengths: of the samples.
        costs: [N] cost of each sample after dropping.
        batch_size: samples of one optimizer step on all ranks together.
        max_tokens: maximum tokens of a micro-batch.
        rank, world_size: of this process.
        drop_last: leave out the last step of an epoch if it has fewer samples.

    Raises:
        ValueError: a sample has more than ``max_tokens`` tokens, or there are too few samples.
    """

    def __init__(
        self,
        order: Sampler[int],
        lengths: Lengths,
        costs: np.ndarray,
        *,
        batch_size: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ):
        tokens = lengths.tokens
        longest = int(tokens.argmax()) if len(tokens) else 0
        if not len(tokens):
            raise ValueError("there are no samples to train on")
        if tokens[longest] > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the {tokens[longest]} tokens of sample {longest}; raise it, or "
                "remove samples that are too long"
            )
        if drop_last and len(tokens) < batch_size:
            raise ValueError(
                f"an optimizer step takes {batch_size} samples, but there are only {len(tokens)}, and the last, "
                "incomplete step of an epoch is dropped"
            )
        self.order, self.tokens, self.supervised, self.costs = order, tokens, lengths.supervised, costs
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.tokens) // self.batch_size if self.drop_last else -(-len(self.tokens) // self.batch_size)

    def __iter__(self) -> Iterator[list[Step]]:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(self.epoch)
        samples = [list(self.order)]
        if self.world_size > 1 and torch.distributed.is_initialized():  # the order of rank 0 counts
            torch.distributed.broadcast_object_list(samples)
        for step in range(len(self)):
            chosen = np.array(samples[0][step * self.batch_size : (step + 1) * self.batch_size])
            dealt = deal(self.tokens[chosen], self.costs[chosen], self.world_size, self.max_tokens)
            micro_batches = tuple(tuple(chosen[list(ranks[self.rank])].tolist()) for ranks in dealt)
            yield [Step(micro_batches, int(self.supervised[chosen].sum()))]
        self.epoch += 1


class _Seeded(RandomSampler):
    """A random order that depends only on seed and epoch."""

    def __init__(self, dataset: Any, seed: int):
        super().__init__(dataset, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


@dataclass(frozen=True)
class _Steps(Dataset):  # type: ignore[type-arg]
    """Loads all micro-batches of an optimizer step of this rank as one item."""

    samples: Any
    collate: Collate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, step: Step) -> dict[str, Any]:
        batches = [self._load(samples) for samples in step.micro_batches]
        # Trainer counts supervised labels in [..., 1:] and tokens in input_ids.
        counted = [torch.tensor([IGNORE]), *(_labels(batch)[:, 1:].reshape(-1) for batch in batches)]
        return {
            MICRO_BATCHES: batches,
            "supervised": [int((_labels(batch)[:, 1:] != IGNORE).sum()) for batch in batches],
            "num_items_in_batch": step.supervised,
            "labels": torch.cat(counted),
            "input_ids": torch.cat([batch["input_ids"].reshape(-1) for batch in batches]),
        }

    def _load(self, samples: tuple[int, ...]) -> dict[str, Any]:
        """A micro-batch. A rank without samples gets sample 0 without labels, because all ranks must run the same
        number of passes."""
        batch = dict(self.collate([self.samples[number] for number in samples or (0,)]))
        if not samples:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return batch


def _only(items: list[Any]) -> Any:
    return items[0]


class StepLoader(DataLoader):  # type: ignore[type-arg]
    """Data loader that returns all micro-batches of one optimizer step at a time, for custom loops::

        loader = StepLoader(model, dataset, collate, batch_size=128, max_tokens=16384)
        for epoch in range(2):
            loader.set_epoch(epoch)
            for step in loader:
                for batch in step["micro_batches"]:
                    model(**batch, num_items_in_batch=step["num_items_in_batch"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    ``num_items_in_batch`` is the number of supervised tokens of the step on all ranks. If gradients are averaged over
    the ranks (DDP, DeepSpeed), multiply the loss by the number of ranks.

    To resume in the middle of an epoch, skip steps with ``accelerate.skip_first_batches(loader, steps)``.

    Args:
        model: the packed or pruned model; its family tells which tokens are visual, its method what they cost.
        dataset: a map-style dataset.
        collate: turns a list of samples into a batch with ``input_ids``, ``labels`` and the other model inputs.
        batch_size: samples of one optimizer step on all ranks together.
        max_tokens: maximum tokens (before dropping) of a micro-batch, without padding.
        lengths: from :func:`measure_lengths`; measured now if ``None``.
        order: a sampler for the order of the samples; shuffled by ``seed`` and epoch if ``None``.
        shuffle, seed: shuffle the samples if there is no ``order``.
        rank, world_size: of this process; read from ``torch.distributed`` if ``None``.
        drop_last: leave out the last step of an epoch if it has fewer samples.
        kwargs: further arguments of :class:`torch.utils.data.DataLoader`, such as ``num_workers``.

    Raises:
        ValueError: the model is not packed or pruned, a sample has more than ``max_tokens`` tokens, ``lengths`` are of
            another dataset, or the batches lack ``input_ids`` or ``labels``.
    """

    def __init__(
        self,
        model: HFModule,
        dataset: Any,
        collate: Collate,
        *,
        batch_size: int,
        max_tokens: int,
        lengths: Lengths | None = None,
        order: Sampler[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        **kwargs: Any,
    ):
        _check(model, dataset, max_tokens)
        _check_positive("batch_size", batch_size)
        initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None or world_size is None:
            rank = torch.distributed.get_rank() if initialized else 0
            world_size = torch.distributed.get_world_size() if initialized else 1
        if lengths is None:
            log.info("counting the tokens of %d samples", len(dataset))
            workers = kwargs.get("num_workers", 0)
            ranks = {"rank": rank, "world_size": world_size} if initialized else {}
            lengths = measure_lengths(model, dataset, collate, num_workers=workers, **ranks)
        if len(lengths) != len(dataset):
            raise ValueError(f"lengths are of {len(lengths)} samples, but the dataset has {len(dataset)}")
        if order is None:
            order = _Seeded(dataset, seed) if shuffle else SequentialSampler(dataset)
        self.lengths = lengths
        sampler = StepSampler(
            order,
            lengths,
            lengths.costs(model),
            batch_size=batch_size,
            max_tokens=max_tokens,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        super().__init__(_Steps(dataset, collate), batch_sampler=sampler, collate_fn=_only, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def batch_by_tokens(trainer: Trainer, max_tokens: int, *, lengths: Lengths | str | Path | None = None) -> Trainer:
    """Let a transformers Trainer (or a subclass such as TRL's SFTTrainer) form its micro-batches by tokens::

        pack(model)  # or prune(model, ...)
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
        batch_by_tokens(trainer, max_tokens=16384)
        trainer.train()

    An optimizer step still has ``per_device_train_batch_size * gradient_accumulation_steps * ranks`` samples, chosen by
    the Trainer's own sampler. They are dealt to as few micro-batches as ``max_tokens`` allows, with about equal cost
    after dropping in each micro-step, the same number on each rank. The loss of a step is the sum over all its
    supervised tokens on all ranks, divided by their number. (For models that do not take ``num_items_in_batch``, such
    as Qwen2.5-VL, the plain Trainer averages the means of the micro-batches instead.) Resuming with
    ``resume_from_checkpoint`` continues with the same samples.

    Call it before ``train()``. It sets ``gradient_accumulation_steps`` to 1, because a step is now one item of the data
    loader, and multiplies ``per_device_train_batch_size`` by the previous value.

    Args:
        trainer: the trainer; changed in place. Its model must be packed or pruned.
        max_tokens: maximum tokens (before dropping) of a micro-batch, without padding. What fits depends on the GPU; a
            good start is the number of tokens, padding included, of the largest micro-batch that fits now.
        lengths: from :func:`measure_lengths`, or a file: read if it exists, otherwise written after measuring.
            ``None``: measured at the start of ``train()``, which loads every sample once.

    Returns:
        ``trainer``.

    Raises:
        ValueError: the model is not packed or pruned, the dataset is iterable, the Trainer uses a setting that is not
            supported (see below), or it was changed already. In ``train()``: the errors of :class:`StepLoader`, or a
            sampler that forms batches itself.

    Not supported: DataParallel; tensor, context and sequence parallelism; ``auto_find_batch_size``; on several ranks,
    ``average_tokens_across_devices=False``.
    """
    if not hasattr(trainer, "get_train_dataloader"):
        raise ValueError(
            f"{type(trainer).__name__} is not a transformers Trainer; pass the trainer that holds the model, or use "
            "StepLoader in a loop of your own"
        )
    arguments = trainer.args
    if MICRO_BATCHES in trainer.__dict__:
        raise ValueError("this trainer forms its micro-batches by tokens already")
    _check(trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset, max_tokens)
    _check_trainer(trainer)
    arguments.per_device_train_batch_size *= arguments.gradient_accumulation_steps
    trainer._train_batch_size *= arguments.gradient_accumulation_steps
    arguments.gradient_accumulation_steps = 1
    trainer.__dict__[MICRO_BATCHES] = max_tokens
    trainer.get_train_dataloader = partial(  # type: ignore[method-assign]
        _train_dataloader, trainer, trainer.get_train_dataloader, max_tokens, lengths
    )
    trainer.training_step = partial(_training_step, trainer, trainer.training_step)  # type: ignore[method-assign]
    return trainer


def _check_trainer(trainer: Trainer) -> None:
    """Reject settings with which the Trainer would count samples, ranks or tokens differently."""
    arguments = trainer.args
    if arguments.n_gpu > 1:
        raise ValueError(
            f"the Trainer uses DataParallel on {arguments.n_gpu} GPUs; start one process per GPU with torchrun or "
            "accelerate launch"
        )
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(f"{name} parallelism (of {size} ranks) is not supported; use data parallelism, or ZeRO")
    if arguments.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True would change the number of samples in an optimizer step, but not max_tokens; "
            "set it to False, and lower max_tokens if memory runs out"
        )
    if arguments.world_size > 1 and not arguments.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False is not supported on several ranks, whose micro-batches have different "
            "numbers of supervised tokens; leave it at True"
        )


def _train_dataloader(
    trainer: Trainer,
    original: Callable[[], DataLoader],  # type: ignore[type-arg]
    max_tokens: int,
    lengths: Lengths | str | Path | None,
) -> StepLoader:
    """Replaces ``trainer.get_train_dataloader``. The original loader has the dataset and the collator without columns
    that the model does not take, and the settings of the workers."""
    plain, arguments = original(), trainer.args
    return StepLoader(
        trainer.accelerator.unwrap_model(trainer.model),
        plain.dataset,
        plain.collate_fn,
        batch_size=trainer._train_batch_size * arguments.world_size,
        max_tokens=max_tokens,
        lengths=_stored(lengths, trainer, plain),
        order=_order(plain),
        rank=arguments.process_index,
        world_size=arguments.world_size,
        drop_last=arguments.dataloader_drop_last,
        **{name: getattr(plain, name) for name in WORKER_SETTINGS},
    )


def _training_step(
    trainer: Trainer,
    original: Callable[..., Tensor],
    model: HFModule,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Replaces ``trainer.training_step``: runs the original for every micro-batch, and reduces gradients after the
    last."""
    micro_batches, losses = inputs[MICRO_BATCHES], []
    for number, (batch, supervised) in enumerate(zip(micro_batches, inputs["supervised"], strict=True), start=1):
        last = number == len(micro_batches)
        if num_items_in_batch is None:  # the loss is a mean over the micro-batch; the Trainer divides it by this
            share = supervised * trainer.args.world_size / max(1, inputs["num_items_in_batch"])
            trainer.current_gradient_accumulation_steps = 1 / share if share else float("inf")
            if not supervised:  # a mean over no labels would be NaN
                batch = {**batch, "labels": batch["input_ids"]}
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last or trainer.is_deepspeed_enabled else trainer.accelerator.no_sync(model):
            losses.append(original(model, batch, num_items_in_batch))
    return torch.stack(losses).sum()


def _order(loader: DataLoader) -> Sampler[int]:  # type: ignore[type-arg]
    """The sampler of single samples inside a loader that accelerate prepared."""
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    if not hasattr(sampler, "sampler"):
        raise ValueError(
            f"the Trainer's {type(sampler).__name__} forms batches itself; set train_sampling_strategy to random, "
            "sequential or group_by_length"
        )
    return sampler.sampler  # type: ignore[no-any-return]


def _stored(
    lengths: Lengths | str | Path | None,
    trainer: Trainer,
    loader: DataLoader,  # type: ignore[type-arg]
) -> Lengths | None:
    """The lengths; measured and written if they are a file that does not exist."""
    if lengths is None or isinstance(lengths, Lengths):
        return lengths
    path, arguments = Path(lengths), trainer.args
    stored: list[Lengths | None] = [Lengths.load(path) if arguments.process_index == 0 and path.exists() else None]
    if arguments.world_size > 1:  # nodes may not share the file
        torch.distributed.broadcast_object_list(stored)
    if stored[0] is not None:
        return stored[0]
    measured = measure_lengths(
        trainer.accelerator.unwrap_model(trainer.model),
        loader.dataset,
        loader.collate_fn,
        num_workers=loader.num_workers,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    if arguments.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        measured.save(path)
    return measured
