"""Makes packed batches: decodes and tiles images, lays samples end to end and plans every stage, on the host.

It runs in the data loader's workers; the result does not depend on the worker, rank or machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from vtprune_train.core import flops
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import ImageSpan, PackedBatch, SegmentLayout, StreamPlan, TeacherPass, text_key
from vtprune_train.data.chat import ChatEncoder, EncodedChat
from vtprune_train.data.images import MAX_PIXELS, UNREADABLE, ChangedImage
from vtprune_train.data.index import SampleIndex
from vtprune_train.data.videos import ChangedVideo
from vtprune_train.models.families.layout import ImageLayout, SampleImages, VisualTokens
from vtprune_train.models.question import with_question
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.phases import Phase, Phases

TILES, FRAMES = attrgetter("tiles"), attrgetter("frames")


@dataclass
class LoadedSample:
    """The tokens and the images of one sample."""

    sample_id: str
    chat: EncodedChat
    images: SampleImages


@dataclass
class Collator:
    """Makes packed batches from the samples of an index.

    Args:
        index: the samples.
        encoder: tokenizes conversations.
        layout: the family's image layout.
        image_processor: transformers' image processor, which makes the input of the vision tower.
        method: plans the stages; ``None`` for dense passes.
        cost: counts FLOPs; its decoder geometry gives the number of layers.
        phases: the methods of training steps; ``None`` if every batch uses ``method``.
        max_image_pixels: larger images are not read.
    """

    index: SampleIndex
    encoder: ChatEncoder
    layout: ImageLayout
    image_processor: Any
    method: PruningMethod | None
    cost: flops.TrainingCost
    phases: Phases | None = None
    max_image_pixels: int = MAX_PIXELS

    def __call__(
        self, samples: Sequence[int], image_samples: Sequence[int] | None = None, step: int | None = None
    ) -> PackedBatch:
        """Pack samples.

        Samples whose images cannot be read are left out and listed in ``unreadable``; if none is left, the batch is one
        token without supervision. If the size of an image differs from the index, the next start rebuilds the index of
        its source.

        Args:
            samples: indices of the samples.
            image_samples: indices of samples whose images are used instead, with the same numbers of images.
            step: global step of training, for ``phases``.
        """
        loaded: list[LoadedSample] = []
        unreadable: list[tuple[str, str]] = []
        for sample, image_sample in zip(samples, samples if image_samples is None else image_samples, strict=True):
            try:
                loaded.append(self.load(sample, image_sample))
            except ChangedImage as error:
                reason = str(self.index.distrusted(image_sample, f"{error.kind} {error}"))
                unreadable.append((self.index.sample_id(sample), reason))
            except UNREADABLE as error:
                unreadable.append((self.index.sample_id(sample), str(error)))
        return self.pack(loaded, tuple(unreadable), step)

    def load(self, sample: int, image_sample: int) -> LoadedSample:
        """Tokenize one sample and decode its images.

        Raises:
            UnreadableImage: an image cannot be read or has changed.
            RuntimeError: the lengths of the sample differ from the index, so the plan of its step is wrong.
        """
        record = self.index.record(sample)
        image_record = record if image_sample == sample else self.index.record(image_sample)
        files = self.index.files(image_sample, image_record)
        sizes = self.index.visuals(image_sample, files, self.layout, self.max_image_pixels)
        tokens = self.layout.visual_tokens(sizes)
        chat = self.encoder.encode(record.turns, self.layout.texts(sizes, self.encoder.placeholder))
        lengths = self.index.lengths([sample, image_sample])
        supervised = int((chat.labels >= 0).sum())
        runs = sum(len(of.runs) for of in tokens)
        text = len(chat.input_ids) - len(chat.image_offsets)
        if not (record.videos or image_record.videos):
            self._compare(sample, "text tokens", text, int(lengths.text[0]))
        elif image_sample == sample and text != lengths.text[0]:  # the timestamps of a changed video differ
            name = next(file.name for file in files if file.is_video)
            raise ChangedVideo(name, f"its text has {text} tokens, but had {lengths.text[0]} when the data was indexed")
        self._compare(sample, "supervised tokens", supervised, int(lengths.supervised[0]))
        self._compare(sample, "images and videos", len(sizes), int((lengths.span_sample == 0).sum()))
        self._compare(sample, "runs of visual tokens", len(chat.image_offsets), runs)
        content = [file.load(size, self.max_image_pixels, self.layout) for file, size in zip(files, sizes, strict=True)]
        visual = int(lengths.span_tokens[lengths.span_sample == 1].sum())
        self._compare(image_sample, "visual tokens", sum(of.total for of in tokens), visual)
        pixels = self.layout.visual_pixels(self.image_processor, sizes, content)
        return LoadedSample(self.index.sample_id(sample), chat, SampleImages(sizes, pixels))

    def _compare(self, sample: int, name: str, count: int, indexed: int) -> None:
        if count != indexed:
            raise self.index.distrusted(
                sample, f"sample {self.index.sample_id(sample)} has {count} {name}, but {indexed} in the index"
            )

    def pack(
        self, loaded: Sequence[LoadedSample], unreadable: tuple[tuple[str, str], ...] = (), step: int | None = None
    ) -> PackedBatch:
        """Lay samples end to end and plan their stages."""
        phase = Phase(self.method) if self.phases is None or step is None else self.phases.of(step)
        laid_out = [lay_out(sample.chat, self.layout.visual_tokens(sample.images.sizes)) for sample in loaded]
        methods = (phase.method, None if phase.teacher is None else phase.teacher.method)
        if any(method is not None and method.needs.question for method in methods):
            laid_out = [(with_question(segment, ids, self.encoder.tokenizer), ids) for segment, ids in laid_out]
        segments = [segment for segment, _ in laid_out] or [SegmentLayout(length=1, query_offsets=(0,))]
        num_layers, teacher = self.cost.decoder.num_layers, None
        plan = plan_pass(segments, num_layers, phase.method)
        if phase.teacher is not None:
            taught = plan_pass(segments, num_layers, phase.teacher.method)
            teacher = TeacherPass(taught, phase.teacher.weight, phase.teacher.temperature)
        ids = np.concatenate([ids for _, ids in laid_out]) if laid_out else np.zeros(1, dtype=np.int64)
        answers = [_answer_of_target(sample.chat) for sample in loaded]
        num_answers = np.cumsum([0, *(len(sample.chat.answer_starts) for sample in loaded)])
        targets = [sample.chat.labels[sample.chat.labels >= 0] for sample in loaded]
        images = [sample.images for sample in loaded]
        vision = self.layout.vision_inputs(images)
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            visual_rows=torch.from_numpy(_visual_rows(segments)),
            visual_index=vision.visual_index,
            pixel_values=vision.pixel_values,
            plan=plan,
            targets=torch.from_numpy(_join(targets)),
            answer_of_target=torch.from_numpy(_join([a + n for a, n in zip(answers, num_answers, strict=False)])),
            num_answers=int(num_answers[-1]),
            sample_ids=tuple(sample.sample_id for sample in loaded),
            targets_per_sample=tuple(len(supervised) for supervised in targets),
            unreadable=unreadable,
            costs=self._costs(loaded, plan, phase, teacher, segments) if loaded else {},
            image_inputs=vision.image_inputs,
            positions=self.layout.positions(segments, images),
            teacher=teacher,
            video_pixels=vision.video_pixels,
        )

    @property
    def num_stages(self) -> int:
        """Number of stages of the method; for a pass on all tokens, the same number of equal stages is reported."""
        return 1 if self.method is None else len(self.method.drops(self.cost.decoder.num_layers)) + 1

    def _costs(
        self,
        loaded: Sequence[LoadedSample],
        plan: StreamPlan,
        phase: Phase,
        teacher: TeacherPass | None,
        segments: Sequence[SegmentLayout],
    ) -> dict[str, float]:
        visuals = [of for sample in loaded for of in self.layout.visual_tokens(sample.images.sizes)]
        tiles, frames = (np.array([value(of) for of in visuals], dtype=np.int64) for value in (TILES, FRAMES))
        vision, dense_vision = (float(self.cost.vision(tiles, frames, of).sum()) for of in (phase.method, None))
        supervised = np.array([len(segment.supervised_offsets) for segment in segments])
        pass_cost = flops.PassCost.of(self.cost, plan, phase.method, supervised)
        other = vision
        if teacher is not None:
            assert phase.teacher is not None
            lengths = np.array([stage.segment_lengths for stage in teacher.plan.stages]).T
            other += float(self.cost.forward_text(lengths, flops.stage_layers(teacher.plan), supervised).sum())
            other += flops.selector_flops(self.cost.decoder, teacher.plan, phase.teacher.method)
            other += float(self.cost.teacher_vision(tiles, frames, phase.teacher.method, phase.method).sum())
        full = np.array(plan.stages[0].segment_lengths)[:, None]
        dense = self.cost.text(full, [self.cost.decoder.num_layers], supervised).sum() + dense_vision
        visual = sum(span.length for segment in segments for span in segment.spans)
        return {
            "flops_dense": float(dense),
            "flops_other": other,
            "visual_tokens": float(visual),
            **self._pass_costs(pass_cost, plan, other),
        }

    def _pass_costs(self, cost: flops.PassCost, plan: StreamPlan, other: float) -> dict[str, float]:
        """Metrics of a pass; ``other`` is the number of FLOPs outside of it (vision tower, teacher)."""
        tokens = [stage.num_tokens for stage in plan.stages]
        return {
            "flops": cost.flops + other,
            "flops_selector": cost.selector,
            "visual_tokens_entering": cost.visual.entering,
            "visual_tokens_leaving": cost.visual.leaving,
            "cache_values": cost.cache_values,
            **{f"tokens_stage_{i}": float(tokens[min(i, len(tokens) - 1)]) for i in range(self.num_stages)},
        }

    def measured_costs(self, batch: PackedBatch, plan: StreamPlan) -> dict[str, float]:
        """``batch.costs`` for the plan that the pass executed, which an adaptive method determines during the pass."""
        if not batch.costs:
            return batch.costs
        cost = flops.PassCost.of(self.cost, plan, plan.outline.method, np.array(batch.targets_per_sample))
        return {**batch.costs, **self._pass_costs(cost, plan, batch.costs["flops_other"])}


def lay_out(chat: EncodedChat, visuals: Sequence[int | VisualTokens]) -> tuple[SegmentLayout, np.ndarray]:
    """Expand the single token of each run of visual tokens.

    Args:
        chat: one sample.
        visuals: the visual tokens of each image and video, or only their number for an image.

    Returns:
        The layout of the segment, and its [L] input ids.
    """
    every = [VisualTokens((visual,)) if isinstance(visual, int) else visual for visual in visuals]
    lengths = [length for visual in every for length in visual.runs]
    assert len(chat.image_offsets) == len(lengths), "one token for each run"
    extra = np.zeros(len(chat.input_ids) + 1, dtype=np.int64)
    for offset, length in zip(chat.image_offsets, lengths, strict=True):
        extra[offset + 1] = length - 1
    moved = np.arange(len(chat.input_ids) + 1) + np.cumsum(extra)
    spans = tuple(_spans(every, [int(moved[offset]) for offset in chat.image_offsets]))
    first = min(chat.answer_starts, default=len(chat.input_ids))
    prompt = np.delete(chat.input_ids[:first], [offset for offset in chat.image_offsets if offset < first])
    repeats = np.ones(len(chat.input_ids), dtype=np.int64)
    repeats[list(chat.image_offsets)] = lengths
    segment = SegmentLayout(
        key=text_key(prompt),
        length=int(repeats.sum()),
        spans=spans,
        query_offsets=tuple(int(moved[start]) - 1 for start in chat.answer_starts),
        supervised_offsets=tuple(moved[:-1][chat.labels >= 0].tolist()),
    )
    return segment, np.repeat(chat.input_ids, repeats)


def _spans(visuals: Sequence[VisualTokens], starts: Sequence[int]) -> Iterator[ImageSpan]:
    """The span of each image and video, given the start of each run."""
    left = iter(starts)
    for visual in visuals:
        runs = tuple((next(left), length) for length in visual.runs)
        if visual.frames:
            more = runs if len(runs) > 1 else ()
            yield ImageSpan(runs[0][0], visual.total, visual.grids, visual.frames, more)
        else:
            one_each = len(runs) > 1 and len(visual.grids) == len(runs)
            for number, (start, length) in enumerate(runs):
                grids = visual.grids[number : number + 1] if one_each else visual.grids
                yield ImageSpan(start, length, grids, tile_tokens=visual.tile_tokens)


def _visual_rows(segments: Sequence[SegmentLayout]) -> np.ndarray:
    """[V] rows of the visual tokens in the packed batch."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])[:-1]
    return _join(
        [
            start + span.offsets()
            for start, segment in zip(starts.tolist(), segments, strict=True)
            for span in segment.spans
        ]
    )


def _answer_of_target(chat: EncodedChat) -> np.ndarray:
    """[targets] the number of the answer that each supervised token belongs to."""
    supervised = np.flatnonzero(chat.labels >= 0)
    return np.searchsorted(np.array(chat.answer_starts), supervised, side="right") - 1


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
