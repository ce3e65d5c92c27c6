"""Estimates the cost of a batch of equal samples, pruned and dense: tokens, FLOPs and cache, without weights or data.

The estimate follows from a model's config and lengths; :mod:`vtprune_train.core.flops` has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    is_adaptive,
    kept_keys,
    published_decoder_flops,
    selector_flops,
    stage_layers,
)
from vtprune_train.core.flops import VisualTokens as VisualAverages
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.families import supported_family
from vtprune_train.models.families.base import Lacks, required
from vtprune_train.models.families.layout import Clip, ImageGeometry, ImageLayout, Visual, VisualTokens
from vtprune_train.models.families.videos import written_tokens
from vtprune_train.models.io.processors import build_image_processor
from vtprune_train.pruning import PruningMethod
from vtprune_train.pruning.describe import schedule

TYPICAL_ANSWER = 32


@dataclass(frozen=True)
class Subject:
    """The model and the method of an estimate.

    Args:
        name: name of the model.
        config: its config.
        method: the pruning method.
        method_from: description of where the method comes from.
        trained: trained parts.
        peft: the decoder's adapter.
        dtype: dtype of the cache.
        source: folder or hub id of the image processor.
        max_pixels: limit of the image processor, as in ``model.max_pixels``.
        video: settings of videos, as in ``data.video``.
    """

    name: str
    config: PreTrainedConfig
    method: PruningMethod | None
    method_from: str
    trained: tuple[str, ...] = ("projector", "language_model")
    peft: PeftConfig | None = None
    dtype: str = "bfloat16"
    source: str | None = None
    max_pixels: int | None = None
    video: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageTokens:
    """The number of visual tokens and of tiles (or patches) of one image or video; ``tiles`` is ``None`` if unknown.

    For a video, ``steps`` is its number of steps in time, ``text`` the number of text tokens that the family writes for
    it, and ``visual`` describes its tokens."""

    label: str
    tokens: int
    tiles: int | None
    steps: int = 0
    text: int = 0
    visual: VisualTokens | None = None

    @property
    def frames(self) -> int:
        """Steps in time that do not attend to each other in the tower; 0 for an image."""
        return 0 if self.visual is None else self.visual.frames

    def spans(self, start: int) -> list[ImageSpan]:
        """The spans of this image or video; the first one starts at ``start``."""
        if self.visual is None or self.visual.frames:
            return [ImageSpan(start, self.tokens, () if self.visual is None else self.visual.grids, self.frames)]
        runs, grids = self.visual.runs, self.visual.grids  # each frame is an image
        return [ImageSpan(start + sum(runs[:i]), length, (grids[i],)) for i, length in enumerate(runs)]


@dataclass(frozen=True)
class Sample:
    """The content of a sample, and the number of such samples in a batch.

    ``text`` is the number of tokens of the prompt without images and videos, ``answer`` the number of generated or
    supervised tokens; both are at least 1.
    """

    images: tuple[ImageTokens, ...]
    text: int = TYPICAL_TEXT
    answer: int = TYPICAL_ANSWER
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """A quantity (FLOPs or bytes) of the dense and the pruned model; ``ratio`` is dense / pruned."""

    dense: float
    pruned: float
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.dense / self.pruned if self.pruned else math.inf)


@dataclass(frozen=True)
class StageCost:
    """Tokens of the prompt, prefill FLOPs and cache bytes of a batch in decoder layers ``[first_layer, end_layer)``.
    The cache may contain fewer tokens than the layers process."""

    first_layer: int
    end_layer: int
    visual_tokens: int
    text_tokens: int
    prefill: Cost
    cache: Cost


@dataclass(frozen=True)
class Estimate:
    """The cost of a batch.

    The prefill processes images and text, and one row of the head. A training step is forward and backward, including
    the supervised tokens of the answer. Pruned totals include the selector. ``*_whole`` include tower and projector;
    they are ``None`` if those cannot be counted, and ``not_counted`` has the reason. ``cache_answer`` is the cache
    after generating the answer (without its last token). ``published`` follows PyramidDrop's convention, for one
    sample. ``visual`` are the visual tokens of one sample at the layers; ``expected`` is true for a method that
    determines its counts while it runs, for which these are the planned numbers. ``schedule`` describes the layers at
    which the method acts, ``unit`` is the unit of the tower's work.
    """

    model: str
    family: str
    decoder: DecoderGeometry
    pruning: dict[str, Any]
    pruning_from: str
    schedule: str
    expected: bool
    visual: VisualAverages
    trained: tuple[str, ...]
    dtype: str
    sample: Sample
    unit: str
    stages: tuple[StageCost, ...]
    head: float
    selector: float
    vision: float | None
    vision_dense: float | None
    not_counted: str | None
    prefill_decoder: Cost
    prefill_whole: Cost | None
    training_decoder: Cost
    training_whole: Cost | None
    cache_prompt: Cost
    cache_answer: Cost
    published: Cost


def estimate(subject: Subject, sample: Sample) -> Estimate:
    """Estimate a batch, for any model whose decoder :class:`~vtprune_train.core.flops.DecoderGeometry` supports.

    Raises:
        ValueError: the decoder is not supported, or the method does not fit its depth.
    """
    decoder, counted = DecoderGeometry.of(subject.config.get_text_config()), tower_of(subject.config)
    tower = None if isinstance(counted, Lacks) else counted
    method = subject.method
    plan = plan_pass([segment_of(sample)], decoder.num_layers, method)
    layers, lengths = stage_layers(plan), np.array([stage.num_tokens for stage in plan.stages])
    kept = kept_keys(method, (lengths - sample.text).tolist(), layers, len(plan.outline.segments[0].spans))
    element_size = getattr(torch, subject.dtype).itemsize
    stages = _stages(decoder, lengths, layers, kept, sample, element_size)
    head, selector = sample.batch * decoder.head(1.0), sample.batch * selector_flops(decoder, plan, method)
    prefill = _total([stage.prefill for stage in stages], head, head + selector)
    cache = _total([stage.cache for stage in stages])
    attends = int(decoder.split(layers)[0].sum())
    generated = sample.batch * attends * decoder.cache_bytes(sample.answer - 1.0, element_size)
    cost = TrainingCost(
        decoder,
        tower,
        trains_decoder="language_model" in subject.trained,
        trains_tower="vision_tower" in subject.trained,
        trains_projector="projector" in subject.trained,
        adapter=decoder.adapter_per_token(subject.peft.r, subject.peft.target_modules) if subject.peft else 0.0,
    )
    step = _training_step(cost, method, sample)
    tiles, not_counted = _tiles(counted, sample.images)
    frames = np.array([image.frames for image in sample.images])
    vision = prefill_whole = step_whole = None
    if tower is not None and tiles is not None:
        dense, pruned = (float(cost.forward_vision(tiles, frames, of).sum()) for of in (None, method))
        vision = Cost(sample.batch * dense, sample.batch * pruned)
        prefill_whole = _total([prefill], vision.dense, vision.pruned)
        dense, pruned = (float(cost.vision(tiles, frames, of).sum()) for of in (None, method))
        step_whole = _total([step], sample.batch * dense, sample.batch * pruned)
    return Estimate(
        model=subject.name,
        family=_family(subject.config),
        decoder=decoder,
        pruning=method.settings() if method else {"method": "none"},
        pruning_from=subject.method_from,
        schedule=schedule(method, decoder.num_layers) if method else "none",
        expected=method is not None and is_adaptive(method, decoder.num_layers),
        visual=VisualAverages.of((lengths - sample.text).tolist(), layers, kept),
        trained=subject.trained,
        dtype=subject.dtype,
        sample=sample,
        unit=tower.unit if tower else TowerGeometry.unit,
        stages=stages,
        head=head,
        selector=selector,
        vision=None if vision is None else vision.pruned,
        vision_dense=None if vision is None else vision.dense,
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
    """The layout of a sample: its images and videos, its text, whose last token is the query row, and ``answer``
    tokens."""
    spans: list[ImageSpan] = []
    for image in sample.images:
        spans += image.spans(spans[-1].end if spans else 0)
    prompt = sample.text + (spans[-1].end if spans else 0)
    return SegmentLayout(prompt + answer, tuple(spans), (prompt - 1,), tuple(range(prompt, prompt + answer)))


def _stages(
    decoder: DecoderGeometry,
    lengths: np.ndarray,
    layers: Sequence[int],
    kept_keys: Sequence[float],
    sample: Sample,
    element_size: int,
) -> tuple[StageCost, ...]:
    """Costs of the stages of a batch's prefill that have layers; ``lengths`` [stages] are those of one sample."""
    flops, cache = sample.batch * decoder.stages(lengths, layers), decoder.cache_bytes(lengths, element_size)
    dense = np.full_like(lengths, sample.text + sum(image.tokens for image in sample.images))
    dense_flops, dense_cache = decoder.stages(dense, layers), decoder.cache_bytes(dense, element_size)
    attends, linear = decoder.split(layers)
    states = linear * (0 if decoder.linear is None else decoder.linear.state_values) * element_size
    ends = np.cumsum(layers).tolist()
    costs = []
    for i, (end, count) in enumerate(zip(ends, layers, strict=True)):
        if not count:
            continue
        visual = sample.batch * int(lengths[i] - sample.text)
        dropped = visual * sum(1.0 - kept_keys[layer] for layer in range(end - count, end))
        costs.append(
            StageCost(
                first_layer=end - count,
                end_layer=end,
                visual_tokens=visual,
                text_tokens=sample.batch * sample.text,
                prefill=Cost(sample.batch * float(dense_flops[i]), float(flops[i])),
                cache=Cost(
                    sample.batch * float(attends[i] * dense_cache[i] + states[i]),
                    sample.batch * float(attends[i] * cache[i] + states[i])
                    - float(decoder.cache_bytes(dropped, element_size)),
                ),
            )
        )
    return tuple(costs)


