"""ToMe (arXiv 2210.09461): merges similar tokens inside the vision tower, layer by layer.

Shape suffixes: P tiles, S tokens of a tile, M tower hidden size, a tokens of the first set, b tokens of the second set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.core.rounding import floor_of
from vtprune_train.pruning.methods.one_share import MergedInTower
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.tower import Merged, TowerChange


class ToMe(MergedInTower):
    """Inside the vision tower, each tile's n patches are merged into ``floor(keep * n)`` tokens; each image then keeps
    ``floor(keep * n)`` of its tokens, one for each merged token.

    Args:
        keep: share of a tile's patches that remain after the last merge, in (0, 1].
        layers: layers of the vision tower in which tokens are merged, counted from 0; negative ones count from the
            layer whose output the projector receives (-1). Each merges about as many tokens as the others, and at most
            half of those it has. ``None`` (published): all of them.
        proportional: whether attention adds the logarithm of the number of patches that a token stands for
            (published; the paper leaves it out for towers trained with merging or as masked autoencoders).
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` keeps the position of the first patch of
            each merged token.
    """

    layers: tuple[int, ...] | None = None
    proportional: bool = True

    name = "tome"
    paper = "Token Merging: Your ViT But Faster (arXiv 2210.09461)"
    trains = "yes; gradients reach all merged tokens"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, tower=Merging(self.name, self.keep, self.layers, self.proportional))


@dataclass(frozen=True)
class Merging(TowerChange):
    """The merging of :class:`ToMe`."""

    name: str
    keep: float
    layers: tuple[int, ...] | None
    proportional: bool

    def remaining(self, tower: TowerGeometry) -> tuple[int, ...]:
        chosen = self._layers(tower.depth)
        removed = tower.patches - max(1, floor_of(self.keep, tower.patches))
        counts, before = [], tower.patches
        for layer in range(tower.depth):
            now = before
            if layer in chosen:
                now = tower.patches - removed * (chosen.index(layer) + 1) // len(chosen)
            if before - now > before // 2:
                raise ValueError(
                    f"keep={self.keep:g} would merge {before - now} of {before} tokens in layer {layer} of the vision "
                    "tower, but a layer can merge at most half; list more layers, or keep more"
                )
            counts.append(now)
            before = now
        return tuple(counts)

    def _layers(self, depth: int) -> list[int]:
        if self.layers is None:
            return list(range(depth))
        layers = [layer + depth if layer < 0 else layer for layer in self.layers]
        if wrong := [given for given, layer in zip(self.layers, layers, strict=True) if not 0 <= layer < depth]:
            raise ValueError(
                f"layers={list(self.layers)}: tokens cannot be merged in layer {wrong[0]} of the vision tower, because "
                f"the decoder's features come from its first {depth} layers; use 0 to {depth - 1}, or -{depth} to -1"
            )
        if not layers or sorted(set(layers)) != layers:
            raise ValueError(f"layers={list(self.layers)} must name at least one layer, in ascending order")
        return layers

    def flops(self, tower: TowerGeometry) -> float:
        """Similarities, of keys averaged over heads, and sums of merged tokens."""
        total = 0.0
        for before, after in self.lengths(tower):
            if before > after:
                second = (before + tower.class_tokens) // 2
                head = tower.hidden / tower.heads
                total += (
                    2.0 * second * (head * (before + tower.class_tokens - second) + tower.hidden * (before - after))
                )
        return total

    def bias(self, tokens: Merged, tower: TowerGeometry) -> Tensor | None:
        """The logarithm of the size of each key, once tokens have been merged."""
        length = tokens.hidden.shape[1]
        if not self.proportional or length == tower.class_tokens + tower.patches:
            return None
        bias = tokens.sizes.log().to(tokens.hidden.dtype)
        return bias[:, None, None].expand(-1, 1, length, -1)

    @property
    def needs_bias(self) -> bool:
        return self.proportional

    def merge(self, tokens: Merged, keys_PSM: Tensor, heads: int, count: int, class_tokens: int) -> Merged:
        metric = keys_PSM.unflatten(-1, (heads, -1)).mean(dim=2)
        return merged(tokens, metric, tokens.hidden.shape[1] - class_tokens - count, class_tokens)


def matching(metric_PSD: Tensor, number: int, class_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: tokens alternate between two sets; the ``number`` tokens of the first set that are most
    similar to one of the second set are merged into it.

    Source: ``bipartite_soft_matching`` of ToMe; ties go to the earlier token.

    Args:
        metric_PSD: features compared by cosine similarity.
        number: at most half of the tokens without ``class_tokens``.
        class_tokens: 0, or 1: the first token, which is not merged.

    Returns:
        [P, a - number] int64, the tokens of the first set that stay, by similarity (ascending order with a class
        token), and [P, number] int64, those that are merged, as indices into the first set; and [P, number] int64, the
        tokens of the second set that they are merged into.
    """
    metric = normalize(metric_PSD.float(), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if class_tokens:
        scores = torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], dim=1)
    best, target = scores.max(dim=-1)
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices
    stays, goes = order[:, number:], order[:, :number]
    if class_tokens:
        stays = stays.sort(dim=-1).values  # the class token stays in front
    return stays, goes, target.gather(1, goes)


def merged(tokens: Merged, metric_PSD: Tensor, number: int, class_tokens: int) -> Merged:
    """Merge ``number`` tokens of each tile into their most similar ones, averaged by size. The tokens of the first set
    that stay come first, then the second set.

    Sums are matrix products in at least float32, because index_add is not deterministic on GPUs.
    """
    with torch.no_grad():
        stays, goes, target = matching(metric_PSD, number, class_tokens)
        second_set = torch.arange(metric_PSD.shape[1] // 2, device=target.device)
        into = target[:, None] == second_set[:, None]  # [P, b, number]
    hidden, sizes, groups = tokens
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    first, second = wide[:, ::2], wide[:, 1::2]
    sizes_a, sizes_b = sizes[:, ::2], sizes[:, 1::2]
    weights = into * sizes_a.gather(1, goes)[:, None]  # [P, b, number]
    size_b = sizes_b + weights.sum(dim=2)
    summed = second * sizes_b[..., None] + weights.to(wide.dtype) @ _rows(first, goes)
    out = torch.cat([_rows(first, stays), summed / size_b[..., None]], dim=1)
    kept = stays.shape[1]
    place = torch.empty_like(metric_PSD[..., 0], dtype=torch.int64)  # [P, S], where each token goes
    place[:, 1::2] = torch.arange(kept, kept + second.shape[1], device=place.device)
    place[:, ::2] = (
        torch.empty_like(place[:, ::2])
        .scatter(1, stays, torch.arange(kept, device=place.device).expand_as(stays))
        .scatter(1, goes, kept + target)
    )
    return Merged(out.to(hidden.dtype), torch.cat([sizes_a.gather(1, stays), size_b], dim=1), place.gather(1, groups))


def _rows(values_PSM: Tensor, index_Pk: Tensor) -> Tensor:
    """[P, k, M]"""
    return values_PSM.gather(1, index_Pk[..., None].expand(-1, -1, values_PSM.shape[-1]))
