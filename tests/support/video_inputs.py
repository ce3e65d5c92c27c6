"""Inputs with videos as a family's processor makes them, from random pixels."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.families import tokenizer
from tests.support.helpers import PATCH, TILE

VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")
Grid = tuple[int, int, int]
"""Steps in time, rows and columns of patches."""


def is_qwen(name: str) -> bool:
    return name.startswith("qwen")


def video_words(name: str, grid: Grid) -> list[str]:
    """The words that the processor writes for a video; with timestamps, between the frames."""
    steps, rows, columns = grid
    tokens = ["<|video_pad|>"] * (rows // 2 * columns // 2)
    if name in ("qwen3_vl", "qwen3_5"):
        frame = ["<|vision_start|>", *tokens, "<|vision_end|>"]
        return [word for step in range(steps) for word in ("two", "."[step % 1 :], *frame)]
    if is_qwen(name):
        return ["<|vision_start|>", *tokens * steps, "<|vision_end|>"]
    side = TILE // PATCH // 2
    return ["<video>"] * (steps * side * side + (name == "llava_onevision"))


def video_inputs(name: str, texts: list[list[str | Grid]], side: str = "left", seed: int = 0) -> dict[str, Any]:
    """A padded batch: each sample is words, with a grid where a video stands. All videos of a LLaVA family must have
    the same number of frames."""
    generator = torch.Generator().manual_seed(seed)
    grids = [part for text in texts for part in text if isinstance(part, tuple)]
    made: dict[str, Any] = {}
    if grids and is_qwen(name):
        patches = sum(steps * rows * columns for steps, rows, columns in grids)
        made["pixel_values_videos"] = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
        made["video_grid_thw"] = torch.tensor(grids)
        if name == "qwen2_5_vl":
            made["second_per_grid_ts"] = [1.0 + number for number in range(len(grids))]
    elif grids:
        made["pixel_values_videos"] = torch.randn(len(grids), grids[0][0], 3, TILE, TILE, generator=generator)
    words = tokenizer()
    rows = []
    for text in texts:
        row: list[str] = []
        for part in text:
            row += video_words(name, part) if isinstance(part, tuple) else part.split()
        rows.append(words.convert_tokens_to_ids(row))
    width = max(len(row) for row in rows)
    padding = [[3] * (width - len(row)) for row in rows]
    left = side == "left"
    made["input_ids"] = torch.tensor([p + r if left else r + p for r, p in zip(rows, padding, strict=True)])
    ones = [([0] * len(p), [1] * len(r)) for r, p in zip(rows, padding, strict=True)]
    made["attention_mask"] = torch.tensor([p + r if left else r + p for p, r in ones])
    if is_qwen(name):
        made["mm_token_type_ids"] = 2 * (made["input_ids"] == 9).int()
    return made
