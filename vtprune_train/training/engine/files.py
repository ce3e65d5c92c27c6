"""What DeepSpeed's files in a checkpoint hold, by parameter; read without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from vtprune_train.files import pickles
from vtprune_train.models.io.export import Stored
from vtprune_train.training.engine.layout import Piece, read_layouts

MASTER = "fp32"
WHOLE_MODEL = "mp_rank_00_model_states.pt"  # of ZeRO 0 to 2; of ZeRO 3 every rank writes its parts


class SavedState(Protocol):
    """Weights and optimizer states by parameter, from whatever files."""

    shapes: dict[str, list[int]]
    counters: dict[str, Any]

    def keys(self, name: str) -> list[str]:
        """Names of the parameter's float32 tensors: ``fp32``, ``exp_avg``, ``exp_avg_sq``."""

    def step(self, name: str) -> float | None:
        """Optimizer steps done on the parameter; ``None`` if its states were not made yet."""

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        """A stretch of the flattened tensor."""

    def untrained_names(self) -> list[str]:
        """Frozen parameters and buffers, as far as the files hold them."""

    def untrained(self, name: str) -> torch.Tensor:
        """One of these."""


class DeepSpeedFiles:
    """Reads the files of all ranks in a checkpoint's ``deepspeed/``; tensors are memory-mapped."""

    def __init__(self, folder: Path):
        self.folder, layouts = folder, read_layouts(folder)
        self.shapes = layouts[0].shapes
        paths = [folder / WHOLE_MODEL]
        if not paths[0].is_file():
            paths = [_of_rank(folder, rank, "model_states") for rank in range(len(layouts))]
        self.models = [pickles.read(path, mmap=True) for path in paths]
        main = self.models[0]
        self.counters = {name: main[name] for name in ("global_steps", "global_samples", "skipped_steps")}
        if main["optimizer"] is not None:  # ZeRO 0: every rank has everything, rank 0 wrote it
            layouts = layouts[:1]
            self.optimizers = [main["optimizer"]]
        else:
            paths = [_of_rank(folder, rank, "optim_states") for rank in range(len(layouts))]
            self.optimizers = [pickles.read(path, mmap=True)["optimizer_state_dict"] for path in paths]
        self.counters["loss_scaler"] = scaler_numbers(self.optimizers[0].get("loss_scaler"))
        self.places: dict[str, list[tuple[int, Piece]]] = {}
        for rank, layout in enumerate(layouts):
            for piece in layout.pieces:
                self.places.setdefault(piece.name, []).append((rank, piece))

    def keys(self, name: str) -> list[str]:
        rank, piece = self.places[name][0]
        states = self._states(rank, piece.flat)
        return [MASTER, *(key for key, value in states.items() if isinstance(value, torch.Tensor) and value.ndim)]

    def step(self, name: str) -> float | None:
        rank, piece = self.places[name][0]
        step = self._states(rank, piece.flat).get("step")
        return None if step is None else float(step)

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        found = torch.empty(numel)
        missing = numel
        for rank, piece in self.places[name]:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                source = self._flat(rank, piece, key).flatten()
                found[first - start : last - start] = source[piece.offset + first - piece.start :][: last - first]
                missing -= last - first
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {name} ({key}) are in no rank's files")
        return found

    def untrained_names(self) -> list[str]:
        main = self.models[0]
        if (self.folder / WHOLE_MODEL).is_file():
            return [name for name in main["module"] if name not in self.shapes]
        fragments = main.get("frozen_param_fragments") or {}
        return [*fragments, *(name for name in main["buffer_names"] if name in main["module"])]

    def untrained(self, name: str) -> torch.Tensor:
        main = self.models[0]
        if name in main["module"] and name not in (main.get("frozen_param_fragments") or {}):
            return main["module"][name]
        shape = main["frozen_param_shapes"][name]
        whole = torch.cat([model["frozen_param_fragments"][name].flatten() for model in self.models])
        return whole[: shape.numel()].view(shape)

    def _states(self, rank: int, flat: int) -> dict[str, Any]:
        optimizer = self.optimizers[rank]
        inner = optimizer.get("base_optimizer_state") or optimizer.get("optimizer_state_dict") or optimizer
        return inner["state"].get(flat, {})

    def _flat(self, rank: int, piece: Piece, key: str) -> torch.Tensor:
        if key != MASTER:
            return self._states(rank, piece.flat)[key]
        optimizer = self.optimizers[rank]
        for name in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
            if name in optimizer:
                return optimizer[name][piece.flat]
        if "fp32_groups" in optimizer:
            return [tensor for group in optimizer["fp32_groups"] for tensor in group][piece.flat]
        return self.models[0]["module"][piece.name]


def weight(saved: SavedState, wanted: Stored) -> torch.Tensor:
    """A whole weight as the model has it: rounded from the master weights, which the optimizer updates."""
    if wanted.name not in saved.shapes:
        return saved.untrained(wanted.name)
    shape = torch.Size(saved.shapes[wanted.name])
    return saved.read(wanted.name, MASTER, 0, shape.numel()).view(shape).to(getattr(torch, wanted.dtype))


def scaler_numbers(scaler: Any) -> dict[str, float]:
    """What of a loss scaler changes."""
    return {k: v for k, v in getattr(scaler, "__dict__", {}).items() if isinstance(v, int | float)}


def _of_rank(folder: Path, rank: int, kind: str) -> Path:
    """The file of a rank."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} files {pattern}, not one")
    return found[0]
