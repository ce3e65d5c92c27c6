"""What a pruning method is given at a drop point, and what it returns.

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
    """Queries and keys of the ranking layer, rotated unless the method asked otherwise (``rotary = False``).

    ``queries`` [Q, H, D] of ``boundary.query_rows``; ``keys`` [T, G, D] of the whole stream (G key-value heads);
    ``scaling`` multiplies their products. ``ones`` [Q, D] and [V, D], where the method asked for them
    (``gravity = True``): vectors of ones, rotated as the queries and the candidates' keys are.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    ones: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class EncoderSignals:
    """What the vision tower thought of the candidates, read from its own projections (no second pass, no gradient).

    Tokens that are no patch (newlines, learned ones) have NaN attention and zero keys.

    Args:
        attention: [layers, V] float32, for each layer of :attr:`PruningMethod.encoder_layers`, the attention that a
            patch receives, averaged over heads: from the class token; in towers without one, or where
            :attr:`PruningMethod.encoder_rows` asks all, from all tokens of its tile on average.
        keys: [V, tower hidden] of the last of those layers, all heads side by side.
        tile: [V] int64, the tile that a token's patch lies in, counted over the batch; -1 where it is no patch.
    """

    attention: Tensor
    keys: Tensor
    tile: Tensor


@dataclass
class Candidates:
    """What a method sees at a boundary. Candidates stand span after span, in the order of ``boundary.span_of_visual``.

    Args:
        boundary: what the host knows.
        hidden: [V, C] the residual stream at the candidates, with gradients; where tokens return, those that were set
            aside as they were then.
        before: [V, C] where tokens return: the states of all candidates as they were at the method's last boundary;
            elsewhere ``hidden``.
        instruction: [Q, C] the residual stream at ``boundary.query_rows``.
        ranking: the attention that ranks; ``None`` where ``rank_with`` is ``None``.
        encoder: where :attr:`PruningMethod.encoder_layers` names layers.
        memory: the method's own notes of this forward pass, empty at its first boundary.
        module: what :meth:`PruningMethod.module` made.
        training: whether gradients are wanted.
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
    """What enters the next stage.

    Args:
        chosen: [K] int64, the candidate that each visual token of the next stage is (or whose position it takes), span
            after span, in the order in which they will stand.
        at: [R] int64, places in K whose content is replaced; ``None`` where each token stays what it was.
        values: [R, C], what stands there instead.
        counts: [spans] int64, tokens of each span in ``chosen``; ``None`` where the plan's counts hold.
    """

    chosen: Tensor
    at: Tensor | None = None
    values: Tensor | None = None
    counts: Tensor | None = None