def _training_step(cost: TrainingCost, method: PruningMethod | None, sample: Sample) -> Cost:
    """Cost of forward and backward of the decoder for a batch, including the answer."""
    supervised, segments = np.array([sample.answer]), [segment_of(sample, sample.answer)]
    pruned, dense = (
        PassCost.of(cost, plan_pass(segments, cost.decoder.num_layers, m), m, supervised).flops for m in (method, None)
    )
    return Cost(sample.batch * dense, sample.batch * pruned)


def _tiles(
    tower: TowerGeometry | PatchTowerGeometry | Lacks, images: Sequence[ImageTokens]
) -> tuple[np.ndarray | None, str | None]:
    """Number of tiles of each image and video [images], or the reason why tower and projector cannot be counted."""
    if isinstance(tower, Lacks):
        return None, f"not counted: {tower.why}"
    known = [image.tiles for image in images if image.tiles is not None]
    if len(known) < len(images):
        assert isinstance(tower, TowerGeometry)
        per_tile = tower.patches // tower.merge
        return None, f"not counted: the tokens are not a multiple of a tile's {per_tile}; give --resolution"
    return np.array(known), None


def _total(costs: Sequence[Cost], dense: float = 0.0, pruned: float | None = None) -> Cost:
    """The sum of ``costs``, plus ``dense`` on the dense side and ``pruned`` (by default ``dense``) on the pruned
    side."""
    added = dense if pruned is None else pruned
    return Cost(sum(cost.dense for cost in costs) + dense, sum(cost.pruned for cost in costs) + added)


