"""What a batch of equal samples costs, dropping beside dense: tokens, FLOPs and cache. No weights, no data.

Everything follows from a model's config and lengths; the arithmetic is in :mod:`vtprune_train.core.flops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from vtprune_train.config.model import PeftConfig
from vtprune_train.core.flops import (
    TYPICAL_TEXT,
    DecoderGeometry,
    PassCost,
    PatchTowerGeometry,
    TowerGeometry,
    TrainingCost,
    VisualTokens,
    is_adaptive,
    kept_keys,
    published_decoder_flops,
    selector_flops,
    stage_layers,
)
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.families import supported_family
from vtprune_train.models.families.base import Lacks, required
from vtprune_train.models.families.layout import ImageGeometry
from vtprune_train.models.io.processors import build_image_processor
from vtprune_train.pruning import PruningMethod
from vtprune_train.pruning.describe import schedule

TYPICAL_ANSWER = 32


@dataclass(frozen=True)
class Subject:
    """A model, how it is pruned, which parts are trained, and the decoder's adapter; ``name`` and ``method_from`` say
    where they come from, ``source`` where its image processor is, which may be limited to ``max_pixels``."""

    name: str
    config: PreTrainedConfig
    method: PruningMethod | None
    method_from: str
    trained: tuple[str, ...] = ("projector", "language_model")
    peft: PeftConfig | None = None
    dtype: str = "bfloat16"
    source: str | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Picture:
    """One picture: its visual tokens, and the tiles (or patches) that the tower sees (``None``: not known)."""

    label: str
    tokens: int
    tiles: int | None


@dataclass(frozen=True)
class Sample:
    """What one sample holds, and how many such samples are a batch.

    ``text`` counts the tokens beside images and answer, ``answer`` the generated or supervised ones; at least 1 each.
    """

    pictures: tuple[Picture, ...]
    text: int = TYPICAL_TEXT
    answer: int = TYPICAL_ANSWER
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """One quantity (FLOPs or bytes) dense and pruned; ``ratio`` is dense / pruned."""

    dense: float
    pruned: float
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.dense / self.pruned if self.pruned else math.inf)


@dataclass(frozen=True)
class StageCost:
    """Decoder layers ``[first_layer, end_layer)``: tokens of the prompt, prefill FLOPs and cache bytes, whole batch.
    Tokens are those that run through the layers; the cache may hold fewer."""

    first_layer: int
    end_layer: int
    visual_tokens: int
    text_tokens: int
    prefill: Cost
    cache: Cost


@dataclass(frozen=True)
class Estimate:
    """What a batch costs.

    Prefill runs images and text, and the head on one row. A training step is forward and backward with the answer's
    supervised tokens after them. Pruned totals include the selector. ``*_whole`` add tower and projector; they are
    ``None`` where ``not_counted`` says why. ``cache_answer`` is the cache once the answer has been generated (its last
    token never enters). ``published`` is PyramidDrop's convention, for one sample. ``visual`` are one sample's visual
    tokens at the layers; where ``expected`` is true the method counts as it runs, and these are what it was planned
    for. ``schedule`` says where it acts, ``unit`` what the tower's work is counted in.
    """

    model: str
    family: str
    decoder: DecoderGeometry
    pruning: dict[str, Any]
    pruning_from: str
    schedule: str
    expected: bool
    visual: VisualTokens
    trained: tuple[str, ...]
    dtype: str
    sample: Sample
    unit: str
    stages: tuple[StageCost, ...]
    head: float
    selector: float
    vision: float | None
    not_counted: str | None
    prefill_decoder: Cost
    prefill_whole: Cost | None
    training_decoder: Cost
    training_whole: Cost | None
    cache_prompt: Cost
    cache_answer: Cost
    published: Cost


def estimate(subject: Subject, sample: Sample) -> Estimate:
    """Count a batch; any family whose decoder :class:`~vtprune_train.core.flops.DecoderGeometry` can read.

    Raises:
        ValueError: the decoder cannot be counted, or the method does not fit its depth.
    """
    decoder, counted = DecoderGeometry.of(subject.config.get_text_config()), tower_of(subject.config)
    tower = None if isinstance(counted, Lacks) else counted
    method = subject.method
    plan = plan_pass([segment_of(sample)], decoder.num_layers, method)
    layers, lengths = stage_layers(plan), np.array([stage.num_tokens for stage in plan.stages])
    kept = kept_keys(method, (lengths - sample.text).tolist(), layers, len(sample.pictures))
    element_size = getattr(torch, subject.dtype).itemsize
    stages = _stages(decoder, lengths, layers, kept, sample, element_size)
    head, selector = sample.batch * decoder.head(1.0), sample.batch * selector_flops(decoder, plan, method)
    prefill = _total([stage.prefill for stage in stages], head, head + selector)
    cache = _total([stage.cache for stage in stages])
    generated = sample.batch * decoder.num_layers * decoder.cache_bytes(sample.answer - 1.0, element_size)
    cost = TrainingCost(
        decoder,
        tower,
        trains_decoder="language_model" in subject.trained,
        trains_tower="vision_tower" in subject.trained,
        trains_projector="projector" in subject.trained,
        adapter=decoder.adapter_per_token(subject.peft.r, subject.peft.target_modules) if subject.peft else 0.0,
    )
    step = _training_step(cost, method, sample)
    tiles, not_counted = _tiles(counted, sample.pictures)
    vision = prefill_whole = step_whole = None
    if tower is not None and tiles is not None:
        vision = sample.batch * (tower.tower(float(tiles)) + tower.projector(float(tiles)))
        prefill_whole = _total([prefill], vision)
        step_whole = _total([step], sample.batch * float(cost.vision(np.array(tiles))))
    return Estimate(
        model=subject.name,
        family=_family(subject.config),
        decoder=decoder,
        pruning=method.settings() if method else {"method": "none"},
        pruning_from=subject.method_from,
        schedule=schedule(method, decoder.num_layers) if method else "none",
        expected=method is not None and is_adaptive(method, decoder.num_layers),
        visual=VisualTokens.of((lengths - sample.text).tolist(), layers, kept),
        trained=subject.trained,
        dtype=subject.dtype,
        sample=sample,
        unit=tower.unit if tower else TowerGeometry.unit,
        stages=stages,
        head=head,
        selector=selector,
        vision=vision,
        not_counted=not_counted,
        prefill_decoder=prefill,
        prefill_whole=prefill_whole,
        training_decoder=step,
        training_whole=step_whole,
        cache_prompt=cache,
        cache_answer=_total([cache], generated),
        published=_published(decoder, (lengths - sample.text).tolist(), layers),
    )


def segment_of(sample: Sample, answer: int = 0) -> SegmentLayout:
    """One sample laid out: its images, its text, which ends with the row that ranks, and ``answer`` tokens."""
    spans: list[ImageSpan] = []
    for picture in sample.pictures:
        spans.append(ImageSpan(spans[-1].end if spans else 0, picture.tokens))
    asked = sample.text + (spans[-1].end if spans else 0)
    return SegmentLayout(asked + answer, tuple(spans), (asked - 1,), tuple(range(asked, asked + answer)))


def _stages(
    decoder: DecoderGeometry,
    lengths: np.ndarray,
    layers: Sequence[int],
    kept_keys: Sequence[float],
    sample: Sample,
    element_size: int,
) -> tuple[StageCost, ...]:
    """The stages of a batch's prefill that have layers; lengths [stages] of one sample."""
    flops, cache = sample.batch * decoder.layer(lengths), sample.batch * decoder.cache_bytes(lengths, element_size)
    dense = sample.text + sum(picture.tokens for picture in sample.pictures)
    dense_flops = sample.batch * float(decoder.layer(np.array(dense)))
    dense_cache = sample.batch * decoder.cache_bytes(float(dense), element_size)
    ends = np.cumsum(layers).tolist()
    costs = []
    for i, (end, count) in enumerate(zip(ends, layers, strict=True)):
        if not count:
            continue
        visual = sample.batch * int(lengths[i] - sample.text)
        gone = visual * sum(1.0 - kept_keys[layer] for layer in range(end - count, end))
        costs.append(
            StageCost(
                first_layer=end - count,
                end_layer=end,
                visual_tokens=visual,
                text_tokens=sample.batch * sample.text,
                prefill=Cost(count * dense_flops, count * float(flops[i])),
                cache=Cost(
                    count * dense_cache, count * float(cache[i]) - float(decoder.cache_bytes(gone, element_size))
                ),
            )
        )
    return tuple(costs)


