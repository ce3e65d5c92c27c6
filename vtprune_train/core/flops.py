"""FLOP counting. The sampler, logs, dry run and benchmarks all use this module.

A multiply-add is two operations. Attention is counted as causal (half of the full matrix), which is what
variable-length kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from vtprune_train.core.plan import counts_per_stage, fronts_of
from vtprune_train.core.stream import Boundary, Drop, ImageSpan, StreamPlan

Numbers = TypeVar("Numbers", float, np.ndarray)
Grid = tuple[int, int]


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


DELTA_CHUNK = 64  # tokens that kernels of the delta rule process at a time


@dataclass(frozen=True)
class LinearAttention:
    """Dimensions of a linear attention layer with a gated delta rule: heads for keys (and queries) and for values, and
    the kernel size of its convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_values(self) -> int:
        """Number of values that the cache holds for a sample: the recurrent state and the convolution's inputs."""
        return self.value_heads * self.key_dim * self.value_dim + self.channels * self.kernel

    @property
    def projected(self) -> dict[str, int]:
        """The name of each projection, and its size other than the hidden size. In order: queries, keys and values;
        gate; beta; decay; output."""
        value = self.value_heads * self.value_dim
        sizes = self.channels, value, self.value_heads, self.value_heads, value
        return dict(zip(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), sizes, strict=True))

    @property
    def mixing(self) -> float:
        """Forward FLOPs per token of convolution and delta rule, in chunks of :data:`DELTA_CHUNK` tokens: two products
        of keys and one with values within a chunk, three with the state. Solving the triangular system is not
        counted."""
        within = DELTA_CHUNK * (4 * self.key_dim + 2 * self.value_dim)
        return 2.0 * self.kernel * self.channels + self.value_heads * (within + 6.0 * self.key_dim * self.value_dim)


