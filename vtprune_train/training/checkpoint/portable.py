"""The portable form of a checkpoint's state: one float32 tensor a parameter and kind, in safetensors files.

``portable/state_00001.safetensors`` and so on hold ``NAME|fp32``, ``NAME|exp_avg``, ``NAME|exp_avg_sq`` and, for frozen
parameters and buffers, ``NAME|as_is``; ``portable/index.json`` says which file holds what, and what is no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vtprune_train.training.checkpoint.folder import TAG
from vtprune_train.training.engine.files import DeepSpeedFiles, SavedState

PORTABLE = "portable"  # the folder of a checkpoint
INDEX = "index.json"
AS_IS = "as_is"
FILE_BYTES = 2**32


class PortableFiles:
    """Reads the portable form, ``portable/`` of a checkpoint."""

    def __init__(self, folder: Path):
        index = json.loads((folder / INDEX).read_text())
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.counters: dict[str, Any] = index["counters"]
        self._steps: dict[str, float | None] = index["steps"]
        self._files: dict[str, str] = index["tensors"]
        if outside := sorted(name for name in self._files.values() if Path(name).name != name or name == ".."):
            raise ValueError(f"{folder / INDEX} names {outside[0]}, which is no file of its folder")
        self._open = {name: safe_open(folder / name, "pt") for name in set(self._files.values())}

    def keys(self, name: str) -> list[str]:
        return [full.partition("|")[2] for full in self._files if full.partition("|")[0] == name]

    def step(self, name: str) -> float | None:
        return self._steps[name]

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        full = f"{name}|{key}"
        return self._open[self._files[full]].get_slice(full)[start : start + numel]

    def untrained_names(self) -> list[str]:
        return [full.partition("|")[0] for full in self._files if full.endswith(f"|{AS_IS}")]

    def untrained(self, name: str) -> torch.Tensor:
        full = f"{name}|{AS_IS}"
        return self._open[self._files[full]].get_tensor(full)


def open_state(checkpoint: Path) -> SavedState:
    """The state in a checkpoint, whichever form it has; a ``ValueError`` if an older version wrote it."""
    portable = checkpoint / PORTABLE
    return PortableFiles(portable) if portable.is_dir() else DeepSpeedFiles(checkpoint / TAG)


def write_portable(saved: SavedState, folder: Path) -> None:
    """Write the portable form of a state, one parameter in memory at a time (a file's worth before it is written)."""
    folder.mkdir()
    index: dict[str, Any] = {"counters": saved.counters, "shapes": saved.shapes, "tensors": {}}
    index["steps"] = {name: saved.step(name) for name in saved.shapes}
    batch: dict[str, torch.Tensor] = {}

    def write_batch() -> None:
        if batch:
            file = f"state_{len(set(index['tensors'].values())) + 1:05d}.safetensors"
            save_file(batch, folder / file)
            index["tensors"].update(dict.fromkeys(batch, file))
            batch.clear()

    for full, tensor in _tensors(saved):
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > FILE_BYTES:
            write_batch()
        batch[full] = tensor
    write_batch()
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _tensors(saved: SavedState) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in saved.shapes.items():
        numel = torch.Size(shape).numel()
        for key in saved.keys(name):
            yield f"{name}|{key}", saved.read(name, key, 0, numel)
    for name in saved.untrained_names():
        yield f"{name}|{AS_IS}", saved.untrained(name).contiguous().clone()