def _training_step(cost: TrainingCost, method: PruningMethod | None, sample: Sample) -> Cost:
    """Forward and backward of a batch's decoder, the answer included."""
    supervised, segments = np.array([sample.answer]), [segment_of(sample, sample.answer)]
    own, dense = (
        PassCost.of(cost, plan_pass(segments, cost.decoder.num_layers, m), m, supervised).flops for m in (method, None)
    )
    return Cost(sample.batch * dense, sample.batch * own)


def _tiles(
    tower: TowerGeometry | PatchTowerGeometry | Lacks, pictures: Sequence[Picture]
) -> tuple[int | None, str | None]:
    """Tiles of one sample, or why tower and projector cannot be counted."""
    if isinstance(tower, Lacks):
        return None, f"not counted: {tower.why}"
    known = [picture.tiles for picture in pictures if picture.tiles is not None]
    if len(known) < len(pictures):
        assert isinstance(tower, TowerGeometry)
        per_tile = tower.patches // tower.merge
        return None, f"not counted: the tokens are not a multiple of a tile's {per_tile}; give --resolution"
    return sum(known), None


def _total(costs: Sequence[Cost], dense: float = 0.0, pruned: float | None = None) -> Cost:
    """The sum, with ``dense`` added to both sides or ``pruned`` to the pruned one."""
    added = dense if pruned is None else pruned
    return Cost(sum(cost.dense for cost in costs) + dense, sum(cost.pruned for cost in costs) + added)


