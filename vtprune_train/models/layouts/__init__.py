"""How each family lays pictures out: lengths from sizes alone, pixels by transformers' own image processors."""

from vtprune_train.models.layouts.base import GatheredTiles, ImageLayout, Pictures, VisionInputs

__all__ = ["GatheredTiles", "ImageLayout", "Pictures", "VisionInputs"]
