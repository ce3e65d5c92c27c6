"""The loop over Hugging Face decoder layers, with a drop at every boundary.

The layers run unchanged: a packed stream is one row without padding, so they need no mask, and each attention backend
reads ``cu_seqlens``. At a boundary the method picks the survivors and the stream is gathered once.

Shape suffixes: T tokens in the stream, C hidden size, Q query rows, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune_train.models import HFModule
from vtprune_train.models.attention import PREFIX
from vtprune_train.models.cache import PackedCache, StageCache
from vtprune_train.pruning.base import PruningMethod, Ranking
from vtprune_train.pruning.selection import kept_rows
from vtprune_train.stream import Boundary, Stage, StreamPlan


@dataclass
class DecoderOutput:
    """``last_hidden_state`` [T_last, C] before the final norm; ``kept`` holds, for each boundary, the rows of the
    ending stage that entered the next ([T_next] int64)."""

    last_hidden_state: Tensor
    kept: tuple[Tensor, ...]


@dataclass
class Staging:
    """What a forward pass over padded rows adds to a packed stream.

    Args:
        positions: for each stage, [T] or [parts, T] int64; only the first is read if the survivors keep theirs.
        cache: where keys and values go; ``None`` without a cache.
        stages: for each stage, how its tokens join ``cache``; empty without one.
        ranked_keys: for each boundary, how the next layer's cached keys join the ending stage's tokens for
            ``rank_with: next_layer``; empty where nothing is cached yet.
        ranked_boundaries: for each boundary, the one whose rows count in the joined keys; empty likewise.
        deepstack: features [V, C] of all visual tokens, added to their rows after layer 0, 1, ...
    """

    positions: tuple[Tensor, ...]
    cache: PackedCache | None = None
    stages: tuple[StageCache, ...] = ()
    ranked_keys: tuple[StageCache, ...] = ()
    ranked_boundaries: tuple[Boundary, ...] = ()
    visual_rows: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()


def run_layers(
    text_model: HFModule,
    hidden_TC: Tensor,
    plan: StreamPlan,
    method: PruningMethod | None = None,
    staging: Staging | None = None,
) -> DecoderOutput:
    """Run a packed stream through the decoder layers of ``text_model`` (anything built like ``LlamaModel``).

    Args:
        text_model: has ``layers``, ``rotary_emb``; its ``config._attn_implementation`` is one of our backends.
        hidden_TC: [T, C], embedded text and projected images in place.
        plan: the stages; its tensors are on the device of ``hidden_TC``.
        method: who picks the survivors; may be ``None`` if the plan has no boundary.
        staging: positions, cache and features of a pass over padded rows; ``None`` numbers each segment from 0.
    """
    check_attention(text_model)
    if staging is None:
        staging = Staging(tuple(stage.position_ids for stage in plan.stages))
    hidden = hidden_TC.unsqueeze(0)
    position_ids = staging.positions[0].unsqueeze(-2)  # [1, T] or [parts, 1, T]
    deepstack = _Deepstack(staging)
    kept: list[Tensor] = []
    for index, stage in enumerate(plan.stages):
        rotary = text_model.rotary_emb(hidden, position_ids=position_ids)
        boundary = plan.boundaries[index] if index < len(plan.boundaries) else None
        keywords = _attention_keywords(stage, staging, index)
        probe = None
        if boundary is not None and method is not None and method.rank_with == "this_layer":
            scored = staging.ranked_boundaries[index] if staging.ranked_boundaries else boundary
            probe = _Probe(method, boundary, scored, _scaling(text_model.layers[stage.end_layer - 1]))
        for layer_index in range(stage.first_layer, stage.end_layer):
            is_last = layer_index == stage.end_layer - 1
            extra = {"probe": probe} if probe is not None and is_last else {}
            hidden = text_model.layers[layer_index](
                hidden, attention_mask=None, position_ids=position_ids, position_embeddings=rotary,
                **keywords, **extra,
            )  # fmt: skip
            hidden = deepstack.add(hidden, layer_index)
        if boundary is None:
            continue
        assert method is not None, "a plan with boundaries needs the method that planned it"
        if probe is None:
            scores = _score_with_next_layer(text_model, method, hidden, rotary, boundary, staging, index)
        else:
            scores = probe.scores()
        with torch.no_grad():
            chosen = method.select(scores, boundary)
            rows = kept_rows(boundary.text_rows, boundary.visual_rows, chosen)
            deepstack.drop(rows, chosen)
        hidden = hidden.index_select(1, rows)
        kept.append(rows)
        if method.positions == "keep":
            position_ids = position_ids.index_select(-1, rows)
        else:
            position_ids = staging.positions[index + 1].unsqueeze(-2)
    return DecoderOutput(hidden.squeeze(0), tuple(kept))


def check_attention(text_model: HFModule) -> None:
    """Refuse a decoder whose attention does not read lengths.

    Raises:
        ValueError: it was changed after ``prune``.
    """
    name = text_model.config._attn_implementation
    if not str(name).startswith(PREFIX):
        raise ValueError(
            f"the attention of this pruned model was set to {name!r}, under which samples of a batch would see each "
            "other; unprune(model) first, or choose it by prune(..., attention=...)"
        )


class _Deepstack:
    """Visual features that enter after the first layers, gathered along with their tokens."""

    def __init__(self, staging: Staging):
        self.features, self.rows = staging.deepstack, staging.visual_rows

    def add(self, hidden: Tensor, layer_index: int) -> Tensor:
        if layer_index >= len(self.features) or self.rows is None:
            return hidden
        return hidden.index_add(1, self.rows, self.features[layer_index].to(hidden.dtype).unsqueeze(0))

    def drop(self, rows: Tensor, chosen: Tensor) -> None:
        if self.features and self.rows is not None:
            self.features = tuple(features.index_select(0, chosen) for features in self.features)
            self.rows = torch.searchsorted(rows, self.rows.index_select(0, chosen))


def _attention_keywords(stage: Stage, staging: Staging, index: int) -> dict[str, Any]:
    keywords: dict[str, Any] = {
        "use_cache": staging.cache is not None,
        "cu_seq_lens_q": stage.cu_seqlens,
        "cu_seq_lens_k": stage.cu_seqlens,
        "max_length_q": stage.max_seqlen,
        "max_length_k": stage.max_seqlen,
        "segment_lengths": stage.segment_lengths,
    }
    if staging.cache is not None:
        joined = staging.stages[index]
        staging.cache.stage = joined
        keywords |= {
            "past_key_values": staging.cache,
            "cu_seq_lens_k": joined.cu_seqlens_k,
            "max_length_k": max(joined.key_lengths),
            "key_lengths": joined.key_lengths,
        }
    return keywords


class _Probe:
    """Scores the visual tokens from inside a layer's attention. Recomputing the layer does not score again."""

    def __init__(self, method: PruningMethod, boundary: Boundary, scored: Boundary, scaling: float):
        self.method, self.boundary, self.scored, self.scaling = method, boundary, scored, scaling
        self._scores: Tensor | None = None

    @torch.no_grad()
    def __call__(self, q_THD: Tensor, k_TGD: Tensor) -> None:
        if self._scores is None:
            queries = q_THD.detach().index_select(0, self.boundary.query_rows)
            self._scores = self.method.score(Ranking(queries, k_TGD.detach(), self.scaling), self.scored)

    def scores(self) -> Tensor:
        assert self._scores is not None, "the attention backend did not call the probe"
        return self._scores