def _published(decoder: DecoderGeometry, visual: Sequence[int], layers: Sequence[int]) -> Cost:
    sizes = decoder.hidden, decoder.intermediate
    dense = published_decoder_flops(visual[:1], [decoder.num_layers], *sizes)
    return Cost(dense, published_decoder_flops(visual, layers, *sizes))


def tower_of(config: PreTrainedConfig) -> TowerGeometry | PatchTowerGeometry | Lacks:
    """Sizes of tower and projector, or why they are not counted."""
    try:
        family = supported_family(config.model_type, "it")
        return required(family.flops, family.title)(config)
    except ValueError as error:
        return Lacks(str(error))


def images_of(
    config: PreTrainedConfig, source: str | None = None, max_pixels: int | None = None
) -> ImageGeometry | Lacks:
    """How a model lays out images, or why their tokens cannot be counted.

    Args:
        config: the model's.
        source: the folder or hub id of its image processor; without one the family's usual is taken.
        max_pixels: as in ``model.max_pixels``.
    """
    try:
        family = supported_family(config.model_type, "it")
        return family.images(config, build_image_processor(config, source, max_pixels), family.title)
    except ValueError as error:
        return Lacks(str(error))


def _family(config: PreTrainedConfig) -> str:
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return f"{config.model_type} with {tower}" if tower else config.model_type


def pictures_of(
    config: PreTrainedConfig,
    resolutions: Sequence[tuple[int, int]] = (),
    visual_tokens: Sequence[int] = (),
    images: ImageGeometry | Lacks | None = None,
) -> tuple[Picture, ...]:
    """The images of a sample, from sizes or from counts; with neither, the one that makes most tokens.

    Args:
        config: the model's.
        resolutions: ``(width, height)`` in pixels.
        visual_tokens: counts instead of sizes; multiples of a tile's patches are taken for that many tiles.
        images: of :func:`images_of`; left out, as for a model without files.

    Raises:
        ValueError: the family's tokens cannot be counted from a size.
    """
    if visual_tokens:
        tower = tower_of(config)
        return tuple(
            Picture("picture", count, None if isinstance(tower, Lacks) else tower.tiles_of(count))
            for count in visual_tokens
        )
    images = images_of(config) if images is None else images
    if isinstance(images, Lacks):
        raise ValueError(
            f"{'--resolution' if resolutions else 'no picture given'}: the tokens of a picture cannot be counted from "
            f"its size for {_family(config)} ({images.why}); give --visual_tokens"
        )
    sizes = [(height, width) for width, height in resolutions]
    sizes = sizes or [max(images.examples(), key=lambda size: images.tokens([size])[0])]
    counts = zip(sizes, images.tokens(sizes), images.tiles(sizes), strict=True)
    return tuple(Picture(f"{width}x{height}", tokens, tiles) for (height, width), tokens, tiles in counts)
