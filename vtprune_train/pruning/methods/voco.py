"""VoCo-LLaMA (arXiv 2406.12275): learned tokens after each image attend to it, and later text attends only to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Ranking, Selection
from vtprune_train.pruning.learned import Joining, Registers, is_register, join_registers
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.schedules.budget import COUNTED


class VoCo(PruningMethod):
    """Append ``tokens`` learned tokens to each image and mask everything before them from everything after them.

    In every layer the summary tokens attend to everything before them; later text and images attend to the summary, not
    to the image. After prefill the masked tokens are removed from every layer's cache. Prefill and training cost as
    much as without pruning.

    Args:
        tokens: summary tokens of an image.
        hide: which tokens are masked from everything after a summary. ``all_before`` (default, as published): the image
            tokens and everything before the sample's first image, including BOS and the system prompt. ``image``: only
            the image tokens.
    """

    tokens: PositiveInt = 2
    hide: Literal["all_before", "image"] = "all_before"

    name = "voco"
    paper = "VoCo-LLaMA: Towards Vision Compression with Large Language Models (arXiv 2406.12275)"
    where = "attention and key-value cache of every layer"
    trains = "yes, required: the summary is learned; training is not faster"
    before: ClassVar[Mapping[str, Any]] = {"hide": "image"}

    @property
    def needs(self) -> Needs:
        return Needs(hidden_after="span", hides_front=self.hide == "all_before")

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Joining(0, 1.0, adds=True, number=self.tokens),)

    def key_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def module(self, hidden: int, num_layers: int) -> nn.Module:
        return Registers(self.tokens, hidden)

    def choose(self, candidates: Candidates) -> Selection:
        return join_registers(candidates, self.tokens)

    def keys(self, layer: int, ranking: Ranking, boundary: Boundary) -> Tensor:
        """[G, V] bool, true for summary tokens."""
        return is_register(boundary.span_of_visual, self.tokens).expand(ranking.keys.shape[1], -1)

    def input_share(self, num_layers: int) -> float:
        """Share of an image's keys that text can attend to: close to 0 for any image size."""
        return self.tokens / COUNTED

    def kept_key_share(self, layer: int, length: float, num_layers: int) -> float:
        """Share of summary tokens among an image's ``length`` tokens (image plus summary)."""
        return min(1.0, self.tokens / max(1.0, length))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        raise ValueError(
            f"voco keeps {self.tokens} token(s) of an image in the cache regardless of its size, so it cannot be "
            f"fitted to a share such as {share:g}; set tokens instead"
        )
