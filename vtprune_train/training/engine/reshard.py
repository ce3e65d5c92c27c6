"""Loads a saved state of any number of ranks and any ZeRO stage into this run's engine.

Every rank reads only the parts of parameters that it keeps, from memory-mapped files. Master weights and optimizer
states are copied exactly, in float32 and bfloat16.

DeepSpeed's universal checkpoints do the same with a converted copy on disk. They do not support ZeRO stage 0 and must
be enabled before the engine starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtprune_train.models.io.placement import whole_shape
from vtprune_train.training.engine.files import MASTER, SavedState, scaler_numbers, undividable
from vtprune_train.training.engine.layout import Layout, Piece, layout_of


def load_resharded(
    engine: Any,
    expected: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
    source: Path,
    open_state: Callable[[Path], SavedState],
    agree: Callable[[Callable[[], None]], None],
) -> None:
    """Load a checkpoint of any layout into a DeepSpeed engine before its first step; all ranks call this.

    Args:
        engine: DeepSpeed's.
        expected: this rank's float32 tensors, each with states like those that the optimizer keeps for it.
        source: the checkpoint.
        open_state: opens the state in it.
        agree: runs a function on every rank and raises an error on all ranks if one fails.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise ValueError(
            "optimizer states on NVMe can only be resumed with the ranks and ZeRO stage that wrote the checkpoint"
        )
    opened: list[SavedState] = []
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()

    def fill() -> None:
        saved = open_state(source)
        _check(layout_of(engine), saved, source)
        _fill_optimizer(engine, expected, saved)
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


def _check(layout: Layout, saved: SavedState, source: Path) -> None:
    names = {*layout.shapes, *saved.shapes}
    if differing := sorted(name for name in names if layout.shapes.get(name) != saved.shapes.get(name)):
        name = differing[0]
        new_run = f"or start a new run: run.name=NEW train.init_from={source}"
        if name in layout.shapes and name in saved.shapes:
            raise ValueError(
                f"{source} has parameters of other shapes ({len(differing)} differ, the first: {name}, "
                f"{saved.shapes[name]} in the checkpoint, now {layout.shapes[name]}); restore model.*, {new_run}"
            )
        raise ValueError(
            f"{source} trains other parameters ({len(differing)} differ, the first: {name}); restore model.train and "
            f"model.peft, {new_run}"
        )


def _fill_optimizer(engine: Any, expected: Sequence[tuple[torch.Tensor, Mapping[str, Any]]], saved: SavedState) -> None:
    """Load this rank's master weights and optimizer states."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    pieces = layout_of(engine).pieces
    for number, (flat, states_like) in enumerate(expected):
        names = (piece.name for piece in pieces if piece.flat == number)
        # A parameter that never had a gradient may have no states.
        if (first := next((name for name in names if saved.numbers(name) is not None), None)) is not None:
            inner.state[flat] = _empty_states(flat, states_like, saved, first)
    for piece in pieces:
        flat = expected[piece.flat][0]
        for key in saved.keys(piece.name):
            target = flat if key == MASTER else inner.state[flat][key]
            _fill_piece(target.data, piece, key, saved, alone=piece.numel == flat.numel())
    _fill_scaler(optimizer, saved.counters["loss_scaler"])


def _empty_states(flat: torch.Tensor, states_like: Mapping[str, Any], saved: SavedState, name: str) -> dict[str, Any]:
    """States for ``flat`` with the saved numbers of parameter ``name``, and zeros for its tensors. Numbers that the
    optimizer keeps as tensors are converted, with their dtype and device."""
    states: dict[str, Any] = {}
    for key, value in (saved.numbers(name) or {}).items():
        like = states_like.get(key, value)
        is_tensor = isinstance(like, torch.Tensor)
        states[key] = torch.full_like(like, value) if is_tensor else type(like)(value)
    for key in saved.keys(name)[1:]:
        shape, dtype = saved.shape(name, key), saved.read(name, key, 0, 0).dtype
        elementwise = shape.numel() == _numel(saved, name)
        states[key] = torch.zeros(flat.shape if elementwise else shape, dtype=dtype, device=flat.device)
    return states


def _fill_piece(target: torch.Tensor, piece: Piece, key: str, saved: SavedState, alone: bool) -> None:
    """Copy a piece of a parameter's state. A state that does not have one value per element is copied whole, if the
    parameter is ``alone`` in its flat tensor."""
    shape = saved.shape(piece.name, key)
    if shape.numel() == _numel(saved, piece.name):
        part = target.view(-1).narrow(0, piece.offset, piece.numel)
        part.copy_(saved.read(piece.name, key, piece.start, piece.numel))
    elif alone:
        target.copy_(saved.read(piece.name, key, 0, shape.numel()).view(shape))
    else:
        raise undividable(piece.name, key)


def _numel(saved: SavedState, name: str) -> int:
    return torch.Size(saved.shapes[name]).numel()


def _fill_scaler(optimizer: Any, saved: dict[str, float]) -> None:
    """Load the numbers of float16's loss scaler, unless another kind was saved."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if saved.keys() == scaler_numbers(scaler).keys():
        for name, value in saved.items():
            setattr(scaler, name, value)


def with_scaler(state: Any, optimizer: Any) -> Any:
    """Replace the loss scaler in ``state``, the content of a DeepSpeed file, by this optimizer's, which gets the saved
    numbers. Returns ``state``."""
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if isinstance(inner, dict) and "loss_scaler" in inner:
        _fill_scaler(optimizer, scaler_numbers(inner["loss_scaler"]))
        inner["loss_scaler"] = optimizer.loss_scaler
    return state


def _fill_weights(engine: Any, saved: SavedState) -> None:
    """Set the trained weights of the forward pass from the master weights."""
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
    """Load frozen parameters and buffers; all ranks call this."""
    import deepspeed

    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    buffers = dict(engine.module.named_buffers())
    for name in saved.untrained_names():
        value = saved.untrained(name)
        if name in buffers:
            buffers[name].data.copy_(value)
        elif name in parameters and not parameters[name].requires_grad:
            shape = whole_shape(parameters[name])
            if shape != value.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} in the checkpoint and {list(shape)} now")
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                parameters[name].data.copy_(value)