@dataclass(frozen=True)
class DecoderGeometry:
    """Dimensions of a decoder with gated MLP and grouped-query attention.

    With experts, ``intermediate`` is the width of all MLPs that a token uses, and ``router`` the number of routing
    scores. ``gated``: queries are projected together with a gate of the output. ``attending``: the layers with
    attention; ``linear``: sizes of all other layers, ``None`` if there are none.
    """

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    router: int = 0
    gated: bool = False
    linear: LinearAttention | None = None
    attending: tuple[int, ...] = ()

    @classmethod
    def of(cls, config) -> DecoderGeometry:
        """Read a Llama-like text config, optionally with experts of one size or linear attention layers.

        Raises:
            ValueError: a size is missing, or the MLP is an unsupported mixture of experts.
        """
        sizes: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
        sizes += () if _counts_experts(config) else ("intermediate_size",)
        if missing := [size for size in sizes if getattr(config, size, None) is None]:
            raise ValueError(
                f"cannot count the FLOPs of the {config.model_type} decoder: its config has no {missing[0]}; only "
                "Llama-like decoders are supported"
            )
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        if not _counts_experts(config) and any(getattr(config, name, None) for name in names):
            raise ValueError(
                f"cannot count the FLOPs of the {config.model_type} decoder: mixture-of-experts models are not "
                "supported"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        intermediate, router = _mlp(config)
        attending = attending_layers(config)
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            intermediate,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.vocab_size,
            router,
            # In decoders with gated delta rule layers, attention is gated too.
            gated=hasattr(config, "linear_num_value_heads") and getattr(config, "attn_output_gate", True),
            linear=None if attending is None else _linear(config),
            attending=attending or (),
        )

    @property
    def per_token(self) -> float:
        """Forward FLOPs of one layer's projections and MLP for one token."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = (3 if self.gated else 2) * query + 2 * key
        return 2.0 * self.hidden * (projections + 3 * self.intermediate + self.router)

    @property
    def linear_per_token(self) -> float:
        """Forward FLOPs of the projections and MLP of a linear attention layer for one token."""
        assert self.linear is not None
        projections = sum(self.linear.projected.values())
        return 2.0 * self.hidden * (projections + 3 * self.intermediate + self.router)

    def adapter_per_token(self, rank: int, targets: Sequence[str] | None) -> float:
        """Forward FLOPs per token of a LoRA adapter on the given projections (default: all), mean over the layers.

        Raises:
            ValueError: the decoder has no such projection.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (2 if self.gated else 1) * query, "k_proj": key, "v_proj": key, "o_proj": query}
        shares = dict.fromkeys(attention, 1.0)
        if self.linear is not None:
            shares = dict.fromkeys(attention, len(self.attending) / self.num_layers)
            linear = self.linear.projected
            attention |= linear
            shares |= dict.fromkeys(linear, 1 - len(self.attending) / self.num_layers)
        other = {**attention, **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.intermediate)}
        targets = list(other) if targets is None else targets
        if unknown := [name for name in targets if name not in other]:
            raise ValueError(f"the decoder has no linear layer named {unknown[0]!r}; it has {', '.join(other)}")
        return 2.0 * rank * sum(shares.get(name, 1.0) * (self.hidden + other[name]) for name in targets)

    def split(self, layers_per_stage: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """[stages] number of layers with attention, and of layers with linear attention, in each stage."""
        layers = np.asarray(layers_per_stage)
        if self.linear is None:
            return layers, np.zeros_like(layers)
        edges = np.cumsum([0, *layers])
        counts = np.diff(np.searchsorted(self.attending, edges))
        return counts, layers - counts

    def stages(self, lengths: np.ndarray, layers_per_stage: Sequence[int]) -> np.ndarray:
        """Forward FLOPs of all layers of each stage, on segments of ``lengths`` [..., stages]."""
        attends, linear = self.split(layers_per_stage)
        flops = self.layer(lengths) * attends
        if self.linear is not None:
            flops = (
                flops + (self.linear_per_token + self.linear.mixing) * np.asarray(lengths, dtype=np.float64) * linear
            )
        return flops

    def layer(self, lengths: np.ndarray) -> np.ndarray:
        """Forward FLOPs of one layer that attends, on segments of these lengths (causal attention within each)."""
        n = np.asarray(lengths, dtype=np.float64)
        return self.per_token * n + 2.0 * self.heads * self.head_dim * n * (n + 1)

    def head(self, rows: Numbers) -> Numbers:
        """Forward FLOPs of the language-model head on ``rows`` rows."""
        return 2.0 * rows * self.hidden * self.vocab

    def cache_bytes(self, tokens: Numbers, element_size: int) -> Numbers:
        """Bytes of the KV cache of one layer that attends, for ``tokens`` tokens."""
        return 2.0 * tokens * self.kv_heads * self.head_dim * element_size

    @property
    def state_values(self) -> int:
        """Number of values in the recurrent states of all layers for a sample."""
        return 0 if self.linear is None else (self.num_layers - len(self.attending)) * self.linear.state_values

    def selector(self, tokens: float, query_rows: float, scored_tokens: float, projects: bool) -> float:
        """FLOPs of ranking at one drop point: key projection of all tokens (unless the layer's keys are reused), query
        projection of the query rows, and their attention scores."""
        key, query = self.kv_heads * self.head_dim, self.heads * self.head_dim
        projections = 2.0 * self.hidden * (key * tokens + query * query_rows) if projects else 0.0
        return projections + 2.0 * query * scored_tokens


# Config keys of mixtures of experts with another structure, which are not counted.
OTHER_EXPERTS = ("n_routed_experts", "n_shared_experts", "num_shared_experts", "first_k_dense_replace")


def attending_layers(config: Any) -> tuple[int, ...] | None:
    """The decoder layers of a text config that attend, counted from 0; ``None`` if none has linear attention."""
    types = getattr(config, "layer_types", None) or ()
    if "linear_attention" not in types:
        return None
    return tuple(index for index, kind in enumerate(types) if kind != "linear_attention")


def _counts_experts(config: Any) -> bool:
    """Whether the decoder has experts of one size, of which each token uses ``num_experts_per_tok``."""
    if any(getattr(config, name, None) for name in OTHER_EXPERTS):
        return False
    return all(getattr(config, name, None) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))


def _mlp(config: Any) -> tuple[int, int]:
    """Width of the MLPs that a token uses, and number of routing scores.

    Raises:
        ValueError: only some layers have experts.
    """
    if not _counts_experts(config):
        return config.intermediate_size, 0
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"cannot count the FLOPs of the {config.model_type} decoder: only some of its layers have experts"
        )
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return config.num_experts_per_tok * config.moe_intermediate_size + shared, config.num_experts + bool(shared)


def _linear(config: Any) -> LinearAttention:
    """Sizes of the layers with linear attention.

    Raises:
        ValueError: they have no gated delta rule.
    """
    if getattr(config, "linear_num_value_heads", None) is None:
        raise ValueError(
            f"cannot count the FLOPs of the {config.model_type} decoder: its linear attention is not a gated delta rule"
        )
    return LinearAttention(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )


