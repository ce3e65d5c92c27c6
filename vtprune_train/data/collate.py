"""Samples to a packed batch: pictures decoded and tiled, the stream laid out, every stage planned. Host only.

Runs in the loader's workers; nothing here depends on which worker, rank or machine it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from vtprune_train import flops
from vtprune_train.data.chat import ChatEncoder, EncodedChat
from vtprune_train.data.images import UNREADABLE, load_image
from vtprune_train.data.index import SampleIndex
from vtprune_train.data.records import turns_of
from vtprune_train.models.anyres import NEWLINE, AnyRes
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.stream import ImageSpan, PackedBatch, SegmentLayout, StreamPlan, plan_stream


@dataclass
class LoadedSample:
    """One sample ready to be laid out: its tokens, and its pictures with their sizes ``(height, width)``."""

    sample_id: str
    chat: EncodedChat
    sizes: list[tuple[int, int]]
    pixel_values: list[torch.Tensor]  # each [tiles, 3, h, w]


@dataclass
class Collator:
    """Makes packed batches of samples of an index.

    Args:
        index: where the samples are.
        encoder: conversations to tokens.
        anyres: the tiling geometry.
        image_processor: transformers' own; its tiles are the tower's input.
        method: plans the stages; ``None`` for a dense pass.
        cost: counts FLOPs; its decoder geometry gives the number of layers.
    """

    index: SampleIndex
    encoder: ChatEncoder
    anyres: AnyRes
    image_processor: LlavaNextImageProcessorPil
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
        pixels = []
        for name, size in zip(picture_row["images"], sizes, strict=True):
            try:
                pixels.append(self.tiles(load_image(folder / name, size)))
            except UNREADABLE as error:
                raise ValueError(f"image {folder / name}: {error}") from error
        return LoadedSample(self.index.sample_id(sample), self.encoder.encode(turns_of(row)), sizes, pixels)

    def tiles(self, image: Image.Image) -> torch.Tensor:
        """[tiles, 3, h, w] float32, the base tile first."""
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def pack(self, loaded: Sequence[LoadedSample], unreadable: tuple[tuple[str, str], ...] = ()) -> PackedBatch:
        """Lay samples end to end."""
        laid_out = [
            lay_out(sample.chat, [self.anyres.visual_index(size) for size in sample.sizes]) for sample in loaded
        ]
        segments = [segment for segment, _, _ in laid_out] or [SegmentLayout(length=1, query_offsets=(0,))]
        num_layers = self.cost.decoder.num_layers
        plan = plan_stream(segments, (), num_layers) if self.method is None else self.method.plan(segments, num_layers)
        ids = np.concatenate([ids for _, ids, _ in laid_out]) if laid_out else np.zeros(1, dtype=np.int64)
        tiles = [pixels for sample in loaded for pixels in sample.pixel_values]
        size = self.anyres.tile_size
        answers = [_answer_of_target(sample.chat) for sample in loaded]
        num_answers = np.cumsum([0, *(len(sample.chat.answer_starts) for sample in loaded)])
        targets = [sample.chat.labels[sample.chat.labels >= 0] for sample in loaded]
        visual_rows, visual_index = self._visual(loaded, segments, [parts for _, _, parts in laid_out])
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            visual_rows=visual_rows,
            visual_index=visual_index,
            pixel_values=torch.cat(tiles) if tiles else torch.zeros(1, 3, size, size),
            plan=plan,
            targets=torch.from_numpy(_join(targets)),
            answer_of_target=torch.from_numpy(_join([a + n for a, n in zip(answers, num_answers, strict=False)])),
            num_answers=int(num_answers[-1]),
            sample_ids=tuple(sample.sample_id for sample in loaded),
            unreadable=unreadable,
            costs=self._costs(loaded, plan, segments) if loaded else {},
        )

    def _row(self, sample: int) -> dict:
        return self.index.rows[int(self.index.source[sample])][int(self.index.row[sample])]

    def _visual(
        self, loaded: Sequence[LoadedSample], segments: Sequence[SegmentLayout], parts: list[list[np.ndarray]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream rows of visual tokens, and the feature row of each; the newline stands after all features."""
        rows, index, segment_start, tile_start = [], [], 0, 0
        for sample, segment, sample_parts in zip(loaded, segments, parts, strict=False):
            for span, part, pixels in zip(segment.spans, sample_parts, sample.pixel_values, strict=True):
                rows.append(np.arange(segment_start + span.start, segment_start + span.end))
                index.append(np.where(part == NEWLINE, NEWLINE, part + tile_start * self.anyres.patches_per_tile))
                tile_start += len(pixels)
            segment_start += segment.length
        newline = max(tile_start, 1) * self.anyres.patches_per_tile
        flat = _join(index)
        return torch.from_numpy(_join(rows)), torch.from_numpy(np.where(flat == NEWLINE, newline, flat))

    def _costs(
        self, loaded: Sequence[LoadedSample], plan: StreamPlan, segments: Sequence[SegmentLayout]
    ) -> dict[str, float]:
        tiles = np.array([sum(len(pixels) for pixels in sample.pixel_values) for sample in loaded])
        supervised = np.array([len(segment.supervised_offsets) for segment in segments])
        lengths = np.array([stage.segment_lengths for stage in plan.stages]).T
        layers = [stage.end_layer - stage.first_layer for stage in plan.stages]
        done = self.cost.sample(lengths, layers, tiles, supervised).sum()
        if self.method is not None:
            done += flops.selector_flops(self.cost.decoder, plan, self.method.rank_with == "next_layer")
        dense = self.cost.sample(lengths[:, :1], [sum(layers)], tiles, supervised).sum()
        per_stage = {f"tokens_stage_{i}": float(stage.num_tokens) for i, stage in enumerate(plan.stages)}
        visual = sum(span.length for segment in segments for span in segment.spans)
        return {"flops": float(done), "flops_dense": float(dense), "visual_tokens": float(visual), **per_stage}


def lay_out(
    chat: EncodedChat, visual_indices: Sequence[np.ndarray]
) -> tuple[SegmentLayout, np.ndarray, list[np.ndarray]]:
    """Expand each image's single token to its visual tokens.

    Returns:
        the segment's layout, its [L] input ids, and the images' feature indices as given.
    """
    assert len(chat.image_offsets) == len(visual_indices), "one index per image"
    extra = np.zeros(len(chat.input_ids) + 1, dtype=np.int64)
    for offset, index in zip(chat.image_offsets, visual_indices, strict=True):
        extra[offset + 1] = len(index) - 1
    moved = np.arange(len(chat.input_ids) + 1) + np.cumsum(extra)
    spans = tuple(
        ImageSpan(int(moved[offset]), len(index))
        for offset, index in zip(chat.image_offsets, visual_indices, strict=True)
    )
    repeats = np.ones(len(chat.input_ids), dtype=np.int64)
    repeats[list(chat.image_offsets)] = [len(index) for index in visual_indices]
    segment = SegmentLayout(
        length=int(repeats.sum()),
        spans=spans,
        query_offsets=tuple(int(moved[start]) - 1 for start in chat.answer_starts),
        supervised_offsets=tuple(moved[:-1][chat.labels >= 0].tolist()),
    )
    return segment, np.repeat(chat.input_ids, repeats), list(visual_indices)


def _answer_of_target(chat: EncodedChat) -> np.ndarray:
    supervised = np.flatnonzero(chat.labels >= 0)
    return np.searchsorted(np.array(chat.answer_starts), supervised, side="right") - 1


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
