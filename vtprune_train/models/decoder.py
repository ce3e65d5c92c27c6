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
from vtprune_train.pruning.base import PruningMethod, Ranking
from vtprune_train.pruning.selection import kept_rows
from vtprune_train.stream import Boundary, Stage, StreamPlan


@dataclass
class DecoderOutput:
    """``last_hidden_state`` [T_last, C] before the final norm; ``kept`` holds, for each boundary, the rows of the
    ending stage that entered the next ([T_next] int64)."""

    last_hidden_state: Tensor
    kept: tuple[Tensor, ...]


def run_layers(
    text_model: HFModule, hidden_TC: Tensor, plan: StreamPlan, method: PruningMethod | None = None
) -> DecoderOutput:
    """Run a packed stream through the decoder layers of ``text_model`` (anything built like ``LlamaModel``).

    Args:
        text_model: has ``layers``, ``rotary_emb``; its ``config._attn_implementation`` is one of our backends.
        hidden_TC: [T, C], embedded text and projected images in place.
        plan: the stages; its tensors are on the device of ``hidden_TC``.
        method: who picks the survivors; may be ``None`` if the plan has no boundary.
    """
    hidden = hidden_TC.unsqueeze(0)
    position_ids = plan.stages[0].position_ids.unsqueeze(0)
    kept: list[Tensor] = []
    for index, stage in enumerate(plan.stages):
        rotary = text_model.rotary_emb(hidden, position_ids=position_ids)
        boundary = plan.boundaries[index] if index < len(plan.boundaries) else None
        probe = None
        if boundary is not None and method is not None and method.rank_with == "this_layer":
            probe = _Probe(method, boundary, _scaling(text_model.layers[stage.end_layer - 1]))
        for layer_index in range(stage.first_layer, stage.end_layer):
            is_last = layer_index == stage.end_layer - 1
            extra = {"probe": probe} if probe is not None and is_last else {}
            hidden = text_model.layers[layer_index](
                hidden, attention_mask=None, position_ids=position_ids, position_embeddings=rotary,
                use_cache=False, **_attention_keywords(stage), **extra,
            )  # fmt: skip
        if boundary is None:
            continue
        assert method is not None, "a plan with boundaries needs the method that planned it"
        if probe is None:
            scores = _score_with_next_layer(text_model.layers[boundary.layer], method, hidden, rotary, boundary)
        else:
            scores = probe.scores()
        with torch.no_grad():
            rows = kept_rows(boundary.text_rows, boundary.visual_rows, method.select(scores, boundary))
        hidden = hidden.index_select(1, rows)
        kept.append(rows)
        if method.positions == "keep":
            position_ids = position_ids.index_select(1, rows)
        else:
            position_ids = plan.stages[index + 1].position_ids.unsqueeze(0)
    return DecoderOutput(hidden.squeeze(0), tuple(kept))


def _attention_keywords(stage: Stage) -> dict[str, Any]:
    return {
        "cu_seq_lens_q": stage.cu_seqlens,
        "cu_seq_lens_k": stage.cu_seqlens,
        "max_length_q": stage.max_seqlen,
        "max_length_k": stage.max_seqlen,
        "segment_lengths": stage.segment_lengths,
    }


class _Probe:
    """Scores the visual tokens from inside a layer's attention. Recomputing the layer does not score again."""

    def __init__(self, method: PruningMethod, boundary: Boundary, scaling: float):
        self.method, self.boundary, self.scaling = method, boundary, scaling
        self._scores: Tensor | None = None

    @torch.no_grad()
    def __call__(self, q_THD: Tensor, k_TGD: Tensor) -> None:
        if self._scores is None:
            queries = q_THD.detach().index_select(0, self.boundary.query_rows)
            self._scores = self.method.score(Ranking(queries, k_TGD.detach(), self.scaling), self.boundary)

    def scores(self) -> Tensor:
        assert self._scores is not None, "the attention backend did not call the probe"
        return self._scores


@torch.no_grad()
def _score_with_next_layer(
    layer: HFModule, method: PruningMethod, hidden: Tensor, rotary: tuple[Tensor, Tensor], boundary: Boundary
) -> Tensor:
    """Score with the layer about to run: its input norm, its query and key projections, the ending stage's positions.

    Queries are projected for the query rows only. Runs the same modules whether or not the stream has images, so
    that ranks stay together under ZeRO-3.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden).squeeze(0)  # [T, C]
    cos, sin = (table.squeeze(0) for table in rotary)  # [T, D]
    queries = _heads(attention, "q", normed.index_select(0, boundary.query_rows))
    keys = _heads(attention, "k", normed)
    queries = _rotate(queries, cos.index_select(0, boundary.query_rows), sin.index_select(0, boundary.query_rows))
    return method.score(Ranking(queries, _rotate(keys, cos, sin), _scaling(layer)), boundary)


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
