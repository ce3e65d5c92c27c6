"""Which visual tokens of each image a pruned model keeps, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vtprune_train.models import HFModule
from vtprune_train.models.anyres import AnyRes
from vtprune_train.models.padded import _pack


def stage_layers(model: HFModule) -> list[range]:
    """The decoder layers of each stage of a pruned model, counted from 0."""
    num_layers = len(model.model.language_model.layers)
    method = model.__dict__["_vtprune"]["method"]
    drops = () if method is None else method.drops(num_layers)
    edges = [0, *(drop.layer for drop in drops), num_layers]
    return [range(first, end) for first, end in pairwise(edges)]


@torch.no_grad()
def kept_tokens(model: HFModule, inputs: Mapping[str, Tensor]) -> list[list[list[np.ndarray]]]:
    """Run a pruned model and see what survives.

    Args:
        model: pruned, in the mode it is to be looked at.
        inputs: of :func:`vtprune_train.models.padded.forward`, without labels: the last token of each row ranks.

    Returns:
        for each row of the batch, each of its images, each stage after the first: [K] int64, ascending indices into
        that image's visual tokens.

    Raises:
        ValueError: images that do not match their tokens.
    """
    ids = inputs["input_ids"].cpu().numpy()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).cpu().numpy().astype(bool)
    sizes = inputs["image_sizes"].cpu().tolist() if "image_sizes" in inputs else []
    anyres = AnyRes.of(model.config)
    batch, _ = _pack(model, ids, mask, None, sizes, inputs.get("pixel_values"), anyres)
    output = model(batch.to(inputs["input_ids"].device))
    stages = [np.arange(len(batch.input_ids))]
    for kept in output.kept:
        stages.append(stages[-1][kept.cpu().numpy()])

    visual_rows = batch.visual_rows.numpy()
    spans = np.split(visual_rows, np.cumsum([anyres.num_tokens(size) for size in sizes]))[:-1]
    images = [[np.flatnonzero(np.isin(span, rows)) for rows in stages[1:]] for span in spans]
    row_of_image = np.searchsorted(np.cumsum(mask.sum(axis=1)), [span[0] for span in spans], side="right")
    return [[images[i] for i in np.flatnonzero(row_of_image == row)] for row in range(len(ids))]
