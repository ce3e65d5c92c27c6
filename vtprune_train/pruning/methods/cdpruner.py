"""CDPruner (arXiv 2506.10967): keeps visual tokens that are relevant to the instruction and diverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.ops.diversity import determinantal
from vtprune_train.pruning.ops.instruction import instruction_rows
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


class CDPruner(OneShare):
    """Keep floor(keep * n) of each image's n tokens: the greedy MAP subset of a determinantal point process conditioned
    on the instruction.

    Args:
        keep: keep ratio, in (0, 1]; the paper uses 192 to 64 of 576 tokens.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 64 / 576

    name = "cdpruner"
    paper = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (arXiv 2506.10967)"
    )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(0, self.keep, queries="instruction"),)

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        with torch.no_grad():
            hidden = candidates.hidden.detach()
            weights = relevance(hidden, candidates.instruction.detach(), boundary)
            sizes, take = [span.before for span in boundary.spans], [span.after for span in boundary.spans]
            return Selection(determinantal(hidden, weights, sizes, take))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return sum(2.0 * hidden * span.after * (span.before + span.after) for span in boundary.spans)