@torch.no_grad()
def _score_with_next_layer(
    text_model: HFModule,
    method: PruningMethod,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    boundary: Boundary,
    staging: Staging,
    index: int,
) -> Tensor:
    """Score with the layer about to run: its input norm, its query and key projections, the ending stage's positions.

    Queries are projected for the query rows only. Runs the same modules whether or not the stream has images, so
    that ranks stay together under ZeRO-3.
    """
    layer = text_model.layers[boundary.layer]
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden).squeeze(0)  # [T, C]
    cos, sin = (table.squeeze(0) for table in rotary)  # [T, D]
    queries = _heads(attention, "q", normed.index_select(0, boundary.query_rows))
    keys = _heads(attention, "k", normed)
    queries = _rotate(queries, cos.index_select(0, boundary.query_rows), sin.index_select(0, boundary.query_rows))
    keys = _rotate(keys, cos, sin)
    if staging.ranked_keys and staging.cache is not None:
        staging.cache.stage = staging.ranked_keys[index]
        keys = staging.cache.joined_keys(keys, boundary.layer)
        boundary = staging.ranked_boundaries[index]
    return method.score(Ranking(queries, keys, _scaling(layer)), boundary)


def _heads(attention: HFModule, which: str, normed_TC: Tensor) -> Tensor:
    """[T, heads, D]: one projection, with the per-head norm of the families that have one."""
    projected = getattr(attention, f"{which}_proj")(normed_TC).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return projected if norm is None else norm(projected)


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama and its relatives."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_TD.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_TD.unsqueeze(1)


def _scaling(layer: HFModule) -> float:
    return layer.self_attn.scaling
