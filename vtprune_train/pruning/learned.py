"""Building blocks of methods with learned parameters: learned tokens placed after an image, and routers.

Every module here takes hidden states [n, C], where n may be 0: an empty output still joins the autograd graph so that
ranks with and without images run the same collectives.

Shape suffixes: V visual tokens, K visual tokens of the next stage, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vtprune_train.core.stream import Drop, SpanLayout, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection


class Registers(nn.Embedding):
    """Learned tokens shared by all images, initialized like the decoder's embeddings.

    Args:
        number: number of learned tokens per image.
        hidden: C.
    """

    def __init__(self, number: int, hidden: int):
        super().__init__(number, hidden)

    def forward(self, rows: Tensor) -> Tensor:
        """[n, C], one row per image -> [n * number, C], grouped by image."""
        return self.weight.repeat(len(rows), 1)


class Routers(nn.ModuleDict):
    """One linear router per routed decoder layer. Initialized near zero so that no token is strongly preferred at the
    start.

    Args:
        layers: the decoder layers, counted from 0.
        hidden: C.
    """

    def __init__(self, layers: Sequence[int], hidden: int):
        super().__init__({str(layer): nn.Linear(hidden, 1, bias=False) for layer in layers})
        for router in self.values():
            assert isinstance(router, nn.Linear)
            nn.init.normal_(router.weight, std=0.02 * hidden**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        """[n, C] -> [n, layers], router logits."""
        return torch.cat([router(rows) for router in self.values()], dim=-1)


@dataclass(frozen=True)
class Joining(Drop):
    """A drop point that appends ``number`` learned tokens to each image; images with no remaining tokens get none."""

    number: int = 0

    def kept(self, length: int, before: int) -> int:
        return before + self.number if before else 0


@dataclass(frozen=True)
class Staying(Drop):
    """A drop point that keeps exactly the last ``number`` tokens of each image, whatever its length."""

    number: int = 0

    def kept(self, length: int, before: int) -> int:
        return min(self.number, before)


def join_registers(candidates: Candidates, number: int, before: bool = False) -> Selection:
    """Select all candidates and append the registers of ``candidates.module`` to each span, or insert them ``before``
    its first token.

    Registers get the position id of the token they stand next to, so their spatial and temporal coordinates match it.
    """
    hidden, spans = candidates.hidden, [span for span in candidates.boundary.spans if span.before]
    chosen, at = joined(spans, number, len(hidden), hidden.device, before)
    assert candidates.module is not None, "the method's module is missing"
    beside = _first(spans, hidden.device) if before else _last(spans, hidden.device)
    return Selection(chosen, at, candidates.module(hidden.index_select(0, beside)))


def joined(
    spans: Sequence[SpanLayout], number: int, num_visual: int, device: torch.device, before: bool = False
) -> tuple[Tensor, Tensor]:
    """Indices after inserting ``number`` tokens at the end of each span, or ``before`` it.

    Args:
        spans: the non-empty spans.
        number: tokens added per span.
        num_visual: V.
        device: device of the returned tensors.
        before: insert them before the span.

    Returns:
        [K] int64, all V candidate indices in order, with each span's last (or first) index repeated ``number`` more
        times; and [spans * number] int64, indices into K of the added tokens.
    """
    beside = _first(spans, device) if before else _last(spans, device)
    every = torch.arange(num_visual, device=device)
    chosen = torch.sort(torch.cat([every, beside.repeat_interleave(number)])).values
    shifted = torch.arange(len(spans), device=device) * number + beside  # index of the token beside each span's block
    at = (shifted[:, None] + torch.arange(number, device=device)).flatten()
    return chosen, at if before else at + 1


def is_register(span_V: Tensor, number: int) -> Tensor:
    """Return a [V] bool mask of the last ``number`` tokens of every span.

    Args:
        span_V: [V] int64, the span of each token, ascending; each holds at least ``number``.
        number: registers per span.
    """
    other = torch.cat([span_V[number:], torch.full_like(span_V[:number], -1)])
    return other != span_V


def _first(spans: Sequence[SpanLayout], device: torch.device) -> Tensor:
    """[spans] int64, index of each span's first candidate."""
    lengths = np.array([span.before for span in spans], dtype=np.int64)
    return to_device(np.cumsum(lengths) - lengths, device)


def _last(spans: Sequence[SpanLayout], device: torch.device) -> Tensor:
    """[spans] int64, index of each span's last candidate."""
    ends = np.cumsum([span.before for span in spans], dtype=np.int64)
    return to_device(ends - 1, device)


def learns(method: PruningMethod | None) -> bool:
    """Return whether the method, or any method in a combination, has learned parameters."""
    return method is not None and any(type(part).module is not PruningMethod.module for part in method.parts)
