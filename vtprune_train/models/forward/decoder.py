"""The loop over Hugging Face decoder layers, with token drops between stages.

The layers run unchanged: a packed batch is a single row without padding, so no mask is needed, and each attention
backend reads ``cu_seqlens``; linear attention layers get padded rows (:mod:`.linear_attention`). At a drop point the
method picks the kept tokens and the packed batch is gathered once.

Shape suffixes: T tokens in the stream, C hidden size, Q query rows, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from vtprune_train.core.interleaved import Rows, advance, locate
from vtprune_train.core.plan import replan
from vtprune_train.core.stream import Boundary, Drop, Stage, StreamPlan, to_device
from vtprune_train.models import HFModule
from vtprune_train.models.cache import PackedCache, StageCache
from vtprune_train.models.forward.attention import PREFIX, Packing
from vtprune_train.models.forward.keys import StageKeys
from vtprune_train.models.forward.rotary import rotary_tables
from vtprune_train.models.forward.sharding import call_inside, check_all_heads, check_whole_stream
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, EncoderSignals, Ranking, Selection
from vtprune_train.pruning.ops.selection import next_rows

PARAMETERS = "pruning"  # name of the decoder submodule with the method's learned parameters

# Labels for torch.profiler.record_function. Without an active profiler each costs a few microseconds of host time.
TOWER = "vtprune::tower"  # vision tower and projector
RANK = "vtprune::rank"  # queries and keys of the ranking layer
CHOOSE = "vtprune::choose"  # scoring and selecting rows
GATHER = "vtprune::gather"  # gathering the packed batch of the next stage
HEAD = "vtprune::head"  # language-model head and loss
SELECTOR = (RANK, CHOOSE)  # overhead of dropping; the gather is amortized by the shorter stages
RANGES = (TOWER, RANK, CHOOSE, GATHER, HEAD)


@dataclass
class DecoderOutput:
    """Output of the decoder layers.

    ``last_hidden_state`` [T_last, C] before the final norm. For each drop point, ``kept`` [T_next] int64 holds the
    previous-stage row of each token (-1 if it was restored from the set-aside tokens), and ``origins`` [T_next] int64
    its first-stage row; merged tokens refer to one of their sources. ``plan`` is the executed plan: the input plan,
    updated with the actual counts of adaptive drops. ``selections``: the selection at each drop point.
    """

    last_hidden_state: Tensor
    kept: tuple[Tensor, ...]
    origins: tuple[Tensor, ...]
    plan: StreamPlan
    selections: tuple[Selection, ...] = ()


@dataclass
class Staging:
    """Additional inputs of a padded-row forward pass: positions and cache layout.

    Args:
        positions: for each stage, [T] or [parts, T] int64; only the first is used if tokens keep their positions.
        cache: the KV cache to write to; ``None`` if caching is off.
        joins: for each layer, how its tokens are appended to ``cache``; empty without a cache.
        ranked_keys: for each drop point, how the next layer's cached keys are combined with the current tokens for
            ``rank_with='next_layer'``; empty if nothing is cached.
        ranked_boundaries: for each drop point, the Boundary whose row indices refer to the combined keys; empty if
            nothing is cached.
        cached_layouts: for each key-pruning layer, its stage's layout within cached plus new keys; empty if nothing is
            cached.
        visual_rows: [V] int64, rows of the first stage that hold visual tokens, for ``deepstack``.
        deepstack: features [V, C] of all visual tokens, added to their rows after layer 0, 1, ...
        replanned: function that rebuilds the staging on the host for a plan with updated counts; ``None`` if positions
            start at 0 and nothing is cached.
        before: state of the cache at the start of the call.
    """

    positions: tuple[Tensor, ...]
    cache: PackedCache | None = None
    joins: tuple[StageCache, ...] = ()
    ranked_keys: tuple[StageCache, ...] = ()
    ranked_boundaries: tuple[Boundary, ...] = ()
    cached_layouts: dict[int, Boundary] = field(default_factory=dict)
    visual_rows: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()
    replanned: Callable[[StreamPlan], Staging] | None = None
    before: Any = None

    def cache_keywords(self, layer: int) -> dict[str, Any]:
        """Prepare the cache for a layer and return the keyword arguments to pass to it."""
        if self.cache is None:
            return {"use_cache": False}
        self.cache.stage = self.joins[layer]
        return {"use_cache": True, "past_key_values": self.cache}

    @classmethod
    def counted(cls, plan: StreamPlan) -> Staging:
        """Staging in which positions start at 0 in every segment and stage."""
        return cls(tuple(stage.position_ids for stage in plan.stages))


def run_layers(
    text_model: HFModule,
    hidden_TC: Tensor,
    plan: StreamPlan,
    method: PruningMethod | None = None,
    staging: Staging | None = None,
    encoder: EncoderSignals | None = None,
    selections: Sequence[Selection] | None = None,
    selects: bool = False,
) -> DecoderOutput:
    """Run a packed batch through the decoder layers of ``text_model`` (any Llama-like model).

    ``hidden_TC`` holds the input embeddings with image features already inserted. ``method`` may be ``None`` if the
    plan has no drop point; without ``staging`` the positions of each segment count from 0. ``selections`` replace the
    choices of ``method`` at each drop point; ``selects`` stops after the last drop point."""
    check_attention(text_model)
    walk = _Walk(text_model, method, plan, staging or Staging.counted(plan), hidden_TC.unsqueeze(0), encoder)
    walk.given = selections
    for index in range(len(plan.boundaries) if selects else len(plan.stages)):
        ranking = walk.run_stage(index)
        if index < len(plan.boundaries):
            walk.cross(index, ranking)
    walk.touch_unused()
    return DecoderOutput(
        walk.hidden.squeeze(0), tuple(walk.kept), tuple(walk.origins), walk.plan, tuple(walk.selections)
    )


class _Walk:
    """State of a packed batch while it runs through the stages."""

    def __init__(
        self,
        text_model: HFModule,
        method: PruningMethod | None,
        plan: StreamPlan,
        staging: Staging,
        hidden: Tensor,
        encoder: EncoderSignals | None,
    ):
        self.text_model, self.method, self.plan, self.staging = text_model, method, plan, staging
        self.hidden, self.encoder = hidden, encoder
        self.position_ids = staging.positions[0].unsqueeze(-2)  # [1, T] or [parts, 1, T]
        self.origin = torch.arange(hidden.shape[1], device=hidden.device)
        self.deepstack = _Deepstack(staging)
        # Index of each visual token into the first stage's visual tokens; -1 for learned tokens.
        num_visual = len(plan.boundaries[0].visual_rows) if plan.boundaries else 0
        self.visual = torch.arange(num_visual, device=hidden.device)
        # Rows of the stage if there is text between the tokens of a video; otherwise the plan has them.
        self.rows = Rows(plan.boundaries[0].text_rows, plan.boundaries[0].visual_rows) if plan.boundaries else None
        self.asides: dict[int, _Aside] = {}
        self.memories: dict[int, dict[str, Any]] = {}
        self.kept: list[Tensor] = []
        self.origins: list[Tensor] = []
        self.given: Sequence[Selection] | None = None
        self.selections: list[Selection] = []

    def run_stage(self, index: int) -> Ranking | None:
        """Run the layers of one stage; return the ranking from the last layer's attention if the next drop needs it."""
        self._locate(index)
        stage = self.plan.stages[index]
        before = self.staging.before
        longest = max(stage.segment_lengths) + (0 if before is None else before.columns)
        self.rotary = rotary_tables(self.text_model, self.hidden, self.position_ids, longest)
        part = self._ranking_part(index)
        probe = None
        if part is not None and part.needs.rank_with == "this_layer" and stage.end_layer > stage.first_layer:
            probe = _Probe(self.plan.boundaries[index].query_rows)
        has_images = None if before is None else before.has_images
        keys = StageKeys(self.plan, index, self.method, self.staging.cached_layouts, self.text_model.config, has_images)
        of_stage: dict[Any, Any] = {}
        for layer_index in range(stage.first_layer, stage.end_layer):
            is_last = layer_index == stage.end_layer - 1
            choice = keys.layer(layer_index, self.staging.cache)
            lengths = _lengths(stage, self.staging, layer_index)
            packing = Packing(lengths, probe if is_last else None, choice, of_stage)
            self.hidden = self.text_model.layers[layer_index](
                self.hidden, attention_mask=None, position_ids=self.position_ids, position_embeddings=self.rotary,
                packing=packing, **self.staging.cache_keywords(layer_index),
            )  # fmt: skip
            check_whole_stream(self.hidden, sum(stage.segment_lengths), layer_index)
            self.hidden = self.deepstack.add(self.hidden, layer_index)
        if part is None:
            return None
        if part.needs.rank_with == "next_layer":
            with record_function(RANK):
                ranking = self._rank_with_next_layer(part, index)
            return self._with_ones(ranking, index) if part.needs.gravity else ranking
        if probe is None:
            raise ValueError(
                f"{part.name} ranks with the layer before layer {stage.end_layer}, but no layer has run yet; use "
                "rank_with=next_layer or a later layer"
            )
        ranking = probe.ranking(self.text_model.layers[stage.end_layer - 1].self_attn.scaling)
        reader = f"{part.name} (decoder layer {stage.end_layer - 1})"
        check_all_heads(self.text_model.config, reader, ranking.queries.shape[1], ranking.keys.shape[1])
        ranking = ranking if part.needs.rotary else self._unrotated(ranking, index)
        return self._with_ones(ranking, index) if part.needs.gravity else ranking

    def cross(self, index: int, ranking: Ranking | None) -> None:
        """Run token selection at a drop point and gather the tokens of the next stage."""
        part, boundary = self._part(index), self.plan.boundaries[index]
        assert part is not None, "a plan with drop points needs the method that planned it"
        aside = self._aside(index)
        if self.given is None:
            with record_function(CHOOSE):
                selection = part.choose(self._candidates(part, boundary, ranking, index, aside))
        else:
            selection = self.given[index]
        self.selections.append(selection)
        if selection.counts is not None:
            self._replan(index, selection.counts)
            self._locate(index)
            boundary = self.plan.boundaries[index]
        chosen = selection.chosen
        if boundary.scored_shift is not None:
            returned = aside is not None and boundary.drop.returns
            origin = aside.origin if returned else self.origin.index_select(0, boundary.visual_rows)  # type: ignore[union-attr]
            text_origin = self.origin.index_select(0, boundary.text_rows)
            boundary, self.rows = advance(boundary, text_origin, origin.index_select(0, chosen))
        text_rows, next_order = boundary.text_rows, boundary.next_order
        if aside is not None and boundary.drop.returns:
            rows = _joined(text_rows, aside.rows_now(boundary.visual_rows), chosen, next_order)
            self.hidden = _joined(self.hidden[0, text_rows], aside.hidden, chosen, next_order, dim=0).unsqueeze(0)
            positions = _joined(self.position_ids[..., text_rows], aside.position_ids, chosen, next_order)
            self.origin = _joined(self.origin[text_rows], aside.origin, chosen, next_order)
            self.visual = aside.visual.index_select(0, chosen)
        else:
            with record_function(CHOOSE):
                rows = next_rows(boundary, chosen)
            with record_function(GATHER):
                self.hidden = self.hidden.index_select(1, rows)
            positions = self.position_ids.index_select(-1, rows)
            self.origin = self.origin.index_select(0, rows)
            self.visual = self.visual.index_select(0, chosen)
        if selection.at is not None and selection.values is not None:
            at = boundary.next_visual_rows.index_select(0, selection.at)
            self.hidden = self.hidden.index_copy(1, at, selection.values.to(self.hidden.dtype).unsqueeze(0))
            if boundary.drop.adds:
                self.visual = self.visual.index_fill(0, selection.at, -1)
        if aside is not None:
            aside.alive = chosen if boundary.drop.returns else aside.alive.index_select(0, chosen)
        self.deepstack.move(boundary.next_visual_rows, self.visual)
        numbered = renumbers(part, boundary.drop) and positions.ndim == 2
        self.position_ids = self.staging.positions[index + 1].unsqueeze(-2) if numbered else positions
        self.kept.append(rows)
        self.origins.append(self.origin)

    def _locate(self, index: int) -> None:
        """Fill in the rows of a drop point that are computed on the device."""
        if index >= len(self.plan.boundaries) or self.plan.boundaries[index].scored_shift is None:
            return
        rows = self.rows
        assert rows is not None, "a plan with drop points has rows"

        def located(boundaries: tuple[Boundary, ...]) -> tuple[Boundary, ...]:
            return (*boundaries[:index], locate(boundaries[index], rows), *boundaries[index + 1 :])

        self.plan = replace(self.plan, boundaries=located(self.plan.boundaries))
        if self.staging.ranked_boundaries:
            self.staging = replace(self.staging, ranked_boundaries=located(self.staging.ranked_boundaries))

    def touch_unused(self) -> None:
        """Give zero gradients to parameters of methods without a drop point in this pass; under ZeRO-3, parameters
        without a gradient would reuse the previous one."""
        if self.method is None or not torch.is_grad_enabled():
            return
        acted = {boundary.drop.owner for boundary in self.plan.boundaries}
        for owner in range(len(self.method.parts)):
            if owner not in acted and (module := self._module(owner)) is not None:
                self.hidden = self.hidden + module(self.hidden[0, :0]).sum()

    def _part(self, index: int) -> PruningMethod | None:
        """Return the method that drops at the end of stage ``index``."""
        if self.method is None or index >= len(self.plan.boundaries):
            return None
        return self.method.parts[self.plan.boundaries[index].drop.owner]

    def _ranking_part(self, index: int) -> PruningMethod | None:
        """Return the method that needs a ranking at the end of stage ``index``."""
        part = self._part(index) if self.given is None else None
        ranked = part is not None and part.needs.rank_with is not None and self.plan.boundaries[index].drop.ranked
        return part if ranked else None

    def _module(self, owner: int) -> HFModule | None:
        """Return one method's learned module; a combination stores them in a dict keyed by owner."""
        assert self.method is not None
        module = getattr(self.text_model, PARAMETERS, None)
        if module is None or len(self.method.parts) == 1:
            return module
        return dict(module.named_children()).get(str(owner))

    def _aside(self, index: int) -> _Aside | None:
        """Return the up-to-date set-aside state of the drop point's method, if it restores tokens here or later;
        tracked from the method's first drop on."""
        boundary = self.plan.boundaries[index]
        owner = boundary.drop.owner
        ahead = (other.drop for other in self.plan.boundaries[index:])
        if not any(drop.returns and drop.owner == owner for drop in ahead):
            return None
        rows = boundary.visual_rows
        now = self.hidden[0].index_select(0, rows)
        if owner not in self.asides:
            alive = torch.arange(len(rows), device=rows.device)
            positions = self.position_ids.index_select(-1, rows)
            self.asides[owner] = _Aside(now, now, positions, self.origin.index_select(0, rows), self.visual, alive)
        else:
            aside = self.asides[owner]
            aside.before, aside.hidden = aside.hidden, aside.hidden.index_copy(0, aside.alive, now)
        return self.asides[owner]

    def _candidates(
        self, part: PruningMethod, boundary: Boundary, ranking: Ranking | None, index: int, aside: _Aside | None
    ) -> Candidates:
        stream = self.hidden[0]
        if aside is not None and boundary.drop.returns:
            hidden, before, visual = aside.hidden, aside.before, aside.visual
        else:
            hidden = before = stream.index_select(0, boundary.visual_rows)
            visual = self.visual
        encoder = self.encoder if part.needs.from_tower else None
        return Candidates(
            boundary=self.staging.ranked_boundaries[index] if self.staging.ranked_boundaries else boundary,
            hidden=hidden,
            before=before,
            instruction=stream.index_select(0, boundary.query_rows),
            ranking=ranking,
            encoder=None if encoder is None else _seen_of(encoder, visual),
            memory=self.memories.setdefault(boundary.drop.owner, {}),
            module=self._module(boundary.drop.owner),
            training=self.text_model.training and torch.is_grad_enabled(),
        )

    def _replan(self, index: int, counts: Tensor) -> None:
        """Replan the stages after an adaptive drop from its actual counts; this is the only device-to-host copy."""
        if not self.plan.boundaries[index].spans:
            return
        before = [np.array([span.after for span in b.spans]) for b in self.plan.boundaries[:index]]
        plan = replan(self.plan, [*before, counts.cpu().numpy()])
        replanned = self.staging.replanned
        self.plan = to_device(plan, self.hidden.device)
        staging = Staging.counted(self.plan) if replanned is None else replanned(plan)
        self.staging = replace(staging, positions=(self.staging.positions[0], *staging.positions[1:]))

    def _rank_with_next_layer(self, part: PruningMethod, index: int) -> Ranking:
        """Compute the ranking from the next layer's input norm and query/key projections, with the positions of the
        stage before the drop.

        Queries are projected for the query rows only. Always runs the same modules, with or without images, so that
        ZeRO-3 collectives stay in sync across ranks.
        """
        boundary, staging = self.plan.boundaries[index], self.staging
        with torch.set_grad_enabled(torch.is_grad_enabled() and part.needs.differentiable):
            layer = self.text_model.layers[boundary.layer]
            cos, sin = (table.squeeze(0) for table in self.rotary)  # [T, D]
            rows = boundary.query_rows
            queries, keys = call_inside(layer, _layer_heads, self.hidden, rows)
            check_all_heads(
                self.text_model.config, f"{part.name} (decoder layer {boundary.layer})", queries.shape[1], keys.shape[1]
            )
            if part.needs.rotary:
                queries = _rotate(queries, cos.index_select(0, rows), sin.index_select(0, rows))
                keys = _rotate(keys, cos, sin)
            if staging.ranked_keys and staging.cache is not None and part.needs.rotary:
                staging.cache.stage = staging.ranked_keys[index]
                keys = staging.cache.joined_keys(keys, boundary.layer)
        return Ranking(queries, keys, layer.self_attn.scaling)

    def _with_ones(self, ranking: Ranking, index: int) -> Ranking:
        """Add all-ones vectors for query rows and candidates, rotated with their positions in the stage before the
        drop."""
        boundary = self.plan.boundaries[index]

        def rotated(rows: Tensor) -> Tensor:
            cos, sin = (table.squeeze(0).index_select(0, rows) for table in self.rotary)
            return _rotate(cos.new_ones(len(rows), 1, ranking.keys.shape[-1]), cos, sin).squeeze(1)

        return replace(ranking, ones=(rotated(boundary.query_rows), rotated(boundary.visual_rows)))

    def _unrotated(self, ranking: Ranking, index: int) -> Ranking:
        """Queries and keys before the rotary embedding, of the new tokens only."""
        scaled = getattr(
            self.text_model.rotary_emb, "attention_scaling", 1.0
        )  # YaRN also scales cos/sin, so it is not a pure rotation
        cos, sin = (table.squeeze(0) / scaled**2 for table in self.rotary)
        rows, keys = self.plan.boundaries[index].query_rows, ranking.keys
        if self.staging.joins:
            stage = self.plan.stages[index]
            keys = keys.index_select(0, self.staging.joins[stage.end_layer - 1].new_keys(stage.segment_lengths))
        queries = _rotate(ranking.queries, cos.index_select(0, rows), -sin.index_select(0, rows))
        return Ranking(queries, _rotate(keys, cos, -sin), ranking.scaling)


