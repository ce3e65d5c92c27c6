"""What a pruning method needs from the decoder loop."""

from __future__ import annotations

from typing import Literal

from vtprune_train.pruning.setting_types import Settings

RankWith = Literal["next_layer", "this_layer"]
Positions = Literal["renumber", "keep"]
MultiTurn = Literal["drop", "keep_dense"]
HiddenAfter = Literal["query", "span"]
EncoderRows = Literal["class", "all"]


class Needs(Settings):
    """What :attr:`~vtprune_train.pruning.base.PruningMethod.needs` returns: what the loop computes for the method at
    its drop points, and how it treats the tokens afterwards.

    Args:
        rank_with: the layer whose queries and keys :attr:`Candidates.ranking` holds: ``next_layer``, the first layer of
            the next stage; ``this_layer``, the last layer of the current stage (no extra projection); ``None``, no
            ranking.
        rotary: apply the rotary embedding to the queries and keys of the ranking.
        gravity: add rotated all-ones vectors to the ranking; their dot products give the attention due to positions
            alone.
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` keeps their original positions.
        differentiable: compute ranking and choice with gradients, which reach the model through
            :attr:`Selection.values`.
        multi_turn: what a later turn on the same cache sees of earlier images: ``drop``, the tokens that were kept;
            ``keep_dense``, all tokens, ranked again by the new question.
        encoder_layers: layers of the vision tower whose attention :attr:`Candidates.encoder` holds; negative ones count
            from the end, and -1 is the last layer whose features the decoder receives; a float is a share of the depth
            from 0.0, the first layer, to 1.0, that last layer.
        encoder_rows: which attention to read: that of the class token (``class``), or the mean over all tokens of the
            tile (``all``).
        encoder_features: provide the features of the vision tower that the projector reads, in
            :attr:`Candidates.encoder`; alone or together with ``encoder_layers``.
        hidden_after: from where on rows no longer see the keys that :meth:`PruningMethod.keys` drops: after the first
            query row that follows the image (``query``), or right after the image's span (``span``).
        hides_front: also mask the tokens before a sample's first image (text, and in a later turn all earlier turns)
            from the rows after that image; for methods with ``hidden_after="span"`` that choose keys in all layers.
    """

    rank_with: RankWith | None = None
    rotary: bool = True
    gravity: bool = False
    positions: Positions = "keep"
    differentiable: bool = False
    multi_turn: MultiTurn = "drop"
    encoder_layers: tuple[int | float, ...] = ()
    encoder_rows: EncoderRows = "class"
    encoder_features: bool = False
    hidden_after: HiddenAfter = "query"
    hides_front: bool = False

    @property
    def from_tower(self) -> str:
        """What is read from the vision tower, for messages; empty if nothing is."""
        if self.encoder_layers:
            return "the vision tower's attention"
        return "the vision tower's output" if self.encoder_features else ""
