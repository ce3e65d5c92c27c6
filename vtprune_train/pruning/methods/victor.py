"""Victor (arXiv 2410.14072): learned registers after each image absorb its information in the first layers; then the
image tokens are dropped."""

from __future__ import annotations

from dataclasses import replace

from pydantic import PositiveInt
from torch import Tensor, nn

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.learned import Joining, Registers, Staying, is_register, join_registers
from vtprune_train.pruning.schedules.stages import scaled_layers

PUBLISHED_LAYERS, PUBLISHED_DEPTH = 3, 32


class Victor(PruningMethod):
    """Append ``registers`` learned tokens to each image and drop the image tokens after the first ``layers`` layers.

    Args:
        registers: learned tokens after each image.
        layers: number of decoder layers that process the image tokens; ``None`` means 3 of 32, scaled to the depth.
    """

    registers: PositiveInt = 8
    layers: PositiveInt | None = None

    name = "victor"
    paper = "Efficient Vision-Language Models by Summarizing Visual Tokens into Compact Registers (arXiv 2410.14072)"
    where = "registers after the image"
    trains = "yes, required: the registers are learned"

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        if self.layers is not None and self.layers >= num_layers:
            raise ValueError(
                f"layers={self.layers}: the image tokens would stay in all {num_layers} decoder layers; use at "
                f"most {num_layers - 1}"
            )
        end = self.layers or scaled_layers((PUBLISHED_LAYERS,), PUBLISHED_DEPTH, num_layers)[0]
        return Joining(0, 1.0, adds=True, number=self.registers), Staying(end, 0.0, number=self.registers)

    def module(self, hidden: int, num_layers: int) -> nn.Module:
        return Registers(self.registers, hidden)

    def choose(self, candidates: Candidates) -> Selection:
        if candidates.boundary.drop.adds:
            return join_registers(candidates, self.registers)
        return super().choose(candidates)

    def score(self, candidates: Candidates) -> Tensor:
        """[V] float32: 1 for registers, 0 for image tokens."""
        return is_register(candidates.boundary.span_of_visual, self.registers).float()

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Use the largest ``layers`` whose input share does not exceed ``share`` (the share changes in whole-layer
        steps)."""
        layers = floor_of(share, num_layers)
        if not 1 <= layers < num_layers:
            raise ValueError(
                f"budget {share:g} is out of range for victor, which reaches {1 / num_layers:.3f} to "
                f"{1 - 1 / num_layers:.3f} on {num_layers} layers in steps of one layer; choose another budget"
            )
        return replace(self, layers=layers)
