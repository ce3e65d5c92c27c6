"""FLOP counting. The sampler, logs, dry run and benchmarks all use this module.

A multiply-add is two operations. Attention is counted as causal (half of the full matrix), which is what
variable-length kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from vtprune_train.core.plan import counts_per_stage, fronts_of
from vtprune_train.core.stream import Boundary, Drop, StreamPlan

Numbers = TypeVar("Numbers", float, np.ndarray)


class PruningMethod(Protocol):
    """The parts of a pruning method that FLOP counting needs; see ``vtprune_train.pruning.base.PruningMethod``."""

    @property
    def needs(self) -> Any: ...
    @property
    def parts(self) -> Sequence[Any]: ...
    def drops(self, num_layers: int) -> Sequence[Drop]: ...
    def key_layers(self, num_layers: int) -> Sequence[int]: ...


# An average sample of LLaVA-NeXT's instruction data: 2389 tokens, 2268 of them visual (arXiv 2410.17247).
TYPICAL_TEXT = 121
TYPICAL_VISUAL = 2268


@dataclass(frozen=True)
class DecoderGeometry:
    """Dimensions of a decoder with gated MLP and grouped-query attention."""

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config) -> DecoderGeometry:
        """Read a Llama-like text config.

        Raises:
            ValueError: a size is missing, or the MLP is a mixture of experts.
        """
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        if missing := [size for size in sizes if getattr(config, size, None) is None]:
            raise ValueError(
                f"cannot count the FLOPs of the {config.model_type} decoder: its config has no {missing[0]}; only "
                "Llama-like decoders are supported"
            )
        if any(getattr(config, experts, None) for experts in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError(
                f"cannot count the FLOPs of the {config.model_type} decoder: mixture-of-experts models are not "
                "supported"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.vocab_size,
        )

    @property
    def per_token(self) -> float:
        """Forward FLOPs of one layer's projections and MLP for one token."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2.0 * self.hidden * (2 * query + 2 * key + 3 * self.intermediate)

    def adapter_per_token(self, rank: int, targets: Sequence[str] | None) -> float:
        """Forward FLOPs per token of a LoRA adapter on the given projections of one layer (default: all projections).

        Raises:
            ValueError: the decoder has no such projection.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = {"gate_proj": self.intermediate, "up_proj": self.intermediate, "down_proj": self.intermediate}
        other = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query, **inner}
        targets = list(other) if targets is None else targets
        if unknown := [name for name in targets if name not in other]:
            raise ValueError(f"the decoder has no linear layer named {unknown[0]!r}; it has {', '.join(other)}")
        return 2.0 * rank * sum(self.hidden + other[name] for name in targets)

    def layer(self, lengths: np.ndarray) -> np.ndarray:
        """Forward FLOPs of one layer on segments of these lengths (causal attention within each)."""
        n = np.asarray(lengths, dtype=np.float64)
        return self.per_token * n + 2.0 * self.heads * self.head_dim * n * (n + 1)

    def head(self, rows: Numbers) -> Numbers:
        """Forward FLOPs of the language-model head on ``rows`` rows."""
        return 2.0 * rows * self.hidden * self.vocab

    def cache_bytes(self, tokens: Numbers, element_size: int) -> Numbers:
        """Bytes of one layer's KV cache for ``tokens`` tokens."""
        return 2.0 * tokens * self.kv_heads * self.head_dim * element_size

    def selector(self, tokens: float, query_rows: float, scored_tokens: float, projects: bool) -> float:
        """FLOPs of ranking at one drop point: key projection of all tokens (unless the layer's keys are reused), query
        projection of the query rows, and their attention scores."""
        key, query = self.kv_heads * self.head_dim, self.heads * self.head_dim
        projections = 2.0 * self.hidden * (key * tokens + query * query_rows) if projects else 0.0
        return projections + 2.0 * query * scored_tokens