def _published(decoder: DecoderGeometry, visual: Sequence[int], layers: Sequence[int]) -> Cost:
    sizes = decoder.hidden, decoder.intermediate
    dense = published_decoder_flops(visual[:1], [decoder.num_layers], *sizes)
    return Cost(dense, published_decoder_flops(visual, layers, *sizes))


def tower_of(config: PreTrainedConfig) -> TowerGeometry | PatchTowerGeometry | Lacks:
    """Sizes of tower and projector, or the reason why they cannot be counted."""
    try:
        family = supported_family(config.model_type, "it")
        return required(family.flops, family.title)(config)
    except ValueError as error:
        return Lacks(str(error))


def images_of(
    config: PreTrainedConfig, source: str | None = None, max_pixels: int | None = None
) -> ImageGeometry | Lacks:
    """The geometry of a model's images, or the reason why their tokens cannot be counted.

    Args:
        config: the model's config.
        source: folder or hub id of its image processor; ``None`` for the family's default.
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


def images_of_sample(
    config: PreTrainedConfig,
    resolutions: Sequence[tuple[int, int]] = (),
    visual_tokens: Sequence[int] = (),
    images: ImageGeometry | Lacks | None = None,
    clips: Sequence[Clip] = (),
) -> tuple[ImageTokens, ...]:
    """The images and videos of a sample, from sizes or token counts; with neither, one image of the size with the most
    tokens.

    Args:
        config: the model's config.
        resolutions: ``(width, height)`` in pixels.
        visual_tokens: token counts instead of sizes; multiples of a tile's patches count as whole tiles.
        images: result of :func:`images_of`; by default without an image processor.
        clips: the videos of the sample; ``images`` must then be a layout with videos.

    Raises:
        ValueError: the visual tokens of this family cannot be computed from a size.
    """
    if visual_tokens:
        tower = tower_of(config)
        return tuple(
            ImageTokens("image", count, None if isinstance(tower, Lacks) else tower.tiles_of(count))
            for count in visual_tokens
        )
    images = images_of(config) if images is None else images
    if isinstance(images, Lacks):
        raise ValueError(
            f"{'--resolution' if resolutions else 'no image given'}: the tokens of an image cannot be counted from its "
            f"size for {_family(config)} ({images.why}); give --visual_tokens"
        )
    sizes = [(height, width) for width, height in resolutions]
    if clips:
        assert isinstance(images, ImageLayout)
        return _visuals_of_sample(images, [*sizes, *clips])
    sizes = sizes or [max(images.examples(), key=lambda size: images.tokens([size])[0])]
    counts = zip(sizes, images.tokens(sizes), images.tiles(sizes), strict=True)
    return tuple(ImageTokens(f"{width}x{height}", tokens, tiles) for (height, width), tokens, tiles in counts)


def _visuals_of_sample(layout: ImageLayout, visuals: Sequence[Visual]) -> tuple[ImageTokens, ...]:
    found = []
    for visual, of in zip(visuals, layout.visual_tokens(visuals), strict=True):
        if not isinstance(visual, Clip):
            found.append(ImageTokens(f"{visual[1]}x{visual[0]}", of.total, of.tiles))
            continue
        label = f"{len(visual.indices)} frames of {visual.width}x{visual.height}"
        steps = of.frames or len(of.runs)
        found.append(ImageTokens(label, of.total, of.tiles, steps, written_tokens(layout.placeholder(visual)), of))
    return tuple(found)
