"""A model and its optimizer on DeepSpeed, as the rest of the package uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Engine:
    """Trains a model::

        for index, batch in enumerate(batches):
            with engine.accumulate(last=index == len(batches) - 1):
                output = engine(batch)
                engine.backward(output.loss)
        applied = engine.step()  # or engine.zero_grad(), to leave the step out

    Under ZeRO-3 the parameters of ``module``, the model, are partitions; ``dtype`` is what it computes in, as
    ``model.dtype`` names it.
    :func:`vtprune_train.training.engine.start.start_engine` makes one around a ``DeepSpeedEngine``.
    """

    def __init__(self, deepspeed: Any):
        self._deepspeed = deepspeed
        self.module: HFModule = deepspeed.module
        self.device: torch.device = deepspeed.device
        self.zero_stage = int(deepspeed.zero_optimization_stage())
        half = "bfloat16" if deepspeed.bfloat16_enabled() else "float16" if deepspeed.fp16_enabled() else ""
        self.dtype = half or "float32"

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

    def missing_states(self) -> list[Tensor]:
        """Empty tensors like AdamW's two states of every master weight that has none yet, on the same device."""
        optimizer = self._deepspeed.optimizer
        states = getattr(optimizer, "optimizer", optimizer).state
        bare = [master for master in flat_tensors(optimizer) if not states.get(master)]
        return [torch.empty_like(master, requires_grad=False) for master in bare for _ in range(2)]

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
        reshard.load_resharded(self._deepspeed, source, open_state, agree)
