"""VoCo-LLaMA (arXiv 2406.12275): learned tokens after each image see it, and the text sees only them."""

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
    """Put ``tokens`` learned tokens after each image and hide what stands before them from everything after them.

    In every layer the summary sees all that precedes it; later text (and later images) see the summary, not the image.
    After prefill the hidden tokens leave the cache of every layer. Prefill and training do all the work of a dense
    pass.

    Args:
        tokens: summary tokens of an image.
        hide: what rows after a summary do not see. ``all_before`` (default, as published): the images' own tokens and
            everything before a sample's first image, the beginning-of-sequence token and the system prompt included.
            ``image``: the images' own tokens alone.
    """

    tokens: PositiveInt = 2
    hide: Literal["all_before", "image"] = "all_before"

    name = "voco"
    paper = "VoCo-LLaMA: Towards Vision Compression with Large Language Models (arXiv 2406.12275)"
    where = "attention and key-value cache of every layer"
    trains = "yes, and must be: the summary is learned; training is not faster"
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
        """[G, V] bool, true for the summaries."""
        return is_register(boundary.span_of_visual, self.tokens).expand(ranking.keys.shape[1], -1)

    def input_share(self, num_layers: int) -> float:
        """The keys of an image that text sees, as a share of its tokens: next to nothing for an image of any size."""
        return self.tokens / COUNTED

    def kept_key_share(self, layer: int, length: float, num_layers: int) -> float:
        """The summaries among the ``length`` tokens, theirs included, of an image."""
        return min(1.0, self.tokens / max(1.0, length))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        raise ValueError(
            f"voco leaves {self.tokens} token(s) of an image in the cache whatever its size, which is no share such as "
            f"{share:g}; set tokens yourself"
        )
