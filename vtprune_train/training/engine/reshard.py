"""A checkpoint of any number of ranks and any ZeRO stage, dealt to this run's.

DeepSpeed keeps float32 weights and moments in flat tensors, cut by stage and rank. Beside its files every rank writes a
layout: which stretch of which parameter lies where in its flat tensors. With all ranks' layouts any stretch of any
parameter can be read (memory-mapped, so a rank reads only what it keeps), and copied to where the new engine's own
layout wants it. No number is computed anew: master weights and moments carry over exactly, in float32 and bfloat16.

DeepSpeed's universal checkpoints do the same by way of a converted copy on disk. They know no ZeRO stage 0, and must be
asked for before the engine starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vtprune_train.files import pickles
from vtprune_train.files.disk import naming
from vtprune_train.models.io.export import Stored
from vtprune_train.training.checkpoint.manifest import sync_and_hash

PORTABLE = "portable"
MASTER = "fp32"
WHOLE_MODEL = "mp_rank_00_model_states.pt"  # of ZeRO 0 to 2; of ZeRO 3 every rank writes its parts


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + numel`` of a flattened parameter, which lie at ``offset`` of flat tensor
    ``flat`` of a rank."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """What a rank keeps of the optimized parameters, and the whole parameters' shapes."""

    shapes: dict[str, list[int]]
    pieces: list[Piece]


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


# ---- where an engine keeps things -------------------------------------------------------------------------------


def flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    """A DeepSpeed (or, under ZeRO 0 in float32, PyTorch) optimizer's float32 tensors of this rank."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    groups = optimizer.fp32_groups if hasattr(optimizer, "fp32_groups") else _params(optimizer)
    return [tensor for group in groups for tensor in group]


def layout_of(engine: Any) -> Layout:
    """Where this rank keeps its part of each optimized parameter."""
    optimizer, names = engine.optimizer, {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        located = list(_zero3_pieces(optimizer, names))
    elif hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):
        located = list(_zero12_pieces(optimizer, names))
    else:
        groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else _params(optimizer)
        whole = [parameter for group in groups for parameter in group]
        located = [(p, Piece(names[p], 0, p.numel(), number, 0)) for number, p in enumerate(whole)]
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    shapes = {names[p]: list(getattr(p, "ds_shape", p.shape)) for p in trained}
    return Layout(shapes, [piece for _, piece in located])


def _params(optimizer: Any) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _zero12_pieces(optimizer: Any, names: dict[Any, str]) -> Iterator[tuple[Any, Piece]]:
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for number, group in enumerate(groups):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:  # this rank keeps some of it
                inside, kept = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, Piece(names[parameter], inside.start, inside.numel, number, kept.start)


def _zero3_pieces(optimizer: Any, names: dict[Any, str]) -> Iterator[tuple[Any, Piece]]:
    from deepspeed import comm

    rank = comm.get_rank(group=optimizer.dp_process_group)
    for number, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            share = parameter.partition_numel()
            start = rank * share
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:  # the last ranks' shares may be padding alone
                yield parameter, Piece(names[parameter], start, numel, number, offset)
            offset += share


def write_layout(partial: Path, tag: str, layout: Layout, rank: int) -> dict[str, dict[str, Any]]:
    """Write a rank's layout beside its files. Returns the manifest's entry."""
    path = _layout_path(partial / tag, rank)
    path.parent.mkdir(exist_ok=True)
    pieces = [list(asdict(piece).values()) for piece in layout.pieces]
    with naming(path):
        path.write_text(json.dumps({"shapes": layout.shapes, "pieces": pieces}))
    return {str(path.relative_to(partial)): sync_and_hash(path)}


def _layout_path(folder: Path, rank: int) -> Path:
    return folder / f"layout_{rank:05d}.json"


def _read_layout(path: Path) -> Layout:
    content = json.loads(path.read_text())
    return Layout(content["shapes"], [Piece(*piece) for piece in content["pieces"]])


def has_layout(folder: Path, engine: Any, rank: int) -> bool:
    """Whether a rank's flat tensors were written as the engine keeps them; older versions wrote no layout."""
    path = _layout_path(folder, rank)
    return not path.is_file() or _read_layout(path) == layout_of(engine)


def read_layouts(folder: Path) -> list[Layout]:
    """The layouts of all ranks that wrote a checkpoint.

    Raises:
        ValueError: there is none.
    """
    layouts = [_read_layout(path) for path in sorted(folder.glob("layout_*.json"))]
    if not layouts:
        raise ValueError(
            f"{folder} holds no layouts (an older version wrote it): resume with the ranks and ZeRO stage that wrote "
            f"it, or start from its weights with train.init_from={folder.parent}"
        )
    return layouts


# ---- reading what was saved -------------------------------------------------------------------------------------


