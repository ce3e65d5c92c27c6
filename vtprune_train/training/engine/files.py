"""Reads DeepSpeed's files in a checkpoint by parameter, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from vtprune_train.files import pickles
from vtprune_train.models.io.export import Stored
from vtprune_train.training.engine.layout import Piece, read_layouts

MASTER = "fp32"
WHOLE_MODEL = "mp_rank_00_model_states.pt"  # of ZeRO 0 to 2; under ZeRO 3 every rank writes its partition


class SavedState(Protocol):
    """Weights and optimizer states by parameter, from DeepSpeed's files or the portable form."""

    shapes: dict[str, list[int]]
    counters: dict[str, Any]

    def keys(self, name: str) -> list[str]:
        """Names of the parameter's tensors: ``fp32``, then those of the optimizer, such as ``exp_avg``."""

    def numbers(self, name: str) -> dict[str, float] | None:
        """Optimizer states of the parameter that are single numbers, such as ``step``; ``None`` if it has no states
        yet."""

    def shape(self, name: str, key: str) -> torch.Size:
        """The shape of a tensor, flat if it has one value per element of the parameter. Raises a ``ValueError`` if it
        has another shape and belongs to several parameters or to a part of one."""

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        """Elements ``start`` to ``start + numel`` of the flattened tensor."""

    def untrained_names(self) -> list[str]:
        """Names of the frozen parameters and buffers in the files."""

    def untrained(self, name: str) -> torch.Tensor:
        """A frozen parameter or buffer."""


class DeepSpeedFiles:
    """Reads the files of all ranks in a checkpoint's ``deepspeed/`` folder; tensors are memory-mapped."""

    def __init__(self, folder: Path):
        self.folder, layouts = folder, read_layouts(folder)
        self.shapes = layouts[0].shapes
        paths = [folder / WHOLE_MODEL]
        if not paths[0].is_file():
            paths = [_of_rank(folder, rank, "model_states") for rank in range(len(layouts))]
        self.models = [pickles.read(path, mmap=True) for path in paths]
        main = self.models[0]
        self.counters = {name: main[name] for name in ("global_steps", "global_samples", "skipped_steps")}
        if main["optimizer"] is not None:  # ZeRO 0: rank 0 wrote everything
            layouts = layouts[:1]
            self.optimizers = [main["optimizer"]]
        else:
            paths = [_of_rank(folder, rank, "optim_states") for rank in range(len(layouts))]
            self.optimizers = [pickles.read(path, mmap=True)["optimizer_state_dict"] for path in paths]
        self.counters["loss_scaler"] = scaler_numbers(self.optimizers[0].get("loss_scaler"))
        self._layouts = layouts
        self.places: dict[str, list[tuple[int, Piece]]] = {}
        for rank, layout in enumerate(layouts):
            for piece in layout.pieces:
                self.places.setdefault(piece.name, []).append((rank, piece))

    def keys(self, name: str) -> list[str]:
        rank, piece = self.places[name][0]
        states = self._states(rank, piece.flat)
        return [MASTER, *(key for key, value in states.items() if isinstance(value, torch.Tensor) and value.ndim)]

    def numbers(self, name: str) -> dict[str, float] | None:
        rank, piece = self.places[name][0]
        states = self._states(rank, piece.flat)
        if not states:
            return None
        single = {key: value.item() if is_number(value) else value for key, value in states.items()}
        return {key: value for key, value in single.items() if isinstance(value, int | float)}

    def shape(self, name: str, key: str) -> torch.Size:
        rank, piece = self.places[name][0]
        value, flat = self._flat(rank, piece, key), self._flat(rank, piece, MASTER)
        numel = torch.Size(self.shapes[name]).numel()
        used = max(other.offset + other.numel for other in self._layouts[rank].pieces if other.flat == piece.flat)
        # DeepSpeed removes the padding from the weights, but not from the states.
        if value.shape == flat.shape or (value.ndim == flat.ndim == 1 and value.numel() >= used):
            return torch.Size([numel])
        if piece.numel == flat.numel() == numel:
            return value.shape
        raise undividable(name, key)

    def read(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        rank, piece = self.places[name][0]
        whole = self._flat(rank, piece, key)
        if self.shape(name, key) != torch.Size([torch.Size(self.shapes[name]).numel()]):
            return whole.flatten()[start : start + numel]
        result = torch.empty(numel, dtype=torch.float32 if key == MASTER else whole.dtype)
        missing = numel
        for rank, piece in self.places[name]:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                source = self._flat(rank, piece, key).flatten()
                result[first - start : last - start] = source[piece.offset + first - piece.start :][: last - first]
                missing -= last - first
        if missing:
            raise ValueError(
                f"{self.folder}: {missing} elements of {name} ({key}) are missing from the files of all ranks"
            )
        return result

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
        states: dict[str, Any] = {}
        for key, value in inner["state"].get(flat, {}).items():
            states.update(value if isinstance(value, dict) else {key: value})  # bitsandbytes nests some in a dict
        return states

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


def weight(saved: SavedState, stored: Stored) -> torch.Tensor:
    """A whole weight in the model's dtype, rounded from its float32 master weights."""
    if stored.name not in saved.shapes:
        return saved.untrained(stored.name)
    shape = torch.Size(saved.shapes[stored.name])
    return saved.read(stored.name, MASTER, 0, shape.numel()).view(shape).to(getattr(torch, stored.dtype))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a tensor without dimensions."""
    return isinstance(value, torch.Tensor) and not value.ndim


def undividable(name: str, key: str) -> ValueError:
    """The error for an optimizer state that cannot be distributed to other ranks."""
    return ValueError(
        f"the optimizer state {key} of {name} does not have one value per element, so it cannot be distributed to "
        "other ranks or another ZeRO stage; resume with the ranks and ZeRO stage that wrote the checkpoint, or start a "
        "new run from its weights with train.init_from"
    )


def scaler_numbers(scaler: Any) -> dict[str, float]:
    """The numbers of a loss scaler."""
    return {k: v for k, v in getattr(scaler, "__dict__", {}).items() if isinstance(v, int | float)}


def _of_rank(folder: Path, rank: int, kind: str) -> Path:
    """A rank's file."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise ValueError(f"{folder} contains {len(files)} files {pattern} instead of one")
    return files[0]
