"""Samples to a packed batch: pictures decoded and tiled, the stream laid out, every stage planned. Host only.

Runs in the loader's workers; nothing here depends on which worker, rank or machine it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vtprune_train import flops
from vtprune_train.data.chat import ChatEncoder, EncodedChat
from vtprune_train.data.images import UNREADABLE, load_image
from vtprune_train.data.index import SampleIndex
from vtprune_train.data.records import turns_of
from vtprune_train.models.layouts import ImageLayout, Pictures
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.stream import ImageSpan, PackedBatch, SegmentLayout, StreamPlan, plan_stream


@dataclass
class LoadedSample:
    """One sample ready to be laid out: its tokens and its pictures."""

    sample_id: str
    chat: EncodedChat
    pictures: Pictures


@dataclass
class Collator:
    """Makes packed batches of samples of an index.

    Args:
        index: where the samples are.
        encoder: conversations to tokens.
        layout: how the family sees pictures.
        image_processor: transformers' own; it makes the tower's input.
        method: plans the stages; ``None`` for a dense pass.
        cost: counts FLOPs; its decoder geometry gives the number of layers.
    """

    index: SampleIndex
    encoder: ChatEncoder
    layout: ImageLayout
    image_processor: Any
    method: PruningMethod | None
    cost: flops.TrainingCost

    def __call__(self, samples: Sequence[int], pictures_of: Sequence[int] | None = None) -> PackedBatch:
        """Pack ``samples``. Samples whose pictures cannot be read are left out and named in ``unreadable``; if none
        is left the batch is one blank token without supervision.

        Args:
            samples: indices into the index.
            pictures_of: take the pictures from these samples instead (same number of pictures each).
        """
        loaded: list[LoadedSample] = []
        unreadable: list[tuple[str, str]] = []
        for sample, picture_sample in zip(samples, samples if pictures_of is None else pictures_of, strict=True):
            try:
                loaded.append(self.load(sample, picture_sample))
            except UNREADABLE as error:
                unreadable.append((self.index.sample_id(sample), str(error)))
        return self.pack(loaded, tuple(unreadable))

    def load(self, sample: int, picture_sample: int) -> LoadedSample:
        """Tokenize one sample and decode its pictures.

        Raises:
            one of ``UNREADABLE``: a picture cannot be read or has changed.
        """
        row = self._row(sample)
        picture_row = row if picture_sample == sample else self._row(picture_sample)
        folder = self.index.sources[int(self.index.source[picture_sample])].images
        sizes = list(zip(picture_row["image_heights"], picture_row["image_widths"], strict=True))
        images = []
        for name, size in zip(picture_row["images"], sizes, strict=True):
            try:
                images.append(load_image(folder / name, size))
            except UNREADABLE as error:
                raise ValueError(f"image {folder / name}: {error}") from error
        pictures = Pictures(sizes, self.layout.pixels(self.image_processor, images))
        return LoadedSample(self.index.sample_id(sample), self.encoder.encode(turns_of(row)), pictures)

    def pack(self, loaded: Sequence[LoadedSample], unreadable: tuple[tuple[str, str], ...] = ()) -> PackedBatch:
        """Lay samples end to end."""
        laid_out = [lay_out(sample.chat, self.layout.tokens(sample.pictures.sizes)) for sample in loaded]
        segments = [segment for segment, _ in laid_out] or [SegmentLayout(length=1, query_offsets=(0,))]
        num_layers = self.cost.decoder.num_layers
        plan = plan_stream(segments, (), num_layers) if self.method is None else self.method.plan(segments, num_layers)
        ids = np.concatenate([ids for _, ids in laid_out]) if laid_out else np.zeros(1, dtype=np.int64)
        answers = [_answer_of_target(sample.chat) for sample in loaded]
        num_answers = np.cumsum([0, *(len(sample.chat.answer_starts) for sample in loaded)])
        targets = [sample.chat.labels[sample.chat.labels >= 0] for sample in loaded]
        pictures = [sample.pictures for sample in loaded]
        vision = self.layout.vision_inputs(pictures)
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
            costs=self._costs(loaded, plan, segments) if loaded else {},
            image_inputs=vision.image_inputs,
            positions=self.layout.positions(segments, pictures),
        )

    def _row(self, sample: int) -> dict:
        return self.index.rows[int(self.index.source[sample])][int(self.index.row[sample])]

    def _costs(
        self, loaded: Sequence[LoadedSample], plan: StreamPlan, segments: Sequence[SegmentLayout]
    ) -> dict[str, float]:
        tiles = _join([np.array([len(p) for p in sample.pictures.pixels], dtype=np.int64) for sample in loaded])
        sample_of_tiles = np.repeat(np.arange(len(loaded)), [len(sample.pictures.pixels) for sample in loaded])
        supervised = np.array([len(segment.supervised_offsets) for segment in segments])
        lengths = np.array([stage.segment_lengths for stage in plan.stages]).T
        layers = [stage.end_layer - stage.first_layer for stage in plan.stages]
        done = self.cost.sample(lengths, layers, tiles, supervised, sample_of_tiles).sum()
        if self.method is not None:
            done += flops.selector_flops(self.cost.decoder, plan, self.method.rank_with == "next_layer")
        dense = self.cost.sample(lengths[:, :1], [sum(layers)], tiles, supervised, sample_of_tiles).sum()
        per_stage = {f"tokens_stage_{i}": float(stage.num_tokens) for i, stage in enumerate(plan.stages)}
        visual = sum(span.length for segment in segments for span in segment.spans)
        return {"flops": float(done), "flops_dense": float(dense), "visual_tokens": float(visual), **per_stage}


def lay_out(chat: EncodedChat, image_tokens: Sequence[int]) -> tuple[SegmentLayout, np.ndarray]:
    """Expand each image's single token to its visual tokens.

    Returns:
        the segment's layout and its [L] input ids.
    """
    assert len(chat.image_offsets) == len(image_tokens), "one length per image"
    extra = np.zeros(len(chat.input_ids) + 1, dtype=np.int64)
    for offset, length in zip(chat.image_offsets, image_tokens, strict=True):
        extra[offset + 1] = length - 1
    moved = np.arange(len(chat.input_ids) + 1) + np.cumsum(extra)
    spans = tuple(
        ImageSpan(int(moved[offset]), length) for offset, length in zip(chat.image_offsets, image_tokens, strict=True)
    )
    repeats = np.ones(len(chat.input_ids), dtype=np.int64)
    repeats[list(chat.image_offsets)] = image_tokens
    segment = SegmentLayout(
        length=int(repeats.sum()),
        spans=spans,
        query_offsets=tuple(int(moved[start]) - 1 for start in chat.answer_starts),
        supervised_offsets=tuple(moved[:-1][chat.labels >= 0].tolist()),
    )
    return segment, np.repeat(chat.input_ids, repeats)


def _visual_rows(segments: Sequence[SegmentLayout]) -> np.ndarray:
    """[V] rows of the stream that hold visual tokens."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])[:-1]
    return _join(
        [
            np.arange(start + span.start, start + span.end)
            for start, segment in zip(starts.tolist(), segments, strict=True)
            for span in segment.spans
        ]
    )


def _answer_of_target(chat: EncodedChat) -> np.ndarray:
    supervised = np.flatnonzero(chat.labels >= 0)
    return np.searchsorted(np.array(chat.answer_starts), supervised, side="right") - 1


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
