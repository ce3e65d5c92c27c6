"""QueCC (arXiv 2411.03312): regions of an image's grid become one token each, by cross-attention with a query that
contains the instruction.

Shape suffixes: V visual tokens, S images, R regions, M cells of a region, C hidden size, E width of the compressor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vtprune_train.core.stream import Boundary, Drop, ImageSpan, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions
from vtprune_train.pruning.ops.grids import Grid, grids_of, regions
from vtprune_train.pruning.ops.instruction import mean_instructions

HEADS = 8  # published
EPS = 1e-6  # of the layer norms, published


class Downsample(nn.Conv2d):
    """A depthwise convolution whose stride is its kernel, applied to regions instead of whole grids.

    Args:
        width: E.
        kernel: rows and columns of a region; M is their product.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__(width, width, kernel, stride=kernel, groups=width)

    def forward(self, cells_RME: Tensor) -> Tensor:
        """[R, E]; a region's missing cells are zeros."""
        weight_ME = self.weight.flatten(1).T
        mixed_RE = (cells_RME * weight_ME).sum(dim=1)
        assert self.bias is not None
        return mixed_RE + self.bias


def _projection(hidden: int, width: int) -> nn.Sequential:
    layers = nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=EPS)
    return nn.Sequential(*layers)


class Compressor(nn.Module):
    """Compresses the cells of each region to one token.

    The query of a region is the learned weighted sum of its cells, to which the projected instruction was added; keys
    and values are its cells alone. The submodules are not called ``q_proj`` and so on, because adapters select the
    decoder's projections by these names.

    Args:
        hidden: C.
        width: E, divisible by ``heads``.
        kernel: rows and columns of a region.
        heads: attention heads.
    """

    def __init__(self, hidden: int, width: int, kernel: int, heads: int):
        super().__init__()
        self.kernel, self.heads = kernel, heads
        self.instruction = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=EPS))
        self.query_mlp, self.key_mlp, self.value_mlp = (_projection(hidden, width) for _ in range(3))
        self.downsample = Downsample(width, kernel)
        self.query_in, self.key_in, self.value_in = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, hidden)

    def forward(
        self,
        rows_VC: Tensor,
        text_SC: Tensor | None = None,
        image_V: Tensor | None = None,
        cells_RM: Tensor | None = None,
    ) -> Tensor:
        """[R, C], one token per region. Without the other arguments, each row is an image of one cell.

        Args:
            rows_VC: visual tokens.
            text_SC: mean instruction embedding of each image.
            image_V: [V] int64, the image of each token.
            cells_RM: [R, M] int64, the tokens of each region, row by row; V where the grid ends inside a region.
        """
        number = len(rows_VC)
        text_SC = self.instruction(rows_VC if text_SC is None else text_SC)
        text_VC = text_SC if image_V is None else text_SC.index_select(0, image_V)
        if cells_RM is None:
            missing = torch.full((number, self.kernel**2 - 1), number, device=rows_VC.device)
            cells_RM = torch.cat([torch.arange(number, device=rows_VC.device)[:, None], missing], dim=1)
        queries_RE = self.downsample(_cells(self.query_mlp(rows_VC + text_VC), cells_RM))
        queries_RE = self.query_in(queries_RE)
        keys_RME, values_RME = (
            _cells(inner(outer(rows_VC)), cells_RM)
            for inner, outer in ((self.key_in, self.key_mlp), (self.value_in, self.value_mlp))
        )
        mixed_RE = self._attend(queries_RE, keys_RME, values_RME, cells_RM == number)
        return self.out(mixed_RE)  # type: ignore[no-any-return]

    def _attend(self, queries_RE: Tensor, keys_RME: Tensor, values_RME: Tensor, missing_RM: Tensor) -> Tensor:
        """[R, E]: attention of each region's query to its cells; softmax in float32."""
        size = queries_RE.shape[-1] // self.heads
        queries = queries_RE.unflatten(-1, (self.heads, size))[:, None]  # [R, 1, H, D]
        keys, values = (states.unflatten(-1, (self.heads, size)) for states in (keys_RME, values_RME))  # [R, M, H, D]
        logits_RMH = (queries * keys).sum(dim=-1).float() * size**-0.5
        weights_RMH = logits_RMH.masked_fill(missing_RM[:, :, None], float("-inf")).softmax(dim=1).to(values.dtype)
        return (weights_RMH[..., None] * values).sum(dim=1).flatten(1)