@dataclass
class _Aside:
    """Tracks all V0 visual tokens from a method's first drop: latest hidden states, hidden states at the previous drop
    (``before``), positions, origins, and which tokens are currently in the batch (``alive`` [V])."""

    hidden: Tensor
    before: Tensor
    position_ids: Tensor
    origin: Tensor
    visual: Tensor
    alive: Tensor

    def rows_now(self, visual_rows: Tensor) -> Tensor:
        """[V0] current row of each token; -1 if set aside."""
        return torch.full_like(self.origin, -1).index_copy(0, self.alive, visual_rows)


def renumbers(part: PruningMethod, drop: Drop) -> bool:
    """Whether positions are renumbered after a drop by ``part`` (never with M-RoPE positions)."""
    return part.needs.positions == "renumber" or drop.adds


def _seen_of(signals: EncoderSignals, visual: Tensor) -> EncoderSignals:
    """Signals of the tokens ``visual``, indexed as in ``_Walk.visual``; learned tokens get NaN attention, and
    zero keys and features."""
    known, learned = visual.clamp(min=0), visual < 0
    return EncoderSignals(
        signals.attention.index_select(1, known).masked_fill(learned, float("nan")),
        signals.keys.index_select(0, known).masked_fill(learned[:, None], 0.0),
        signals.tile.index_select(0, known).masked_fill(learned, -1),
        None
        if signals.features is None
        else signals.features.index_select(0, known).masked_fill(learned[:, None], 0.0),
    )


