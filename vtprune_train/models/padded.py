"""The padded interface of a pruned model: what a Hugging Face processor makes goes in, packed inside.

Shape suffixes: B samples, L padded length, N vocabulary.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast

from vtprune_train.models import HFModule
from vtprune_train.models.anyres import NEWLINE, AnyRes
from vtprune_train.stream import IGNORE, ImageSpan, PackedBatch, SegmentLayout, plan_stream


def forward(
    model: HFModule,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    labels: Tensor | None = None,
    **unused: Any,
) -> LlavaNextCausalLMOutputWithPast:
    """One forward pass over padded rows (left or right), with the tokens dropped inside.

    Args:
        model: pruned.
        input_ids: [B, L] int64, each image expanded to its tokens, as the processor does.
        attention_mask: [B, L], 0 for padding; ``None`` means no padding.
        pixel_values: [images, tiles, 3, h, w], with ``image_sizes`` [images, 2] (height, width).
        labels: [B, L] int64, -100 where not supervised; image tokens never are. The row before the first token of every
            supervised run ranks the visual tokens; without labels the last token of each row does.

    Returns:
        ``logits`` [B, L, N], zero in rows of padding and of dropped visual tokens; ``loss``, the mean over supervised
        tokens, if labels were given.

    Raises:
        ValueError: a keyword that needs what a pruned model does not have (a key-value cache, input embeddings), or
            images that do not match their tokens.
    """
    if input_ids is None:
        raise ValueError("a pruned model needs input_ids (inputs_embeds does not say where the images are)")
    num_items = unused.pop("num_items_in_batch", None)
    for key, value in unused.items():
        if key == "return_dict" or value is None or value is False or (key == "logits_to_keep" and value == 0):
            continue
        if key in ("use_cache", "past_key_values", "logits_to_keep"):
            raise ValueError(f"a pruned model does not take {key}; it has no key-value cache: unprune it to generate")
        raise ValueError(f"a pruned model does not take {key}; it takes what a LLaVA-NeXT processor makes, and labels")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = mask.cpu().numpy().astype(bool)
    ids = input_ids.cpu().numpy()
    targets = None if labels is None else np.where(ids == model.config.image_token_id, IGNORE, labels.cpu().numpy())
    anyres = AnyRes.of(model.config)
    sizes = [] if image_sizes is None else torch.as_tensor(image_sizes).cpu().tolist()
    batch, logit_rows = _pack(model, ids, rows, targets, sizes, pixel_values, anyres)
    batch = batch.to(input_ids.device)
    loss_rows = batch.plan.predict_rows
    batch.plan.predict_rows = torch.arange(batch.plan.stages[-1].num_tokens, device=input_ids.device)
    hidden, kept = model.model(batch)
    packed = model.lm_head(hidden)
    logits = packed.new_zeros((*input_ids.shape, packed.shape[-1]))
    survivors = torch.arange(len(batch.input_ids), device=input_ids.device)
    for rows_kept in kept:
        survivors = survivors.index_select(0, rows_kept)
    places = torch.from_numpy(logit_rows).to(input_ids.device).index_select(0, survivors)
    logits = logits.flatten(0, 1).index_copy(0, places, packed).view(logits.shape)
    loss = None
    if labels is not None:
        total = nn.functional.cross_entropy(packed.index_select(0, loss_rows).float(), batch.targets, reduction="sum")
        loss = total / (len(batch.targets) if num_items is None else num_items)
    return LlavaNextCausalLMOutputWithPast(loss=loss, logits=logits)


def _pack(
    model: HFModule,
    ids: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray | None,
    sizes: list[list[int]],
    pixel_values: Tensor | None,
    anyres: AnyRes,
) -> tuple[PackedBatch, np.ndarray]:
    """A packed batch of all real tokens, and the flat padded row of each of them."""
    remaining = list(enumerate(sizes))
    segments, index_parts, tiles = [], [], []
    newline_after = 0
    for row in range(ids.shape[0]):
        tokens = ids[row][mask[row]]
        spans = []
        for start, length in _runs(tokens == model.config.image_token_id):
            offset = start
            while offset < start + length:
                if not remaining:
                    raise ValueError(f"row {row} has image tokens beyond the {len(sizes)} images given")
                image, size = remaining.pop(0)
                index = anyres.visual_index(size)
                spans.append(ImageSpan(offset, len(index)))
                offset += len(index)
                index_parts.append(np.where(index == NEWLINE, NEWLINE, index + newline_after))
                count = anyres.num_tiles(size)
                newline_after += count * anyres.patches_per_tile
                assert pixel_values is not None
                tiles.append(pixel_values[image, :count])
            if offset != start + length:
                raise ValueError(f"row {row}: {length} image tokens do not match the sizes of its images {sizes}")
        segments.append(_segment(tokens, None if labels is None else labels[row][mask[row]], tuple(spans)))
    if remaining:
        raise ValueError(f"{len(sizes)} images were given but the rows hold tokens of {len(sizes) - len(remaining)}")
    method = model.__dict__["_vtprune"]["method"]
    num_layers = len(model.model.language_model.layers)
    plan = plan_stream(segments, (), num_layers) if method is None else method.plan(segments, num_layers)
    blank = torch.zeros(1, 3, anyres.tile_size, anyres.tile_size)
    index = np.concatenate(index_parts) if index_parts else np.zeros(0, dtype=np.int64)
    flat = np.concatenate([ids[row][mask[row]] for row in range(ids.shape[0])])
    supervised = np.zeros(0, dtype=np.int64)
    if labels is not None:
        own = [labels[row][mask[row]][1:] for row in range(ids.shape[0])]
        supervised = np.concatenate([part[part != IGNORE] for part in own])
    batch = PackedBatch(
        input_ids=torch.from_numpy(flat),
        visual_rows=torch.from_numpy(np.flatnonzero(flat == model.config.image_token_id)),
        visual_index=torch.from_numpy(np.where(index == NEWLINE, newline_after, index)),
        pixel_values=torch.cat(tiles) if tiles else blank,
        plan=plan,
        targets=torch.from_numpy(supervised),
        answer_of_target=torch.zeros_like(torch.from_numpy(supervised)),
        num_answers=1,
    )
    return batch, np.flatnonzero(mask.ravel())


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """``(start, length)`` of every run of true values."""
    runs, position = [], 0
    for value, group in groupby(flags.tolist()):
        length = len(list(group))
        if value:
            runs.append((position, length))
        position += length
    return runs


def _segment(tokens: np.ndarray, labels: np.ndarray | None, spans: tuple[ImageSpan, ...]) -> SegmentLayout:
    queries = []
    if labels is not None:
        queries = [start - 1 for start, _ in _runs(labels != IGNORE) if start]
    supervised = () if labels is None else tuple((np.flatnonzero(labels[1:] != IGNORE) + 1).tolist())
    return SegmentLayout(
        length=len(tokens),
        spans=spans,
        query_offsets=tuple(queries) or (len(tokens) - 1,),
        supervised_offsets=supervised,
    )
