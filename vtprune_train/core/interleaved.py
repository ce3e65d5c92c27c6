"""Rows of a packed batch in which text stands between the tokens of a video, computed on the device.

The number of tokens in each stage is planned as for any batch. How many of a video's kept tokens come before a text
between its frames depends on the choice, so these rows cannot be planned. Nothing is read from the device.

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
    """Order the tokens of the next stage by their rows in the first stage. Kept tokens of a span without text between
    them stay in the order of the choice, as in a batch without such videos.

    Args:
        boundary: a drop point.
        text_origin: [T - V] int64, first-stage row of each text token.
        kept_origin: [K] int64, first-stage row of each kept visual token; merged tokens have the row of one of their
            sources.

    Returns:
        The boundary with ``next_order`` and ``next_visual_rows``, and the rows of the next stage.
    """
    assert boundary.scattered is not None, "the rows of this boundary are known on the host"
    in_place = kept_origin.sort().values  # spans do not overlap: each has its own rows, ascending
    kept_origin = torch.where(boundary.scattered, kept_origin, in_place)
    order = torch.argsort(torch.cat([text_origin, kept_origin]), stable=True)
    row = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    rows = Rows(row[: len(text_origin)], row[len(text_origin) :])
    return dataclasses.replace(boundary, next_order=order, next_visual_rows=rows.visual), rows
