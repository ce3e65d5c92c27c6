"""Data setup of a run: sample index, collator and step planner."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.core.flops import TrainingCost
from vtprune_train.data.index import SampleIndex, Source, build_index
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.plan.planner import Planner, StepCosts
from vtprune_train.data.records import Prompt
from vtprune_train.data.sources.base import Bounds
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.phases import Phases
from vtprune_train.training import distributed as ranks
from vtprune_train.training.check_data import unwritable
from vtprune_train.training.loop.parts import Parts


def cache_dir(config: Config) -> Path:
    """Folder for data indices; raises ``ConfigError`` if it cannot be created or written."""
    from datasets import config as datasets_config

    named = config.data.cache_dir
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "vtprune" if named is None else Path(named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(unwritable("data.cache_dir", folder, error)) from error
    return folder


def build_data_index(config: Config, parts: Parts, which: Literal["train", "eval"]) -> SampleIndex:
    """Index the training or evaluation data. Call on all ranks. Raises ``ValueError`` if no file is set or if ranks see
    different data, since they would plan different steps and deadlock."""
    if not config.sources(which):
        raise ValueError(f"data.{which} is empty; for example [{{path: train.json, images: images}}]")
    index = build_index(
        [
            Source(
                path=Path(source.path),
                images=Path(source.images),
                take=source.take,
                weight=source.weight,
                prompt=Prompt(**source.prompt.model_dump()),
                name=source.name or "",
                ignore=tuple(source.ignore),
                reader=source.reader or "",
                videos=None if source.videos is None else Path(source.videos),
            )
            for source in config.sources(which)
        ],
        parts.encoder,
        parts.layout,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        max_bad=config.data.max_bad,
        seed=config.run.seed,
        workers=max(1, config.data.workers),
        cache_dir=cache_dir(config),
        unsupervised=config.data.unsupervised,
        max_image_pixels=config.data.max_image_pixels,
        max_bad_share=config.data.max_bad_share,
        bounds=Bounds(config.data.max_record_bytes, config.data.max_text_bytes),
    )
    ranks.check_same(f"{index.identity()}, {index.total_tokens} tokens", f"the samples of data.{which}")
    return index


def build_collator(
    config: Config, parts: Parts, cost: TrainingCost, method: PruningMethod | None, which: Literal["train", "eval"]
) -> Collator:
    """Index the data and make its collator."""
    return Collator(
        index=build_data_index(config, parts, which),
        encoder=parts.encoder,
        layout=parts.layout,
        image_processor=parts.processor.image_processor,
        method=method,
        cost=cost,
        max_image_pixels=config.data.max_image_pixels,
    )


def build_planner(config: Config, collate: Collator, world_size: int) -> Planner:
    """Build the step planner for the training data; costs are computed for the step's actual (pruned) passes."""
    index = collate.index
    return Planner(
        index.order(),
        StepCosts(index, collate.cost, collate.phases or Phases(collate.method)),
        longest=index.longest,
        global_batch_size=config.train.global_batch_size,
        max_tokens=config.data.max_tokens,
        world_size=world_size,
    )
