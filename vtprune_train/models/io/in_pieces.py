"""Builds a model one parameter at a time: each is read or initialized, and placed before the next.

A checkpoint is read by ``from_pretrained`` with its renaming, conversion and checks; here it is made to read one tensor
after another and to place each. Random weights are *deferred*: the model is created with parameters on the meta device,
every operation on them is recorded with the state of the random number generator, and the operations of each parameter
are replayed separately. The values are the same as in a model that is created at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import core_model_loading

from vtprune_train.models import HFModule
from vtprune_train.models.io.placement import Placement

READ_SEQUENTIALLY = "HF_DEACTIVATE_ASYNC_LOAD"  # otherwise threads of transformers read ahead
OVERWRITES = ("aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_", "aten::copy_")


@contextmanager
def placing_what_is_read(placement: Placement) -> Iterator[None]:
    """A context in which ``from_pretrained`` places every parameter as soon as it is read.

    Embeddings and output layer stay whole, because they may be tied or resized after reading. Tensors of a checkpoint
    that are merged or split while reading are in memory together.
    """
    if not placement.sharded:
        yield
        return
    set_parameter, before = core_model_loading.set_param_for_module, os.environ.get(READ_SEQUENTIALLY)

    def set_and_place(model: HFModule, name: str, *rest: Any) -> None:
        set_parameter(model, name, *rest)
        module, _, last = name.rpartition(".")
        parameter = model.get_submodule(module)._parameters.get(last)
        if parameter is not None and not parameter.is_meta and not _is_table(model, parameter):
            placement.place(parameter)

    core_model_loading.set_param_for_module = set_and_place
    os.environ[READ_SEQUENTIALLY] = "1"
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = set_parameter
        del os.environ[READ_SEQUENTIALLY]
        if before is not None:
            os.environ[READ_SEQUENTIALLY] = before


def _is_table(model: HFModule, parameter: nn.Parameter) -> bool:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(parameter is getattr(table, "weight", None) for table in tables)


@dataclass
class _Recipe:
    """How a parameter gets its values: the tensor it was created with, without values on the meta device, and the
    operations on it."""

    created: Tensor
    steps: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any], Tensor | None]] = field(default_factory=list)

    def make(self) -> Tensor:
        made = torch.empty_like(self.created, device="cpu") if self.created.is_meta else self.created
        for operation, view, arguments, options, state in self.steps:
            if state is not None:
                torch.set_rng_state(state)
            operation(made.as_strided(*view), *arguments, **options)
        return made


class Deferred(TorchDispatchMode):
    """A context in which modules are created with parameters on the meta device; buffers are not affected. Random
    numbers are drawn from PyTorch's generator as usual, and :meth:`make` gives the parameters the same values as
    without the context.

    Does not support ``torch.nn.init.orthogonal_``, ``sparse_`` and ``dirac_``, which do nothing on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, _Recipe] = {}
        self._alive: list[Tensor] = []  # keeps the addresses of these tensors from being reused

    def __enter__(self) -> Self:
        self._hook = register_module_parameter_registration_hook(self._defer)  # type: ignore[arg-type]
        self._truncated, init._no_grad_trunc_normal_ = init._no_grad_trunc_normal_, self._trunc_normal
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        init._no_grad_trunc_normal_ = self._truncated
        self._hook.remove()

    def _defer(self, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        deferred = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        self._recipes[_storage(deferred)] = _Recipe(parameter.detach())
        self._alive.append(deferred)
        return deferred

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func._schema.name.endswith("_"):
            assert not any(isinstance(a, Tensor) and a.is_meta for a in args[1:]), f"{func} on two parameters"
            draws = torch.Tag.nondeterministic_seeded in func.tags
            self._record(func, func._schema.name in OVERWRITES, draws, args[0], args[1:], kwargs)
        return func(*args, **kwargs)

    def _trunc_normal(self, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """``trunc_normal_``, which PyTorch skips on the meta device because the number of draws depends on the
        values."""
        if not tensor.is_meta:
            return self._truncated(tensor, *arguments, **options)
        self._record(self._truncated, True, True, tensor, arguments, options)
        return tensor

    def _record(
        self, operation: Any, overwrites: bool, draws: bool, target: Tensor, arguments: Any, options: Any
    ) -> None:
        recipe, state = self._recipes[_storage(target)], None
        if overwrites and target.numel() == recipe.created.numel():
            recipe.created, recipe.steps = torch.empty_like(recipe.created, device="meta"), []
        if draws:
            state = torch.get_rng_state()
            operation(torch.empty_strided(target.shape, target.stride(), dtype=target.dtype), *arguments, **options)
        view = target.shape, target.stride(), target.storage_offset()
        recipe.steps.append((operation, view, arguments, options, state))

    def make(self, model: HFModule, placement: Placement) -> None:
        """Initialize and place the deferred parameters of ``model``, in their order."""
        state = torch.get_rng_state()
        holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    holders.setdefault(parameter, []).append((module, name))
        with torch.no_grad():
            for deferred, places in holders.items():
                recipe = self._recipes.pop(_storage(deferred))
                made = nn.Parameter(recipe.make(), requires_grad=deferred.requires_grad)
                for module, name in places:
                    module._parameters[name] = made
                placement.place(made)
        torch.set_rng_state(state)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
