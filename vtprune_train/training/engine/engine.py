"""A model and its optimizer on DeepSpeed, as the rest of the package uses them."""

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
from vtprune_train.training.engine.monitors import Monitors
from vtprune_train.training.muon import Matrix, Muon, Stretch
from vtprune_train.training.optimizer import OptimizerSpec, bytes_per_element


class Engine:
    """Trains a model::

        for index, batch in enumerate(batches):
            with engine.accumulate(last=index == len(batches) - 1):
                output = engine(batch)
                engine.backward(output.loss)
        applied = engine.step()  # or engine.zero_grad(), to leave the step out

    Under ZeRO-3 the parameters of ``module``, the model, are partitions; ``dtype`` is what it computes in, as
    ``model.dtype`` names it, and scalars are shown in ``monitors``.
    :func:`vtprune_train.training.engine.start.start_engine` makes one around a ``DeepSpeedEngine``.
    """

    def __init__(self, deepspeed: Any, spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]]):
        self._deepspeed, self._spec = deepspeed, spec
        self.module: HFModule = deepspeed.module
        self.device: torch.device = deepspeed.device
        self.zero_stage = int(deepspeed.zero_optimization_stage())
        half = "bfloat16" if deepspeed.bfloat16_enabled() else "float16" if deepspeed.fp16_enabled() else ""
        self.dtype = half or "float32"
        self.monitors = Monitors(deepspeed.monitor)
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._groups = {names[parameter]: group for group in groups for parameter in group["params"]}
        if isinstance(self._inner, Muon):
            self._inner.bind(self._matrices(), self.device)

    def train(self) -> None:
        """The model's training mode."""
        self._deepspeed.train()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass."""
        return self._deepspeed(*inputs, **named)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """One micro-batch of a step, forward and backward; gradients are complete after the ``last`` one."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self._deepspeed.step()  # counts the micro-batch

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, averaged over ranks."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def squared_grad_norm(self) -> Tensor:
        """This rank's share of the squared norm of the gradient; see :func:`gradients.squared_norm`."""
        return gradients.squared_norm(self._deepspeed, ranks.world_size())

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before the backward pass, and gradients with them (1 but for float16)."""
        return float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))

    @property
    def loss_scale_may_fall(self) -> bool:
        """Whether dynamic loss scaling (float16) can still answer an overflow with a smaller scale."""
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)
        return scaler is not None and bool(scaler.dynamic) and scaler.cur_scale > scaler.min_scale

    def step(self) -> bool:
        """Update the model by the step's gradients. False if float16's loss scaling left the update out instead."""
        self._deepspeed.step()
        return bool(self._deepspeed.was_step_applied())

    def zero_grad(self) -> None:
        """Throw the step's gradients away; see :func:`gradients.discard`."""
        gradients.discard(self._deepspeed)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self._deepspeed.optimizer.param_groups  # type: ignore[no-any-return]

    @property
    def optimizer_name(self) -> str:
        """``train.optimizer``."""
        return self._spec.name

    def missing_states(self) -> list[Tensor]:
        """Empty tensors as large as the optimizer states that this rank's master weights do not have yet, on the same
        device."""
        states = self._inner.state
        bare = [(flat, expected) for flat, expected in self._expected_states() if not states.get(flat)]
        return [
            torch.empty(int(size * flat.numel()), dtype=torch.uint8, device=flat.device)
            for flat, expected in bare
            for size in bytes_per_element(expected)
        ]

    def state_bytes(self) -> int:
        """Bytes of all ranks' optimizer states after the first step; ranks count as one where each keeps them all."""
        of_rank = sum(flat.numel() * sum(bytes_per_element(expected)) for flat, expected in self._expected_states())
        return int(of_rank) * (ranks.world_size() if self.zero_stage else 1)

    def check_states(self) -> None:
        """Raise a ``ValueError`` if states that were loaded are not those that the optimizer keeps."""
        loaded_names: dict[tuple[str, ...], set[str]] = {}  # by the names that are expected
        for flat, expected in self._expected_states():
            loaded_names.setdefault(tuple(expected), set()).update(self._inner.state.get(flat, ()))
        for names, loaded in loaded_names.items():
            if loaded and (missing := set(names) - loaded):
                raise ValueError(
                    f"train.optimizer={self._spec.name} with these settings keeps {', '.join(sorted(names))}, but "
                    f"the checkpoint has no {', '.join(sorted(missing))} of it; set train.optimizer_args (and the ZeRO "
                    "stage) back"
                )

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's, which has the states."""
        optimizer = self._deepspeed.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _expected_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's float32 tensors, each with the states that the optimizer keeps of one like it after a step (none
        where it is padding alone)."""
        groups = {piece.flat: self._groups[piece.name] for piece in self.layout().pieces}
        return [
            (flat, self._spec.states(groups[number], flat.ndim, flat.device) if number in groups else {})
            for number, flat in enumerate(flat_tensors(self._deepspeed.optimizer))
        ]

    def layout(self) -> Layout:
        """Which part of the trained parameters this rank keeps, and where."""
        return layout_of(self._deepspeed)

    def state_files(self, folder: Path, tag: str, copy: Callable[[Any], Any], trained_only: bool) -> state.Files:
        """What is written into a checkpoint; see :func:`state.collect_files`. All ranks call this together."""
        return state.collect_files(self._deepspeed, folder, tag, copy, trained_only)

    def load_files(self, folder: Path, tag: str, strict: bool) -> None:
        """Load what :meth:`state_files` gave as many ranks of the same ZeRO stage and dtype, before the first step;
        ``strict`` where it holds every parameter. All ranks call this. Rates, weight decay and betas stay as they are.
        """
        optimizer = self._deepspeed.optimizer
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        with pickles.for_torch_load(lambda content: reshard.with_scaler(content, optimizer)):
            loaded, _ = self._deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        if loaded is None:
            raise ValueError(f"DeepSpeed found nothing to load in {folder / tag}")
        for group, before in zip(self.param_groups, settings, strict=True):
            group.update(before)

    def load_resharded(
        self, source: Path, open_state: Callable[[Path], SavedState], agree: Callable[[Callable[[], None]], None]
    ) -> None:
        """Load a state of any layout; see :func:`reshard.load_resharded`. All ranks call this together."""
        reshard.load_resharded(self._deepspeed, self._expected_states(), source, open_state, agree)

    def _matrices(self) -> dict[Tensor, list[Matrix]]:
        """The matrices in this rank's float32 tensors that Muon orthogonalizes."""
        stretches: dict[tuple[int, str], list[Stretch]] = {}
        shapes = self.layout().shapes
        for rank, pieces in enumerate(ranks.gather(self.layout().pieces)):
            if self.zero_stage or rank == ranks.rank():  # at stage 0 every rank keeps whole matrices
                for piece in pieces:
                    if self._groups[piece.name].get("muon"):
                        stretch = Stretch(rank, piece.numel, piece.offset)
                        stretches.setdefault((piece.flat, piece.name), []).append(stretch)
        matrices: dict[Tensor, list[Matrix]] = {}
        flats = flat_tensors(self._deepspeed.optimizer)
        for (number, name), parts in sorted(stretches.items()):
            matrices.setdefault(flats[number], []).append(Matrix(torch.Size(shapes[name]), tuple(parts)))
        return matrices
