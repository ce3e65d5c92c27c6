"""What methods with parameters are made of: learned tokens that stand after an image, and routers.

Every module here is called with rows [n, C] of the stream, of which there may be none: an empty result still takes part
in the gradients, so that ranks with and without images stay together.

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
    """Learned tokens, the same after every image; made like the decoder's own embeddings.

    Args:
        number: how many stand after an image.
        hidden: C.
    """

    def __init__(self, number: int, hidden: int):
        super().__init__(number, hidden)

    def forward(self, rows: Tensor) -> Tensor:
        """[n, C] one row an image -> [n * number, C], image after image."""
        return self.weight.repeat(len(rows), 1)


class Routers(nn.ModuleDict):
    """A linear router for each of some decoder layers. They start near zero, so that no token is preferred by much.

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
        """[n, C] -> [n, layers], what every router says."""
        return torch.cat([router(rows) for router in self.values()], dim=-1)


@dataclass(frozen=True)
class Joining(Drop):
    """A boundary at which ``number`` learned tokens join each image (one of which nothing is left gets none)."""

    number: int = 0

    def kept(self, length: int, before: int) -> int:
        return before + self.number if before else 0


@dataclass(frozen=True)
class Staying(Drop):
    """A boundary at which the last ``number`` tokens of each image stay, whatever its length."""

    number: int = 0

    def kept(self, length: int, before: int) -> int:
        return min(self.number, before)


def join_registers(candidates: Candidates, number: int) -> Selection:
    """All candidates, and after each span's last the registers of ``candidates.module``.

    Registers take the place of the span's last token, which is where they stand in an image and in time.
    """
    hidden, spans = candidates.hidden, [span for span in candidates.boundary.spans if span.before]
    chosen, at = joined(spans, number, len(hidden), hidden.device)
    assert candidates.module is not None, "the module that this method asked for is not there"
    return Selection(chosen, at, candidates.module(hidden.index_select(0, _last(spans, hidden.device))))


def joined(spans: Sequence[SpanLayout], number: int, num_visual: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where ``number`` tokens stand after each span.

    Args:
        spans: those that hold tokens.
        number: what joins each.
        num_visual: V.
        device: where the results go.

    Returns:
        [K] int64, all V candidates in order, each span's last ``number`` times more; and [spans * number] int64, which
        of these K are new.
    """
    last = _last(spans, device)
    every = torch.arange(num_visual, device=device)
    chosen = torch.sort(torch.cat([every, last.repeat_interleave(number)])).values
    behind = torch.arange(len(spans), device=device) * number + last + 1  # the first new place of each span
    at = (behind[:, None] + torch.arange(number, device=device)).flatten()
    return chosen, at


def is_register(span_V: Tensor, number: int) -> Tensor:
    """[V] bool, the last ``number`` tokens of every span.

    Args:
        span_V: [V] int64, the span of each token, ascending; each holds at least ``number``.
        number: registers of a span.
    """
    other = torch.cat([span_V[number:], torch.full_like(span_V[:number], -1)])
    return other != span_V


def _last(spans: Sequence[SpanLayout], device: torch.device) -> Tensor:
    """[spans] int64, each span's last candidate."""
    ends = np.cumsum([span.before for span in spans], dtype=np.int64)
    return to_device(ends - 1, device)


def learns(method: PruningMethod | None) -> bool:
    """Whether a method (or one of a combination) adds parameters to the model."""
    return method is not None and any(type(part).module is not PruningMethod.module for part in method.parts)