def _cells(rows_VE: Tensor, cells_RM: Tensor) -> Tensor:
    """[R, M, E], zero for missing cells."""
    padded = torch.cat([rows_VE, rows_VE.new_zeros(1, rows_VE.shape[1])])
    return padded.index_select(0, cells_RM.flatten()).view(*cells_RM.shape, rows_VE.shape[1])


@dataclass(frozen=True)
class Regions(Drop):
    """A drop point after which each image has one token for each region of ``kernel`` x ``kernel`` cells."""

    kernel: int = 1

    def kept(self, length: int, before: int) -> int:
        return -(-before // self.kernel**2)

    def kept_of(self, span: ImageSpan, length: int, before: int) -> int:
        fits = sum(rows * columns for rows, columns in span.grids) == before
        return sum(_number(grid, self.kernel) for grid in span.grids) if fits else self.kept(length, before)


def _number(grid: Grid, kernel: int) -> int:
    """Regions of a grid; tokens without a known grid are in one row, see :func:`regions`."""
    rows, columns = grid
    return -(-columns // kernel**2) if rows == 1 else -(-rows // kernel) * -(-columns // kernel)


class QueCC(PruningMethod):
    """Each region of ``kernel`` x ``kernel`` tokens becomes one learned token that depends on the instruction.

    Args:
        kernel: rows and columns of a region; LLaVA-1.5's 24 x 24 tokens become 36 with 4, 16 with 6, 4 with 12 and 1
            with 24.
        width: width of the compressor's attention, divisible by its 8 heads; ``None``: a fourth of the decoder's hidden
            size, as published for LLaVA-1.5-7B.
        positions: ``renumber`` numbers the compressed tokens 0, 1, ... (published); ``keep`` gives each the position of
            its region's centre.
    """

    kernel: PositiveInt = 4
    width: PositiveInt | None = None
    positions: Positions = "renumber"

    name = "quecc"
    paper = "Inference Optimal VLMs Need Only One Visual Token but Larger Models (arXiv 2411.03312)"
    where = "before the decoder"
    one_budget = True
    trains = "yes, required: the compressor is learned"

    def __post_init__(self) -> None:
        if self.width is not None and self.width % HEADS:
            raise ValueError(f"width={self.width} is not divisible by the {HEADS} attention heads; use a multiple of 8")

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, differentiable=True)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Regions(0, self.kernel**-2, queries="instruction", kernel=self.kernel),)

    def module(self, hidden: int, num_layers: int) -> nn.Module:
        return Compressor(hidden, self._width(hidden), self.kernel, HEADS)

    def _width(self, hidden: int) -> int:
        return self.width or max(1, hidden // 4 // HEADS) * HEADS

    def choose(self, candidates: Candidates) -> Selection:
        boundary, hidden = candidates.boundary, candidates.hidden
        assert isinstance(candidates.module, Compressor), "the method's compressor is missing"
        if candidates.module.kernel != self.kernel:
            raise ValueError(
                f"kernel={self.kernel} does not fit a compressor made for kernel={candidates.module.kernel}, which has "
                "a weight for each token of a region; keep the kernel during a run (pruning.budgets=null)"
            )
        text_SC = mean_instructions(candidates.instruction, boundary)
        cells, centres = _cells_and_centres(boundary, self.kernel)
        cells_RM, chosen = to_device((cells, centres), hidden.device)
        values = candidates.module(hidden, text_SC, boundary.span_of_visual, cells_RM)
        return Selection(chosen, torch.arange(len(chosen), device=chosen.device), values)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Use the smallest ``kernel`` whose input share does not exceed ``share``: 1/4, 1/9, 1/16, ..."""
        return replace(self, kernel=max(1, math.ceil(share**-0.5 - 1e-9)))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        width, images = self._width(hidden), len(boundary.spans)
        before, after = (sum(getattr(span, when) for span in boundary.spans) for when in ("before", "after"))
        cells = 2.0 * width * (3 * hidden + 5 * width + 3)  # projections, convolution and attention of one token
        return cells * before + 2.0 * width * (width + hidden) * after + 2.0 * hidden**2 * images


def _cells_and_centres(boundary: Boundary, kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """[R, M] and [R] int64, see :meth:`Compressor.forward`; candidate indices over all images."""
    number = sum(span.before for span in boundary.spans)
    cells, centres, start = [np.zeros((0, kernel**2), np.int64)], [np.zeros(0, np.int64)], 0
    for span in boundary.spans:
        of_span, centre = regions(grids_of(span), kernel)
        cells.append(np.where(of_span < 0, number, of_span + start))
        centres.append(centre + start)
        start += span.before
    return np.concatenate(cells), np.concatenate(centres)
