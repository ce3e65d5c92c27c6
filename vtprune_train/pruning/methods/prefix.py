"""Learned tokens before each image that tell the model that tokens were dropped (DualSpeed, arXiv 2602.03815)."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import nn

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.learned import Joining, Registers, join_registers


class Prefix(PruningMethod):
    """Insert ``tokens`` learned tokens before each image, ahead of the decoder. The method drops nothing itself:
    combine it with a method that drops before the decoder, listed first, and with ``full_token_share``. Passes on all
    tokens have no prefix, so the model can tell the two apart.

    The published code (dingkun-zhang/DualSpeed @ 99337cb, ``mode_isolator``) inserts the same vectors before every
    tile; its recipe has one tile per image. It initializes them uniformly in +-1/sqrt(hidden); here they have the
    initializer of the decoder's embeddings.

    Args:
        tokens: learned tokens before each image; the published code has 4.
    """

    tokens: PositiveInt = 4

    name = "prefix"
    paper = (
        "Fast-Slow Efficient Training for Multimodal Large Language Models via Visual Token Pruning (arXiv 2602.03815)"
    )
    where = "before the image"
    trains = "yes, required: the prefix is learned; combine it with a method that drops tokens"

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Joining(0, 1.0, adds=True, number=self.tokens),)

    def module(self, hidden: int, num_layers: int) -> nn.Module:
        return Registers(self.tokens, hidden)

    def choose(self, candidates: Candidates) -> Selection:
        return join_registers(candidates, self.tokens, before=True)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        raise ValueError("prefix drops no tokens, so it has no budget; combine it with a method that has one")
