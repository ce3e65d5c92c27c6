"""Inputs and outputs of a pruning method at a drop point.

Shape suffixes: T tokens in the stream, V candidates (visual tokens before a boundary), K tokens after it, Q query rows,
H query heads, G key-value heads, D head size, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtprune_train.core.stream import Boundary


@dataclass(frozen=True)
class Ranking:
    """Queries and keys of the ranking layer, with rotary embedding applied unless the method needs ``rotary=False``.

    ``queries`` [Q, H, D] of ``boundary.query_rows``; ``keys`` [T, G, D] cover the whole packed batch (G key-value
    heads); ``scaling`` is the softmax scale of the dot products. ``ones`` (only with ``gravity=True``): a pair of
    all-ones tensors [Q, D] and [V, D], rotated like the queries and the candidates' keys.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    ones: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class EncoderSignals:
    """Vision-tower attention, keys and features for the candidates, captured during the tower's forward pass (no second
    pass, no gradients).

    Tokens that are not patches (newline or learned tokens) have NaN attention, and zero keys and features.

    Args:
        attention: [layers, V] float32, for each layer of :attr:`Needs.encoder_layers` the attention that each patch
            receives, averaged over heads: from the class token, or, if the tower has none or :attr:`Needs.encoder_rows`
            is ``all``, the mean over all tokens of its tile.
        keys: [V, tower hidden], keys of the last of those layers, heads concatenated; [V, 0] without such layers.
        tile: [V] int64, batch-wide index of each token's tile; -1 for tokens that are not patches.
        features: [V, projector input], the tower's features that the projector reads (class token excluded); ``None``
            unless the method sets :attr:`Needs.encoder_features`.
    """

    attention: Tensor
    keys: Tensor
    tile: Tensor
    features: Tensor | None = None


@dataclass
class Candidates:
    """Everything a method receives at a drop point. Candidates are ordered span by span, matching
    ``boundary.span_of_visual``.

    Args:
        boundary: host-side layout of the drop point.
        hidden: [V, C] hidden states of the candidates, with gradients. At a return, tokens that were set aside have the
            hidden states they had when set aside.
        before: [V, C] at a return, the hidden states of all candidates at this method's previous drop point; otherwise
            the same as ``hidden``.
        instruction: [Q, C] hidden states of the query rows (``boundary.query_rows``).
        ranking: queries and keys of the ranking layer; ``None`` if the method needs none.
        encoder: vision-tower signals; ``None`` unless the method sets :attr:`Needs.encoder_layers` or
            :attr:`Needs.encoder_features`.
        memory: scratch space for this method during one forward pass; empty at its first drop point.
        module: the module returned by :meth:`PruningMethod.module`.
        training: whether gradients are needed.
    """

    boundary: Boundary
    hidden: Tensor
    before: Tensor
    instruction: Tensor
    ranking: Ranking | None = None
    encoder: EncoderSignals | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    training: bool = False


@dataclass(frozen=True)
class Selection:
    """The visual tokens that enter the next stage.

    Args:
        chosen: [K] int64, candidate index of each visual token of the next stage, span by span, in output order. A
            learned token has the index of the candidate whose position it takes.
        at: [R] int64, indices into K whose hidden states are replaced; ``None`` if none are.
        values: [R, C], the replacement hidden states.
        counts: [spans] int64, number of tokens per span in ``chosen``; ``None`` if they match the plan.
    """

    chosen: Tensor
    at: Tensor | None = None
    values: Tensor | None = None
    counts: Tensor | None = None
