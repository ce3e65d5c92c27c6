"""The interface between DeepSpeed and the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune_train.files import pickles
from vtprune_train.models import HFModule
from vtprune_train.training import distributed as ranks
from vtprune_train.training.engine import gradients, reshard, state
from vtprune_train.training.engine.files import SavedState
from vtprune_train.training.engine.layout import Layout, flat_tensors, layout_of
from vtprune_train.training.muon import Matrix, Muon, Shard
from vtprune_train.training.optimizer import OptimizerSpec, bytes_per_element


class Engine:
    """Trains a model::

        for index, batch in enumerate(batches):
            with engine.accumulate(last=index == len(batches) - 1):
                output = engine(batch)
                engine.backward(output.loss)
        applied = engine.step()  # or engine.zero_grad() to skip the update

    Created by :func:`vtprune_train.training.engine.start.start_engine`.

    Attributes:
        module: the model; under ZeRO-3 its parameters are partitioned.
        device: of this rank.
        zero_stage: 0 to 3.
        dtype: of the forward pass, as in ``model.dtype``.
    """

    def __init__(self, deepspeed: Any, spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]]):
        self._deepspeed, self._spec = deepspeed, spec
        self.module: HFModule = deepspeed.module
        self.device: torch.device = deepspeed.device
        self.zero_stage = int(deepspeed.zero_optimization_stage())
        half = "bfloat16" if deepspeed.bfloat16_enabled() else "float16" if deepspeed.fp16_enabled() else ""
        self.dtype = half or "float32"
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._groups = {names[parameter]: group for group in groups for parameter in group["params"]}
        if isinstance(self._inner, Muon):
            self._inner.bind(self._matrices(), self.device)

    def train(self) -> None:
        """Set the model to training mode."""
        self._deepspeed.train()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model's forward pass."""
        return self._deepspeed(*inputs, **named)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Context for the forward and backward pass of a micro-batch; gradients are complete after the ``last`` one."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self._deepspeed.step()  # counts the micro-batch

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of ``loss``, averaged over ranks."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def squared_grad_norm(self) -> Tensor:
        """This rank's share of the squared norm of the gradient; see :func:`gradients.squared_norm`."""
        return gradients.squared_norm(self._deepspeed, ranks.world_size())

    @property
    def loss_scale(self) -> float:
        """Factor of losses and gradients in the backward pass (1 except for float16)."""
        return float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))

    @property
    def loss_scale_may_fall(self) -> bool:
        """Whether dynamic loss scaling (float16) can still lower the scale after an overflow."""
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)
        return scaler is not None and bool(scaler.dynamic) and scaler.cur_scale > scaler.min_scale

    def step(self) -> bool:
        """Update the model. Returns false if float16 loss scaling skipped the update because of an overflow."""
        self._deepspeed.step()
        return bool(self._deepspeed.was_step_applied())

    def zero_grad(self) -> None:
        """Discard the step's gradients; see :func:`gradients.discard`."""
        gradients.discard(self._deepspeed)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer."""
        return self._deepspeed.optimizer.param_groups  # type: ignore[no-any-return]

    @property
    def optimizer_name(self) -> str:
        """``train.optimizer``."""
        return self._spec.name

    def missing_states(self) -> list[Tensor]:
        """Uninitialized tensors as large as the optimizer states that this rank does not have yet, on its device."""
        states = self._inner.state
        without = [(flat, expected) for flat, expected in self._expected_states() if not states.get(flat)]
        return [
            torch.empty(int(size * flat.numel()), dtype=torch.uint8, device=flat.device)
            for flat, expected in without
            for size in bytes_per_element(expected)
        ]

    def state_bytes(self) -> int:
        """Bytes of the optimizer states of all ranks after the first step. (At ZeRO 0 all ranks have the same ones,
        which count once.)"""
        of_rank = sum(flat.numel() * sum(bytes_per_element(expected)) for flat, expected in self._expected_states())
        return int(of_rank) * (ranks.world_size() if self.zero_stage else 1)

    def check_states(self) -> None:
        """Raise a ``ValueError`` if states that the optimizer keeps are missing from those that were loaded."""
        loaded_names: dict[tuple[str, ...], set[str]] = {}  # names of loaded states, by the expected names
        for flat, expected in self._expected_states():
            loaded_names.setdefault(tuple(expected), set()).update(self._inner.state.get(flat, ()))
        for names, loaded in loaded_names.items():
            if loaded and (missing := set(names) - loaded):
                raise ValueError(
                    f"train.optimizer={self._spec.name} with these settings keeps {', '.join(sorted(names))}, but "
                    f"the checkpoint has no {', '.join(sorted(missing))}; restore train.optimizer_args and the ZeRO "
                    "stage"
                )

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer that has the states; DeepSpeed's may wrap it."""
        optimizer = self._deepspeed.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _expected_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's float32 tensors, each with the states that the optimizer keeps for such a tensor after a step; no
        states for a tensor that is only padding."""
        groups = {piece.flat: self._groups[piece.name] for piece in self.layout().pieces}
        return [
            (flat, self._spec.states(groups[number], flat.ndim, flat.device) if number in groups else {})
            for number, flat in enumerate(flat_tensors(self._deepspeed.optimizer))
        ]

    def layout(self) -> Layout:
        """Which parts of the trained parameters this rank keeps, and where."""
        return layout_of(self._deepspeed)

    def state_files(self, folder: Path, tag: str, copy: Callable[[Any], Any], trained_only: bool) -> state.Files:
        """The files of a checkpoint; see :func:`state.collect_files`. All ranks call this together."""
        return state.collect_files(self._deepspeed, folder, tag, copy, trained_only)

    def load_files(self, folder: Path, tag: str, strict: bool) -> None:
        """Load the files of :meth:`state_files` with the same number of ranks, ZeRO stage and dtype. All ranks call
        this before the first step. Learning rates and other settings of the parameter groups are not changed.

        Args:
            folder: the checkpoint.
            tag: the folder of DeepSpeed's files in it.
            strict: whether the files contain every parameter.
        """
        optimizer = self._deepspeed.optimizer
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        with pickles.for_torch_load(lambda content: reshard.with_scaler(content, optimizer)):
            loaded, _ = self._deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        if loaded is None:
            raise ValueError(f"DeepSpeed found no checkpoint in {folder / tag}")
        for group, before in zip(self.param_groups, settings, strict=True):
            group.update(before)

    def load_resharded(
        self, source: Path, open_state: Callable[[Path], SavedState], agree: Callable[[Callable[[], None]], None]
    ) -> None:
        """Load a state with any layout; see :func:`reshard.load_resharded`. All ranks call this together."""
        reshard.load_resharded(self._deepspeed, self._expected_states(), source, open_state, agree)

    def _matrices(self) -> dict[Tensor, list[Matrix]]:
        """The matrices that Muon orthogonalizes, by this rank's float32 tensors."""
        shards: dict[tuple[int, str], list[Shard]] = {}
        shapes = self.layout().shapes
        for rank, pieces in enumerate(ranks.gather(self.layout().pieces)):
            if self.zero_stage or rank == ranks.rank():  # at stage 0 every rank has whole matrices
                for piece in pieces:
                    if self._groups[piece.name].get("muon"):
                        shard = Shard(rank, piece.numel, piece.offset)
                        shards.setdefault((piece.flat, piece.name), []).append(shard)
        matrices: dict[Tensor, list[Matrix]] = {}
        flats = flat_tensors(self._deepspeed.optimizer)
        for (number, name), parts in sorted(shards.items()):
            matrices.setdefault(flats[number], []).append(Matrix(torch.Size(shapes[name]), tuple(parts)))
        return matrices