@dataclass(frozen=True)
class TowerGeometry:
    """Dimensions of a tile-based vision transformer and its projector, which merges ``merge`` patches into one token;
    ``projector_in`` is the width of the concatenated patches.

    The other fields are known for towers whose tokens a method can change: the ``grid`` of patches, the ``depth``
    (number of layers before the features that the projector reads) and the number of ``heads``. ``lengths``: tokens of
    a tile, without class tokens, in attention and MLP of each layer up to that depth, and ``merged`` after it; empty
    and 0 for all patches. ``extra``: FLOPs per tile of changing them (see :meth:`changed`)."""

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
    grid: Grid = (0, 0)
    depth: int = 0
    heads: int = 1
    lengths: tuple[tuple[int, int], ...] = ()
    merged: int = 0
    extra: float = 0.0

    def changed(self, method: PruningMethod | None) -> TowerGeometry:
        """The tower with the tokens of ``method``."""
        change = None if method is None else method.needs.tower
        if change is None:
            return self
        return replace(self, lengths=change.lengths(self), merged=change.merged(self), extra=change.flops(self))

    def tiles_of(self, tokens: int) -> int | None:
        """Number of tiles that produce this many tokens; ``None`` if it is not a multiple of the tokens per tile."""
        tiles, rest = divmod(tokens * self.merge, self.patches)
        return None if rest else tiles

    def tower(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the tower on ``tiles`` tiles (full attention, class token included)."""
        c, lengths = self.hidden, np.array(self.lengths or [(self.patches, self.patches)], dtype=np.float64)
        # Layers after the features are not used, but run.
        later = np.full((self.num_layers - len(lengths), 2), float(self.merged or self.patches))
        attend, mlp = (np.concatenate([lengths, later]) + self.class_tokens).T
        layers = float((8.0 * attend * c * c + 4.0 * attend * attend * c + 4.0 * mlp * c * self.intermediate).sum())
        embedded = float(min(lengths[0, 0], self.patches))
        return tiles * (layers + 2.0 * embedded * 3 * self.patch_size**2 * c + self.extra)

    def projector(self, tiles: Numbers) -> Numbers:
        """Forward FLOPs of the two-layer projector."""
        tokens = tiles * ((self.merged or self.patches) // self.merge)
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
        method: PruningMethod | None = None,
    ) -> np.ndarray:
        """FLOPs of each sample: ``stage_lengths`` [samples, stages], ``supervised`` [samples]. ``tiles`` [images] is
        the number of tiles of each image, ``sample_of_tiles`` [images] the sample it belongs to (default: each sample
        has one image). ``frames`` and ``method``: see :meth:`vision`."""
        vision = self.vision(tiles, frames, method)
        if sample_of_tiles is not None:
            vision = np.bincount(sample_of_tiles, weights=vision, minlength=len(stage_lengths))
        return self.text(stage_lengths, layers_per_stage, supervised) + vision

    def text(self, stage_lengths: np.ndarray, layers_per_stage: Sequence[int], supervised: np.ndarray) -> np.ndarray:
        """Decoder and LM-head FLOPs of :meth:`sample`."""
        passes = 3 if self.trains_decoder else 2
        tokens = np.asarray(stage_lengths, dtype=np.float64)
        attention = self.decoder.layer(tokens) - self.decoder.per_token * tokens
        attends, linear = self.decoder.split(layers_per_stage)
        per_stage = (passes * self.decoder.per_token * tokens + 3 * attention) * attends
        if self.decoder.linear is not None:
            per_token = passes * self.decoder.linear_per_token + 3 * self.decoder.linear.mixing
            per_stage = per_stage + per_token * tokens * linear
        per_stage = per_stage + 3 * self.adapter * tokens * np.asarray(layers_per_stage)
        return per_stage.sum(axis=-1) + passes * self.decoder.head(np.asarray(supervised, dtype=np.float64))

    def forward_text(
        self, stage_lengths: np.ndarray, layers_per_stage: Sequence[int], supervised: np.ndarray
    ) -> np.ndarray:
        """[samples] FLOPs of a forward-only pass of decoder and head."""
        tokens = np.asarray(stage_lengths, dtype=np.float64)
        adapter = self.adapter * tokens * np.asarray(layers_per_stage)
        per_stage = self.decoder.stages(tokens, layers_per_stage) + adapter
        return per_stage.sum(axis=-1) + self.decoder.head(np.asarray(supervised, dtype=np.float64))

    def vision(
        self, tiles: np.ndarray, frames: np.ndarray | None = None, method: PruningMethod | None = None
    ) -> np.ndarray:
        """[images] FLOPs of the tower and the projector in :meth:`sample`. ``frames`` [images] is the number of steps
        in time of each video, which do not attend to each other in the tower; 0 for an image. ``method`` may change the
        tower's tokens."""
        tower, projector = self._vision(tiles, frames, method)
        change = None if method is None else method.needs.tower
        flows = self.trains_tower or (change is not None and change.learns)
        return tower * (3 if self.trains_tower else 2 if flows else 1) + projector * (
            3 if flows else 2 if self.trains_projector else 1
        )

    def forward_vision(
        self, tiles: np.ndarray, frames: np.ndarray | None = None, method: PruningMethod | None = None
    ) -> np.ndarray:
        """[images] FLOPs of a forward-only run of tower and projector."""
        tower, projector = self._vision(tiles, frames, method)
        return tower + projector

    def teacher_vision(
        self, tiles: np.ndarray, frames: np.ndarray | None, method: PruningMethod | None, trained: PruningMethod | None
    ) -> np.ndarray:
        """[images] FLOPs of the tower and projector of a teacher pass: a run of their own if its ``method``, or that of
        the ``trained`` pass, changes the tower's tokens; otherwise 0, because both passes share one run."""
        if all(one is None or one.needs.tower is None for one in (method, trained)):
            return np.zeros(len(tiles))
        return self.forward_vision(tiles, frames, method)

    def _vision(
        self, tiles: np.ndarray, frames: np.ndarray | None, method: PruningMethod | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """[images] forward FLOPs of the tower, and of the projector."""
        assert self.tower is not None, "FLOPs of the vision tower are not known for this family"
        tower = self.tower.changed(method) if isinstance(self.tower, TowerGeometry) else self.tower
        count = np.asarray(tiles, dtype=np.float64)
        steps = np.ones_like(count) if frames is None else np.maximum(frames, 1)
        return steps * tower.tower(count / steps), tower.projector(count)


def stage_lengths(
    text: np.ndarray,
    spans: np.ndarray,
    sample_of_span: np.ndarray,
    drops: Sequence[Drop],
    frames: np.ndarray | None = None,
    per: str = "video",
) -> np.ndarray:
    """[samples, stages] tokens of each sample in each stage. Steps in time are assumed to have equally many tokens.

    Args:
        text: [samples] text tokens.
        spans: [spans] visual tokens of every image.
        sample_of_span: [spans] the sample each image belongs to.
        drops: the schedule.
        frames: [spans] number of steps in time of every video, 0 for an image; ``None`` if unknown.
        per: what the keep ratios refer to in a video, see ``vtprune_train.pruning.base.Per``.
    """
    newlines = np.zeros_like(spans)
    if frames is not None:
        newlines = np.where(frames > 0, spans % np.maximum(frames, 1), 0)
    if frames is not None and per == "frame":
        steps = np.maximum(frames, 1)
        is_last = np.zeros(steps.sum(), dtype=bool)
        is_last[np.cumsum(steps) - 1] = True
        newlines = np.repeat(newlines, steps) * is_last
        spans, sample_of_span = np.repeat(spans // steps, steps) + newlines, np.repeat(sample_of_span, steps)
        frames = np.repeat(np.minimum(frames, 1), steps)
    image_spans: Sequence[ImageSpan] = ()
    if frames is not None and any(type(drop).kept_of is not Drop.kept_of for drop in drops):
        image_spans = [_span(*sizes) for sizes in zip(spans.tolist(), frames.tolist(), newlines.tolist(), strict=True)]
    counts = counts_per_stage(drops, spans, spans=image_spans)
    visual = [np.bincount(sample_of_span, weights=kept, minlength=len(text)).astype(np.int64) for kept in counts]
    return np.stack([text + tokens for tokens in visual], axis=1)


def _span(length: int, steps: int, newlines: int) -> ImageSpan:
    """A span of this many tokens; the last ``newlines`` of them belong to no step."""
    if not steps:
        return ImageSpan(0, length)
    return ImageSpan(0, length, ((1, (length - newlines) // steps),) * steps + ((1, 1),) * newlines, steps)


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
        cached: mean over the layers with attention of tokens whose keys stay in the KV cache.
    """

    entering: float
    leaving: float
    cached: float

    @classmethod
    def of(
        cls,
        per_stage: Sequence[float],
        layers: Sequence[int],
        kept_keys: Sequence[float],
        attending: Sequence[int] = (),
    ) -> VisualTokens:
        """Compute from token counts [stages], layers per stage [stages] and kept-key shares [layers]; ``attending`` are
        the layers with attention; empty for all."""
        entering = np.repeat(np.asarray(per_stage, dtype=np.float64), layers)
        leaving = np.append(entering[1:], entering[-1:])
        cached = (entering * kept_keys)[list(attending or range(len(entering)))]
        return cls(float(entering.mean()), float(leaving.mean()), float(cached.mean()))


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
        kept = np.array(kept_keys(method, per_stage, layers, images))
        visual = VisualTokens.of(per_stage, layers, kept.tolist(), cost.decoder.attending)
        tokens = float(np.dot(lengths.sum(axis=0), cost.decoder.split(layers)[0]))
        states = len(lengths) * cost.decoder.state_values
        removed = float(np.dot(np.repeat(per_stage, layers), 1 - kept))
        hidden = removed + cost.decoder.num_layers * sum(hidden_text(plan, method))
        return cls(
            float(cost.text(lengths, layers, supervised).sum()),
            selector_flops(cost.decoder, plan, method),
            visual,
            cost.decoder.cache_bytes(tokens - hidden, 1) + states,
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
