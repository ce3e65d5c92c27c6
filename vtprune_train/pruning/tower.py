"""How a method changes the tokens inside the vision tower.

Shape suffixes: P tiles, N patches of a tile, n patches (or merged tokens) left in a layer, S tokens of a tile in the
tower (class tokens, then patches), M tower hidden size.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vtprune_train.core.flops import Grid, TowerGeometry
from vtprune_train.pruning.candidates import Candidates


class Merged(NamedTuple):
    """The tokens of all tiles between two steps of the tower.

    Args:
        hidden: [P, S, M].
        sizes: [P, S] float32, number of patches (or class tokens) that each token stands for.
        groups: [P, N] int64, index among S of the token that holds each patch.
    """

    hidden: Tensor
    sizes: Tensor
    groups: Tensor


class TowerChange:
    """What :attr:`Needs.tower` holds: the tower runs with fewer tokens, and each patch's features are those of the
    token that holds it. A frozen dataclass; its methods are pure functions. A ``tower`` is described by its
    :class:`~vtprune_train.core.flops.TowerGeometry`; only the layers before the decoder's features (its ``depth``) can
    change tokens.

    ``name`` is the method's name, for errors. ``learns``: whether it has parameters, so that gradients flow through a
    frozen tower too. ``fixed``: whether the groups depend on nothing but the tower's sizes.
    """

    name: str
    learns: ClassVar[bool] = False
    fixed: ClassVar[bool] = False

    def remaining(self, tower: TowerGeometry) -> tuple[int, ...]:
        """[depth] number of tokens of a tile, without class tokens, after the attention of each layer (host only).

        Raises:
            ValueError: a setting does not fit the tower.
        """
        raise NotImplementedError

    def lengths(self, tower: TowerGeometry) -> tuple[tuple[int, int], ...]:
        """[depth] number of tokens of a tile, without class tokens, in the attention and in the MLP of each layer."""
        after = self.remaining(tower)
        rows, columns = self.image_grid(tower)
        return tuple(zip((rows * columns, *after[:-1]), after, strict=True))

    def flops(self, tower: TowerGeometry) -> float:
        """FLOPs of the change itself for one tile."""
        return 0.0

    def image_grid(self, tower: TowerGeometry) -> Grid:
        """The grid of patches that tiles are resized to before the tower."""
        return tower.grid

    def merged(self, tower: TowerGeometry) -> int:
        """Number of tokens of a tile that the projector receives."""
        return self.remaining(tower)[-1]

    def start(self, hidden: Tensor, tower: TowerGeometry, module: nn.Module | None) -> Merged:
        """The tokens that enter the first layer, from the tower's embeddings ``hidden`` [P, S, M]. ``module`` is the
        one of :meth:`PruningMethod.tower_module`."""
        tiles, length = hidden.shape[:2]
        sizes = torch.ones(tiles, length, device=hidden.device)
        patches = torch.arange(tower.class_tokens, length, device=hidden.device)
        return Merged(hidden, sizes, patches.expand(tiles, -1))

    def bias(self, tokens: Merged, tower: TowerGeometry) -> Tensor | None:
        """[1 or P, 1, S, S] in the dtype of ``tokens.hidden``, added to the attention's logits in a layer."""
        return None

    def merge(self, tokens: Merged, keys_PSM: Tensor, heads: int, count: int, class_tokens: int) -> Merged:
        """Reduce each tile to ``count`` tokens, between attention and MLP of a layer; with gradients.

        Args:
            tokens: the tokens after attention.
            keys_PSM: keys of the layer's attention, without gradients, heads concatenated.
            heads: number of heads.
            count: what :meth:`remaining` says for this layer.
            class_tokens: number of leading tokens, which stay.
        """
        raise NotImplementedError

    def finish(self, tokens: Merged, tower: TowerGeometry, module: nn.Module | None) -> Merged:
        """The class tokens, and the tokens that the projector receives, from the output of the last layer before the
        features."""
        return tokens

    @property
    def needs_bias(self) -> bool:
        """Whether :meth:`bias` is not always ``None``."""
        return type(self).bias is not TowerChange.bias


def groups_of(candidates: Candidates) -> Tensor:
    """Return :attr:`EncoderSignals.group` of the candidates; empty if the batch has no image.

    Raises:
        ValueError: the tower did not run in this call.
    """
    signals = candidates.encoder
    if signals is not None and signals.group is not None:
        return signals.group
    if len(candidates.boundary.span_of_visual):
        raise ValueError(
            "the method changes the tokens of the vision tower, but the tower did not run in this call; pass "
            "pixel_values to the model"
        )
    return candidates.boundary.span_of_visual[:0]


def one_per_group(group_V: Tensor, span_V: Tensor) -> Tensor:
    """[V] float32 scores that rank one token of each group first: its first candidate, groups with more candidates
    before others. Tokens that are not patches come next, then the other candidates of the groups. Those that are equal
    in this are ranked so that the first ones are spread over the image.

    Args:
        group_V: [V] int64, group of each candidate; -1 for tokens that are not patches.
        span_V: [V] int64, image of each candidate, ascending. Copies of an image, as in beam search, have groups of
            the same numbers.
    """
    keys, at = torch.sort(torch.where(group_V < 0, -1, group_V + (span_V << 32)), stable=True)
    is_first = torch.cat([torch.ones_like(keys[:1]), (keys[1:] != keys[:-1]).long()])
    number = is_first.cumsum(0) - 1  # of each group that has candidates
    sizes = torch.zeros_like(keys).index_add(0, number, torch.ones_like(keys)).index_select(0, number)
    scores = torch.where(keys < 0, 1, torch.where(is_first > 0, 1 + sizes, 0))
    ranked = torch.empty_like(scores, dtype=torch.float32).index_copy(0, at, scores.float())
    return ranked + _spread_out(span_V) / SPREAD


SPREAD = 4096  # with counts of up to as many tokens, sums are exact in float32


def _spread_out(span_V: Tensor) -> Tensor:
    """[V] int64 in ``range(SPREAD)``, such that the tokens of an image with the largest ones are spread evenly over it:
    multiples of about the golden ratio."""
    index = torch.arange(len(span_V), device=span_V.device)
    is_first = torch.cat([torch.ones_like(span_V[:1]), (span_V[1:] != span_V[:-1]).long()]) > 0
    local = index - torch.where(is_first, index, 0).cummax(0).values
    return (local * 2531) % SPREAD
