"""The instruction of each image: what its sample's query rows say.

Shape suffixes: Q query rows, S spans, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary


def instruction_rows(boundary: Boundary) -> list[slice]:
    """For each span, the slice of the query rows that belong to its segment."""
    numbers = sorted({span.segment for span in boundary.spans})
    rows = {
        number: slice(segment.query_start, segment.query_end)
        for number, segment in zip(numbers, boundary.segments, strict=True)
    }
    return [rows[span.segment] for span in boundary.spans]


def mean_instructions(instruction_QC: Tensor, boundary: Boundary) -> Tensor:
    """[S, C] mean of the query rows' hidden states for each span, in the dtype of ``instruction_QC``."""
    means = [instruction_QC[rows].float().mean(dim=0) for rows in instruction_rows(boundary)]
    return torch.stack(means).to(instruction_QC.dtype) if means else instruction_QC[:0]