def _joined(text: Tensor, visual: Tensor, chosen: Tensor, order: Tensor, dim: int = -1) -> Tensor:
    """Concatenate text and kept visual tokens in the order of the next stage."""
    return torch.cat([text, visual.index_select(dim, chosen)], dim=dim).index_select(dim, order)


def check_attention(text_model: HFModule) -> None:
    """Raise if the decoder's attention implementation ignores sequence lengths.

    Raises:
        ValueError: it was changed after ``prune``.
    """
    name = text_model.config._attn_implementation
    if not str(name).startswith(PREFIX):
        raise ValueError(
            f"attn_implementation of this pruned model was changed to {name!r}, which would let the samples of a "
            "batch attend to each other; call unprune(model) first, or choose it with prune(..., attention=...)"
        )


class _Deepstack:
    """DeepStack features added after the first layers to the visual tokens present at that point; set-aside and learned
    tokens receive none."""

    def __init__(self, staging: Staging):
        self.features, self.rows = staging.deepstack, staging.visual_rows
        self.visual: Tensor | None = None  # as in _Walk; None: all visual tokens of the first stage

    def add(self, hidden: Tensor, layer_index: int) -> Tensor:
        if layer_index >= len(self.features) or self.rows is None:
            return hidden
        features = self.features[layer_index]
        if self.visual is not None:
            features = features.index_select(0, self.visual.clamp(min=0)).masked_fill(self.visual[:, None] < 0, 0.0)
        return hidden.index_add(1, self.rows, features.to(hidden.dtype).unsqueeze(0))

    def move(self, next_rows: Tensor, visual: Tensor) -> None:
        self.rows, self.visual = next_rows, visual