@dataclass(frozen=True)
class TowerGeometry:
    """Dimensions of a tile-based vision transformer and its projector, which merges ``merge`` patches into one token;
    ``projector_in`` is the width of the concatenated patches."""

    unit: ClassVar[str] = "tile(s)"

    num_layers: int
    hidden: int
    intermediate: int
    patches: int
    patch_size: int
    projector_in: int
    projector_out: int
    class_tokens: int = 1
    merge: int = 1

    def tiles_of(self, tokens: int) -> int | None:
        """Number of tiles that produce this many tokens; ``None`` if it is not a multiple of the tokens per tile."""
        tiles, rest = divmod(tokens * self.merge, self.patches)
        return None if rest else tiles

    def tower(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the tower on ``tiles`` tiles (full attention, class token included)."""
        n, c = self.patches + self.class_tokens, self.hidden
        layer = 2.0 * n * c * (4 * c + 2 * self.intermediate) + 4.0 * n * n * c
        return tiles * (self.num_layers * layer + 2.0 * self.patches * 3 * self.patch_size**2 * c)

    def projector(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the two-layer projector."""
        tokens = tiles * (self.patches // self.merge)
        return 2.0 * tokens * self.projector_out * (self.projector_in + self.projector_out)


@dataclass(frozen=True)
class PatchTowerGeometry:
    """Dimensions of a native-resolution vision transformer and of the mergers after it; a "tile" here is one patch.

    ``full_layers`` attend over the whole image, the others within windows of ``window`` patches. ``merge`` patches form
    one token. ``mlp_products`` is the number of MLP matrices (3 if gated). ``mergers`` is the number of mergers; each
    processes all patches.
    """

    unit: ClassVar[str] = "patches"

    num_layers: int
    full_layers: int
    hidden: int
    intermediate: int
    patch_values: int
    window: int
    merge: int
    projector_out: int
    mlp_products: int = 3
    mergers: int = 1

    def tiles_of(self, tokens: int) -> int:
        """Number of patches that produce this many tokens."""
        return tokens * self.merge

    def tower(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the tower on each image of ``tiles`` patches.

        Windows are counted as full-sized, although windows at the image border are smaller.
        """
        n, c = tiles, self.hidden
        linear = 2.0 * n * c * (4 * c + self.mlp_products * self.intermediate)
        windowed = 4.0 * n * np.minimum(n, self.window) * c
        return (
            self.num_layers * linear
            + self.full_layers * 4.0 * n * n * c
            + (self.num_layers - self.full_layers) * windowed
            + 2.0 * n * self.patch_values * c
        )

    def projector(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the mergers."""
        inner = self.hidden * self.merge
        return self.mergers * 2.0 * tiles / self.merge * inner * (inner + self.projector_out)


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of forward and backward: a module costs 3 forward passes if trained, 2 if gradients only flow through it, 1
    if it gets no gradients. Attention has no weights, so its backward pass costs two forwards in either case.
    ``adapter`` is the forward FLOPs per token and layer of a trained adapter (DoRA norms are not counted).
    Recomputation under activation checkpointing is not counted (as in MFU). ``tower`` is ``None`` for families whose
    vision tower is not counted; then only :meth:`text` is available."""

    decoder: DecoderGeometry
    tower: TowerGeometry | PatchTowerGeometry | None
    trains_decoder: bool
    trains_tower: bool
    trains_projector: bool = True
    adapter: float = 0.0

    def sample(
        self,
        stage_lengths: np.ndarray,
        layers_per_stage: Sequence[int],
        tiles: np.ndarray,
        supervised: np.ndarray,
        sample_of_tiles: np.ndarray | None = None,
        frames: np.ndarray | None = None,
    ) -> np.ndarray:
        """FLOPs of each sample: ``stage_lengths`` [samples, stages], ``supervised`` [samples]. ``tiles`` [images] is
        the number of tiles of each image, ``sample_of_tiles`` [images] the sample it belongs to (default: each sample
        has one image), and ``frames`` see :meth:`vision`."""
        vision = self.vision(tiles, frames)
        if sample_of_tiles is not None:
            vision = np.bincount(sample_of_tiles, weights=vision, minlength=len(stage_lengths))
        return self.text(stage_lengths, layers_per_stage, supervised) + vision

    def text(self, stage_lengths: np.ndarray, layers_per_stage: Sequence[int], supervised: np.ndarray) -> np.ndarray:
        """Decoder and LM-head FLOPs of :meth:`sample`."""
        passes = 3 if self.trains_decoder else 2
        tokens = np.asarray(stage_lengths, dtype=np.float64)
        attention = self.decoder.layer(tokens) - self.decoder.per_token * tokens
        per_layer = (passes * self.decoder.per_token + 3 * self.adapter) * tokens + 3 * attention
        per_stage = per_layer * np.asarray(layers_per_stage)
        return per_stage.sum(axis=-1) + passes * self.decoder.head(np.asarray(supervised, dtype=np.float64))

    def forward_text(
        self, stage_lengths: np.ndarray, layers_per_stage: Sequence[int], supervised: np.ndarray
    ) -> np.ndarray:
        """[samples] FLOPs of a forward-only pass of decoder and head."""
        tokens = np.asarray(stage_lengths, dtype=np.float64)
        per_stage = (self.decoder.layer(tokens) + self.adapter * tokens) * np.asarray(layers_per_stage)
        return per_stage.sum(axis=-1) + self.decoder.head(np.asarray(supervised, dtype=np.float64))

    def vision(self, tiles: np.ndarray, frames: np.ndarray | None = None) -> np.ndarray:
        """[images] FLOPs of the tower and the projector in :meth:`sample`. ``frames`` [images] is the number of steps
        in time of each video, which do not attend to each other in the tower; 0 for an image."""
        assert self.tower is not None, "FLOPs of the vision tower are not known for this family"
        steps = np.ones(len(tiles)) if frames is None else np.maximum(frames, 1)
        count = np.asarray(tiles, dtype=np.float64)
        return steps * self.tower.tower(count / steps) * (3 if self.trains_tower else 1) + self.tower.projector(
            count
        ) * (3 if self.trains_tower else 2 if self.trains_projector else 1)


def stage_lengths(text: np.ndarray, spans: np.ndarray, sample_of_span: np.ndarray, drops: Sequence[Drop]) -> np.ndarray:
    """[samples, stages] tokens of each sample in each stage.

    Args:
        text: [samples] text tokens.
        spans: [spans] visual tokens of every image.
        sample_of_span: [spans] the sample each image belongs to.
        drops: the schedule.
    """
    counts = counts_per_stage(drops, spans)
    visual = [np.bincount(sample_of_span, weights=kept, minlength=len(text)).astype(np.int64) for kept in counts]
    return np.stack([text + own for own in visual], axis=1)


def layers_per_stage(drops: Sequence[Drop], num_layers: int) -> list[int]:
    """Number of decoder layers per stage."""
    edges = [0, *(drop.layer for drop in drops), num_layers]
    return [end - start for start, end in pairwise(edges)]


def selector_flops(geometry: DecoderGeometry, plan: StreamPlan, method: PruningMethod | None) -> float:
    """Extra forward FLOPs of token selection for a planned batch: ranking projections and attention, plus the method's
    reported ``selector_flops``. Recomputed rows (when keys are masked) are not counted."""
    if method is None:
        return 0.0
    total = 0.0
    for stage, boundary in zip(plan.stages[:-1], plan.boundaries, strict=True):
        part = method.parts[boundary.drop.owner]
        if part.needs.rank_with is not None and boundary.drop.ranked:
            rows, pairs = len(boundary.query_rows), _ranked_pairs(boundary)
            total += geometry.selector(stage.num_tokens, rows, pairs, part.needs.rank_with == "next_layer")
        total += part.selector_flops(geometry.hidden, boundary)
    chooser = next((part for part in method.parts if part.key_layers(plan.outline.num_layers)), None)
    for stage, layout in zip(plan.stages, plan.key_layouts, strict=True):
        if layout is not None and chooser is not None:
            layers = sum(stage.first_layer <= layer < stage.end_layer for layer in plan.outline.key_layers)
            ranking_flops = geometry.selector(0.0, 0.0, _ranked_pairs(layout), projects=False)
            total += layers * (ranking_flops + chooser.selector_flops(geometry.hidden, layout))
    return total


def _ranked_pairs(boundary: Boundary) -> float:
    """Number of query-key pairs scored for ranking."""
    return float(sum((s.end - s.start) * (s.query_end - s.query_start) for s in boundary.segments))


@dataclass(frozen=True)
class VisualTokens:
    """Mean visual-token counts over the layers of a batch.

    Args:
        entering: mean over layers of tokens entering a layer (determines compute).
        leaving: mean over layers of tokens leaving a layer, as papers count: a drop on a layer's output is attributed
            to that layer.
        cached: mean over layers of tokens whose keys stay in the KV cache.
    """

    entering: float
    leaving: float
    cached: float

    @classmethod
    def of(cls, per_stage: Sequence[float], layers: Sequence[int], kept_keys: Sequence[float]) -> VisualTokens:
        """Compute from token counts [stages], layers per stage [stages] and kept-key shares [layers]."""
        entering = np.repeat(np.asarray(per_stage, dtype=np.float64), layers)
        leaving = np.append(entering[1:], entering[-1:])
        return cls(float(entering.mean()), float(leaving.mean()), float((entering * kept_keys).mean()))


def kept_keys(
    method: PruningMethod | None, per_stage: Sequence[float], layers: Sequence[int], images: int
) -> list[float]:
    """[layers] planned share of each layer's visual keys that stays visible to later rows, from token counts [stages],
    layers per stage [stages] and the number of images."""
    lengths = np.repeat(np.asarray(per_stage, dtype=np.float64) / max(1, images), layers).tolist()
    shares = [1.0] * len(lengths)
    for part in () if method is None else method.parts:
        for layer in part.key_layers(len(lengths)):
            shares[layer] = part.kept_key_share(layer, lengths[layer], len(lengths))
    return shares


def is_adaptive(method: PruningMethod, num_layers: int) -> bool:
    """Whether token counts are only known after the method has run."""
    return bool(method.key_layers(num_layers)) or any(drop.adaptive for drop in method.drops(num_layers))


def visual_per_stage(plan: StreamPlan) -> list[int]:
    """Number of visual tokens of the whole batch in each stage (text is never dropped)."""
    text = sum(segment.num_text for segment in plan.outline.segments)
    return [stage.num_tokens - text for stage in plan.stages]


def hidden_text(plan: StreamPlan, method: PruningMethod | None) -> list[int]:
    """Number of text tokens per segment that no layer caches: those before the first image, if the method hides them.
    Applies to the first call on a cache."""
    segments = plan.outline.segments
    layout = next((layout for layout in plan.key_layouts if layout is not None), None)
    if method is None or not method.needs.hides_front or layout is None:
        return [0] * len(segments)
    return [front or 0 for front in fronts_of(segments, layout)]


def stage_layers(plan: StreamPlan) -> list[int]:
    """Layers of each stage of a plan."""
    return [stage.end_layer - stage.first_layer for stage in plan.stages]


@dataclass(frozen=True)
class PassCost:
    """Cost of one training pass over a batch: decoder and head FLOPs, selector FLOPs, visual tokens per layer, and the
    number of elements its KV cache would hold."""

    text: float
    selector: float
    visual: VisualTokens
    cache_values: float

    @property
    def flops(self) -> float:
        return self.text + self.selector

    @classmethod
    def of(cls, cost: TrainingCost, plan: StreamPlan, method: PruningMethod | None, supervised: np.ndarray) -> PassCost:
        """Compute the cost of a plan (as planned or as executed); ``supervised`` is the number of supervised tokens per
        sample [samples]."""
        lengths = np.array([stage.segment_lengths for stage in plan.stages]).T
        per_stage, layers = visual_per_stage(plan), stage_layers(plan)
        images = sum(len(segment.spans) for segment in plan.outline.segments)
        visual = VisualTokens.of(per_stage, layers, kept_keys(method, per_stage, layers, images))
        tokens = float(np.dot(lengths.sum(axis=0), layers))
        hidden = cost.decoder.num_layers * (visual.entering - visual.cached + sum(hidden_text(plan, method)))
        return cls(
            float(cost.text(lengths, layers, supervised).sum()),
            selector_flops(cost.decoder, plan, method),
            visual,
            cost.decoder.cache_bytes(tokens - hidden, 1),
        )


def published_decoder_flops(
    visual_tokens: Sequence[float], layers: Sequence[int], hidden: int, intermediate: int
) -> float:
    """The convention of the PyramidDrop paper: visual tokens only, ``4 n d^2 + 2 n^2 d + 3 n d m`` per layer.

    Args:
        visual_tokens: n in each stage.
        layers: layers in each stage.
        hidden: d.
        intermediate: m.
    """
    return sum(
        count * (4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * intermediate)
        for n, count in zip(visual_tokens, layers, strict=True)
    )
