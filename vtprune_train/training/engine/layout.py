"""Layouts: which part of which parameter a rank keeps in the flat float32 tensors of its optimizer.

DeepSpeed keeps float32 weights and optimizer states in flat tensors, partitioned by ZeRO stage and rank. A checkpoint
has the layout of every rank next to DeepSpeed's files, so that any part of a parameter can be read from them
(:mod:`files`) and copied to its place in another engine (:mod:`reshard`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vtprune_train.models.io.placement import whole_shape


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + numel`` of a flattened parameter, stored at ``offset`` of a rank's flat tensor
    number ``flat``."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The pieces of parameters that a rank keeps, and the shapes of the whole parameters."""

    shapes: dict[str, list[int]]
    pieces: list[Piece]

    def to_json(self) -> bytes:
        pieces = [list(asdict(piece).values()) for piece in self.pieces]
        return json.dumps({"shapes": self.shapes, "pieces": pieces}).encode()

    @staticmethod
    def read(path: Path) -> Layout:
        content = json.loads(path.read_text())
        return Layout(content["shapes"], [Piece(*piece) for piece in content["pieces"]])


def layout_name(rank: int) -> str:
    """Name of the file with a rank's layout."""
    return f"layout_{rank:05d}.json"


def read_layouts(folder: Path) -> list[Layout]:
    """Read the layouts of all ranks that wrote a checkpoint; raises a ``ValueError`` if there are none."""
    layouts = [Layout.read(path) for path in sorted(folder.glob("layout_*.json"))]
    if not layouts:
        raise ValueError(
            f"{folder} has no layouts because an older version wrote it: resume with the same number of ranks and ZeRO "
            f"stage, or start from its weights with train.init_from={folder.parent}"
        )
    return layouts


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter: under ZeRO-3 its partition, otherwise all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    """This rank's float32 tensors of a DeepSpeed optimizer (at ZeRO 0 in float32: of a PyTorch optimizer)."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    groups = optimizer.fp32_groups if hasattr(optimizer, "fp32_groups") else _params(optimizer)
    return [tensor for group in groups for tensor in group]


def layout_of(engine: Any) -> Layout:
    """The layout of this rank's engine."""
    optimizer, names = engine.optimizer, {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        pieces = list(_zero3_pieces(optimizer, names))
    elif hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):
        pieces = list(_zero12_pieces(optimizer, names))
    else:
        groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else _params(optimizer)
        whole = [parameter for group in groups for parameter in group]
        pieces = [Piece(names[p], 0, p.numel(), number, 0) for number, p in enumerate(whole)]
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    shapes = {names[p]: list(whole_shape(p)) for p in trained}
    return Layout(shapes, pieces)


def _params(optimizer: Any) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _zero12_pieces(optimizer: Any, names: dict[Any, str]) -> Iterator[Piece]:
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for number, group in enumerate(groups):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:  # this rank keeps a part
                in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(names[parameter], in_parameter.start, in_parameter.numel, number, in_flat.start)


def _zero3_pieces(optimizer: Any, names: dict[Any, str]) -> Iterator[Piece]:
    from deepspeed import comm

    rank = comm.get_rank(group=optimizer.dp_process_group)
    for number, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            share = parameter.partition_numel()
            start = rank * share
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:  # the last ranks may have only padding
                yield Piece(names[parameter], start, numel, number, offset)
            offset += share
