"""CDPruner (arXiv 2506.10967): keeps visual tokens that are relevant to the instruction and diverse."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.clip_text import ClipSimilarity, clip_similarity
from vtprune_train.pruning.ops.diversity import determinantal
from vtprune_train.pruning.ops.instruction import instruction_rows
from vtprune_train.pruning.ops.significance import by_tile, parts_of, signals_of
from vtprune_train.pruning.schedules.stages import OfEachTile
from vtprune_train.pruning.setting_types import Share

LEAST = 1e-6  # lower bound on relevance, so that no token is excluded outright


def relevance(hidden_VC: Tensor, instruction_QC: Tensor, boundary: Boundary) -> Tensor:
    """[V] float32 in (0, 1]: cosine similarity between each token and the mean of its sample's unit-normalized
    instruction embeddings, min-max normalized per image.

    Source: CDPruner (arXiv 2506.10967), section on conditional diversity; the embeddings are the decoder's input
    embeddings.

    Args:
        hidden_VC: candidates, any float dtype.
        instruction_QC: hidden states of ``boundary.query_rows``.
        boundary: provides the segments and spans.
    """
    parts, start = [hidden_VC.new_zeros(0, dtype=torch.float32)], 0
    for span, rows in zip(boundary.spans, instruction_rows(boundary), strict=True):
        instruction_C = F.normalize(instruction_QC[rows].float(), dim=-1).mean(dim=0)
        hidden_NC = hidden_VC[start : start + span.before].float()
        start += span.before
        if not span.before:
            continue
        cosine_N = (F.normalize(hidden_NC, dim=-1) * F.normalize(instruction_C, dim=0)).sum(dim=-1)
        low, high = cosine_N.amin(), cosine_N.amax()
        parts.append((cosine_N - low + LEAST) / (high - low + LEAST))
    return torch.cat(parts)


def relevance_by_clip(clip: ClipSimilarity, features_VM: Tensor, patch_V: Tensor, boundary: Boundary) -> Tensor:
    """[V] float32: negated cosine similarity between each patch and its sample's question, min-max normalized over all
    images of the sample; :data:`LEAST` for tokens that are not patches, and 1 in samples without a question.

    Source: the published code of CDPruner (Theia-4869/CDPruner at 9541616).

    Args:
        clip: the CLIP model.
        features_VM: the vision tower's features, zero for tokens that are not patches.
        patch_V: bool mask of patches.
        boundary: provides the samples, their spans and questions.
    """
    of_samples = groupby(boundary.spans, key=lambda span: span.segment)
    sizes = [sum(span.before for span in spans) for _, spans in of_samples]
    questions = [segment.question for segment in boundary.segments]
    texts = iter(clip.texts([question for question in questions if question], features_VM.device))
    parts = [features_VM.new_zeros(0, dtype=torch.float32)]
    for question, image_NE, patch_N in zip(
        questions, clip.patches(features_VM).split(sizes), patch_V.split(sizes), strict=True
    ):
        if not question:
            parts.append(image_NE.new_ones(len(image_NE)))
            continue
        score_N = -(image_NE @ next(texts).T).mean(dim=-1)
        if not len(score_N):
            continue
        low = score_N.masked_fill(~patch_N, torch.inf).amin()
        width = score_N.masked_fill(~patch_N, -torch.inf).amax() - low
        scaled_N = (score_N - low + LEAST) / torch.where(width > 0, width, 1.0)
        parts.append(scaled_N.masked_fill(~patch_N, LEAST))
    return torch.cat(parts)


class CDPruner(OneShare):
    """Keep floor(keep * n) of each image's n tokens: the greedy MAP subset of a determinantal point process conditioned
    on the instruction.

    Args:
        keep: keep ratio, in (0, 1]; the paper uses 192 to 64 of 576 tokens.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
        text_tower: folder, or name on the Hub, of the CLIP model that the vision tower was taken from. With it, the
            method computes what the published code does: relevance from CLIP's embeddings of patches and question, and
            the same share of each tile, without newlines. The text tower is frozen, and only its name is saved.
    """

    keep: Share = 64 / 576
    text_tower: str | None = None

    name = "cdpruner"
    paper = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (arXiv 2506.10967)"
    )

    before: ClassVar[Mapping[str, Any]] = {"text_tower": None}

    @property
    def needs(self) -> Needs:
        reads = self.text_tower is not None
        return Needs(positions=self.positions, encoder_features=reads, question=reads)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        kind = Drop if self.text_tower is None else OfEachTile
        return (kind(0, self.keep, queries="instruction"),)

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        if self.text_tower is not None:
            return self._choose_by_clip(candidates, self.text_tower)
        with torch.no_grad():
            hidden = candidates.hidden.detach()
            weights = relevance(hidden, candidates.instruction.detach(), boundary)
            sizes, take = [span.before for span in boundary.spans], [span.after for span in boundary.spans]
            return Selection(determinantal(hidden, weights, sizes, take))

    @torch.no_grad()
    def _choose_by_clip(self, candidates: Candidates, text_tower: str) -> Selection:
        boundary, signals = candidates.boundary, signals_of(candidates, 0)
        assert signals.features is not None, "the tower's features are among the needs"
        if not len(candidates.hidden):
            return Selection(boundary.span_of_visual[:0])
        clip = clip_similarity(text_tower, candidates.hidden.device)
        with torch.autocast(candidates.hidden.device.type, enabled=False):
            weights = relevance_by_clip(clip, signals.features, signals.tile >= 0, boundary)
        order = by_tile(signals.tile, boundary)
        parts = [part for of_image in parts_of(boundary) for part in of_image]
        chosen = determinantal(
            candidates.hidden.detach().index_select(0, order),
            weights.index_select(0, order),
            [size for size, _ in parts],
            [count for _, count in parts],
        )
        return Selection(torch.sort(order.index_select(0, chosen)).values)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        if self.text_tower is None:
            return sum(2.0 * hidden * span.after * (span.before + span.after) for span in boundary.spans)
        parts = (part for of_image in parts_of(boundary) for part in of_image)
        return sum(2.0 * hidden * count * (size + count) for size, count in parts)
