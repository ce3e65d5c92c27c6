"""The portable form of a checkpoint's state: a tensor for each parameter and kind, in safetensors files.

``portable/state_00001.safetensors`` and so on hold ``NAME|fp32``, the optimizer's states, such as ``NAME|exp_avg``, and
for frozen parameters and buffers ``NAME|as_is``; ``portable/index.json`` lists the file of each tensor, and the states
that are single numbers.
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

PORTABLE = "portable"  # subfolder of a checkpoint
INDEX = "index.json"
AS_IS = "as_is"
FILE_BYTES = 2**32


class PortableFiles:
    """Reads the ``portable/`` folder of a checkpoint."""

    def __init__(self, folder: Path):
        index = json.loads((folder / INDEX).read_text())
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.counters: dict[str, Any] = index["counters"]
        # Older versions wrote only the number of steps.
        steps = {name: None if step is None else {"step": step} for name, step in index.get("steps", {}).items()}
        self._numbers: dict[str, dict[str, float] | None] = index.get("numbers", steps)
        self._files: dict[str, str] = index["tensors"]
        if outside := sorted(name for name in self._files.values() if Path(name).name != name or name == ".."):
            raise ValueError(f"{folder / INDEX} names {outside[0]}, which is outside its folder")
        self._open = {name: safe_open(folder / name, "pt") for name in set(self._files.values())}

    def keys(self, name: str) -> list[str]:
        return [full.partition("|")[2] for full in self._files if full.partition("|")[0] == name]

    def numbers(self, name: str) -> dict[str, float] | None:
        return self._numbers[name]

    def shape(self, name: str, key: str) -> torch.Size:
        full = f"{name}|{key}"
        return torch.Size(self._open[self._files[full]].get_slice(full).get_shape())

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        full = f"{name}|{key}"
        tensor = self._open[self._files[full]].get_slice(full)
        return tensor[start : start + numel] if len(tensor.get_shape()) == 1 else tensor[:].flatten()[start:][:numel]

    def untrained_names(self) -> list[str]:
        return [full.partition("|")[0] for full in self._files if full.endswith(f"|{AS_IS}")]

    def untrained(self, name: str) -> torch.Tensor:
        full = f"{name}|{AS_IS}"
        return self._open[self._files[full]].get_tensor(full)


def open_state(checkpoint: Path) -> SavedState:
    """Open the state in a checkpoint, portable or DeepSpeed's; a ``ValueError`` if an older version wrote it."""
    portable = checkpoint / PORTABLE
    return PortableFiles(portable) if portable.is_dir() else DeepSpeedFiles(checkpoint / TAG)


def write_portable(saved: SavedState, folder: Path) -> None:
    """Write the portable form of a state, with the tensors of one file in memory at a time."""
    folder.mkdir()
    index: dict[str, Any] = {"counters": saved.counters, "shapes": saved.shapes, "tensors": {}}
    index["numbers"] = {name: saved.numbers(name) for name in saved.shapes}
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
    for name in saved.shapes:
        for key in saved.keys(name):
            shape = saved.shape(name, key)
            yield f"{name}|{key}", saved.read(name, key, 0, shape.numel()).view(shape)
    for name in saved.untrained_names():
        yield f"{name}|{AS_IS}", saved.untrained(name).contiguous().clone()
