"""Rows of a packed batch in which text stands between the tokens of a video, computed on the device.

The number of tokens in each stage is planned as for any batch. The row of a text between two frames is not: it depends
on how many tokens of the earlier frames are kept. Nothing is read from the device.

Shape suffixes: T tokens in the stream, V visual tokens, K kept visual tokens.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary


class Rows(NamedTuple):
    """The rows of a stage: ``text`` [T - V] int64 ascending, and ``visual`` [V] int64 in the order of the
    candidates."""

    text: Tensor
    visual: Tensor


def locate(boundary: Boundary, rows: Rows) -> Boundary:
    """The boundary with the rows of its stage."""
    assert boundary.scored_shift is not None, "the rows of this boundary are known on the host"
    return dataclasses.replace(
        boundary, text_rows=rows.text, visual_rows=rows.visual, visual_in_scored=rows.visual + boundary.scored_shift
    )


def advance(boundary: Boundary, text_origin: Tensor, kept_origin: Tensor) -> tuple[Boundary, Rows]:
    """Order the tokens of the next stage by their rows in the first stage. Visual tokens stay in the order of the
    selection: a merged token follows the kept tokens of its image or video.

    Args:
        boundary: a drop point.
        text_origin: [T - V] int64, first-stage row of each text token.
        kept_origin: [K] int64, first-stage row of each kept visual token, or of one of the sources of a merged token.

    Returns:
        The boundary with ``next_order`` and ``next_visual_rows``, and the rows of the next stage.
    """
    order = torch.argsort(torch.cat([text_origin, kept_origin.cummax(0).values]), stable=True)
    row = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    rows = Rows(row[: len(text_origin)], row[len(text_origin) :])
    return dataclasses.replace(boundary, next_order=order, next_visual_rows=rows.visual), rows
