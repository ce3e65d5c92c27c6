"""How each family lays pictures out: lengths from sizes alone, pixels by transformers' own image processors."""

from vtprune_train.models.layouts.base import GatheredTiles, Grids, ImageLayout, Pictures, Shown, VisionInputs

__all__ = ["GatheredTiles", "Grids", "ImageLayout", "Pictures", "Shown", "VisionInputs"]