class DeepSpeedFiles:
    """Reads the files of all ranks of a checkpoint; tensors are memory-mapped.

    Args:
        folder: ``deepspeed/`` of a checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder, layouts = folder, read_layouts(folder)
        self.shapes = layouts[0].shapes
        self.models = [pickles.read(path, mmap=True) for path in _model_files(folder, len(layouts))]
        main = self.models[0]
        self.counters = {name: main[name] for name in ("global_steps", "global_samples", "skipped_steps")}
        if main["optimizer"] is not None:  # ZeRO 0: every rank has everything, rank 0 wrote it
            layouts = layouts[:1]
            self.optimizers = [main["optimizer"]]
        else:
            self.optimizers = [pickles.read(path, mmap=True) for path in _optimizer_files(folder, len(layouts))]
            self.optimizers = [optimizer["optimizer_state_dict"] for optimizer in self.optimizers]
        self.counters["loss_scaler"] = scaler_numbers(self.optimizers[0].get("loss_scaler"))
        self.places: dict[str, list[tuple[int, Piece]]] = {}
        for rank, layout in enumerate(layouts):
            for piece in layout.pieces:
                self.places.setdefault(piece.name, []).append((rank, piece))

    def keys(self, name: str) -> list[str]:
        rank, piece = self.places[name][0]
        return [
            MASTER,
            *(k for k, v in self._states(rank, piece.flat).items() if isinstance(v, torch.Tensor) and v.ndim),
        ]

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


def _model_files(folder: Path, ranks: int) -> list[Path]:
    if (folder / WHOLE_MODEL).is_file():
        return [folder / WHOLE_MODEL]
    return [_only(folder, f"*zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(ranks)]


def _optimizer_files(folder: Path, ranks: int) -> list[Path]:
    return [_only(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(ranks)]


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} files {pattern}, not one")
    return found[0]


def open_state(checkpoint: Path) -> SavedState:
    """The state in a checkpoint, whichever form it has.

    Raises:
        ValueError: it has none, or from an older version.
    """
    if (checkpoint / PORTABLE).is_dir():
        from vtprune_train.training.checkpoint.portable import PortableFiles

        return PortableFiles(checkpoint / PORTABLE)
    return DeepSpeedFiles(checkpoint / "deepspeed")


# ---- filling an engine ------------------------------------------------------------------------------------------


def load_elastic(engine: Any, checkpoint: Path, agree: Callable[[Callable[[], None]], None]) -> None:
    """Fill a new engine from a checkpoint of other ranks or another ZeRO stage; all ranks call this.

    Args:
        engine: not stepped yet.
        checkpoint: complete.
        agree: does something on every rank and raises on all if one fails.

    Raises:
        ValueError: the files do not hold what this engine trains.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise ValueError("optimizer states on NVMe resume only with the ranks and ZeRO stage that wrote the checkpoint")
    opened: list[SavedState] = []
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()

    def fill() -> None:
        saved = open_state(checkpoint)
        _check(layout_of(engine), saved, checkpoint)
        _fill_optimizer(engine, saved)
        _fill_weights(engine, saved)
        opened.append(saved)

    agree(fill)
    _fill_untrained(engine, opened[0])
    if hasattr(optimizer, "fp16_partitioned_groups_flat") and optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, opened[0].counters[name])


def _check(layout: Layout, saved: SavedState, checkpoint: Path) -> None:
    differing = sorted(
        name for name in {*layout.shapes, *saved.shapes} if layout.shapes.get(name) != saved.shapes.get(name)
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} trained other parameters than this run: {len(differing)} differ, the first is {name} "
            f"(checkpoint {saved.shapes.get(name)}, now {layout.shapes.get(name)}); set model.* back"
        )


def _fill_optimizer(engine: Any, saved: SavedState) -> None:
    """This rank's master weights and optimizer states."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    as_tensor = isinstance(inner, torch.optim.AdamW)  # PyTorch counts steps in a tensor, DeepSpeed's in a number
    flats = flat_tensors(optimizer)
    pieces = layout_of(engine).pieces
    # All parameters are stepped together, but for those that never had a gradient, which may have no state.
    first = next((name for name in saved.shapes if saved.step(name) is not None), next(iter(saved.shapes)))
    for flat in flats:
        states, step = inner.state[flat], saved.step(first)
        if step is None:
            continue
        states["step"] = torch.tensor(step, device=flat.device) if as_tensor else int(step)
        for key in saved.keys(first)[1:]:
            if key not in states:
                states[key] = torch.zeros_like(flat, memory_format=torch.contiguous_format)
    for piece in pieces:
        flat = flats[piece.flat]
        for key in saved.keys(piece.name):
            target = flat if key == MASTER else inner.state[flat][key]
            part = target.data.view(-1).narrow(0, piece.offset, piece.numel)
            part.copy_(saved.read(piece.name, key, piece.start, piece.numel))
    fill_scaler(optimizer, saved.counters["loss_scaler"])


def fill_scaler(optimizer: Any, saved: dict[str, float]) -> None:
    """The numbers of float16's loss scaler; those of another dtype's are of no use here."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if saved.keys() == scaler_numbers(scaler).keys():
        for name, value in saved.items():
            setattr(scaler, name, value)


def _fill_weights(engine: Any, saved: SavedState) -> None:
    """The trained weights that the forward pass reads, from the master weights."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_partitioned_groups_flat"):
        for name, parameter in engine.module.named_parameters():
            if name in saved.shapes:
                parameter.data.copy_(saved.read(name, MASTER, 0, parameter.numel()).view_as(parameter))
        return
    flats = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for number, (low, high) in enumerate(flats):
        low.data.copy_(high.data)
        parts = optimizer.unflatten(low, optimizer.fp16_partitioned_groups[number])
        for partition, part in zip(optimizer.fp16_partitioned_groups[number], parts, strict=True):
            partition.data = part.data


def _fill_untrained(engine: Any, saved: SavedState) -> None:
    """Frozen parameters and buffers; all ranks call this."""
    import deepspeed

    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    buffers = dict(engine.module.named_buffers())
    for name in saved.untrained_names():
        value = saved.untrained(name)
        if name in buffers:
            buffers[name].data.copy_(value)
        elif name in parameters and not parameters[name].requires_grad:
            shape = getattr(parameters[name], "ds_shape", parameters[name].shape)
            if shape != value.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} in the checkpoint and {list(shape)} now")
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                parameters[name].data.copy_(value)