def _lengths(stage: Stage, staging: Staging, layer: int) -> dict[str, Any]:
    """Segment lengths for a layer's attention; see :class:`~vtprune_train.models.forward.attention.Packing`."""
    lengths: dict[str, Any] = {
        "cu_seq_lens_q": stage.cu_seqlens,
        "cu_seq_lens_k": stage.cu_seqlens,
        "max_length_q": stage.max_seqlen,
        "max_length_k": stage.max_seqlen,
        "segment_lengths": stage.segment_lengths,
    }
    if staging.cache is not None:
        joined = staging.joins[layer]
        lengths |= {
            "cu_seq_lens_k": joined.cu_seqlens_k,
            "max_length_k": max(joined.key_lengths),
            "key_lengths": joined.key_lengths,
        }
    return lengths


class _Probe:
    """Captures queries and keys from a layer's attention once; recomputation does not capture again."""

    def __init__(self, query_rows: Tensor):
        self.query_rows = query_rows
        self.called = False
        self.taken: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, q_THD: Tensor, k_TGD: Tensor) -> None:
        if not self.called:
            self.called = True
            with record_function(RANK):
                self.taken = (q_THD.detach().index_select(0, self.query_rows), k_TGD.detach())

    def ranking(self, scaling: float) -> Ranking:
        """Return and release the captured tensors, because a recomputed layer keeps its probe alive until backward."""
        assert self.taken is not None, "the attention backend did not call the probe"
        (queries, keys), self.taken = self.taken, None
        return Ranking(queries, keys, scaling)


def _layer_heads(layer: HFModule, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, H, D] queries of ``rows`` [Q] and [T, G, D] keys, before the rotary embedding, of ``hidden`` [1, T, C]."""
    return call_inside(layer.self_attn, _attention_heads, layer.input_layernorm(hidden).squeeze(0), rows)


def _attention_heads(attention: HFModule, normed_TC: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    # If there are no query rows, project one row and discard it: FP8 scaling takes a max over rows and fails on an
    # empty tensor.
    asking = normed_TC.index_select(0, rows) if len(rows) else normed_TC[:1]
    return _heads(attention, "q", asking)[: len(rows)], _heads(attention, "k", normed_TC)


def _heads(attention: HFModule, which: str, normed_TC: Tensor) -> Tensor:
    """[T, heads, D]: apply one projection and, if the family has it, the per-head (QK) norm."""
    projected = getattr(attention, f"{which}_proj")(normed_TC)
    if which == "q" and projected.shape[-1] == 2 * attention.config.num_attention_heads * attention.head_dim:
        # Qwen3.5 projects each head's query together with the gate of its output.
        projected = projected.unflatten(-1, (-1, 2 * attention.head_dim))[..., : attention.head_dim]
    else:
        projected = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return projected if norm is None else norm(projected)


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Apply rotary embedding in the half-split layout used by Llama-style models, to as many values of each head as
    there are cosines (Qwen3.5: a quarter)."""
    x_THD, rest_THD = x_THD.tensor_split([cos_TD.shape[-1]], dim=-1)
    first, second = x_THD.chunk(2, dim=-1)
    turned_THD = x_THD * cos_TD.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_TD.unsqueeze(1)
    return torch.cat((turned_THD, rest_THD), dim=-1) if rest_THD.shape[-1] else turned_THD
