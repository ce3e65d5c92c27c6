"""Locate non-finite values in a step: every rank reruns its micro-batches while checking every tensor.

The original pass cannot be inspected afterwards: activations are freed and gradients already averaged. Parameters have
not changed, so a rerun reproduces the problem unless it was transient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune_train.core.stream import PackedBatch
from vtprune_train.training.engine.layout import own_part

SHOWN = 8  # maximum number of tensors described per micro-batch and kind; the rest are only counted


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype, number of NaN and infinite elements, and min, max and mean of the finite ones."""
    values = tensor.detach()
    finite = values[torch.isfinite(values)].double()
    described: dict[str, Any] = {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "nan": int(values.isnan().sum()),
        "inf": int(values.isinf().sum()),
    }
    if len(finite):
        described |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
    return described


class Watch:
    """Context manager that checks inputs, module outputs and gradients.

    ``micro_batches`` then has an entry for each forward pass of the model, in order: the sample ids, and the non-finite
    tensors in the order in which they were computed (inputs, activations, the loss, gradients). Gradients are those of
    this rank's micro-batch alone, because hooks see them before they are summed.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.micro_batches: list[dict[str, Any]] = []
        self.handles: list[Any] = []
        self.forward = False

    def __enter__(self) -> Watch:
        for name, module in self.module.named_modules():
            if module is self.module:
                self.handles.append(module.register_forward_pre_hook(self._begin))
            self.handles.append(module.register_forward_hook(self._output_of(name or "model")))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_hook(partial(self._look, "gradient", name)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch: PackedBatch = inputs[0]
        self.micro_batches.append({"sample_ids": list(batch.sample_ids), "non_finite": {}, "tensors": []})
        self.forward = True
        self._look("input", "pixel_values", batch.pixel_values)

    def _output_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.forward:  # skip recomputation in backward; these tensors were already checked
                for tensor in tensors_in(output):
                    self._look("loss" if module is self.module else "activation", name, tensor)
            if module is self.module:
                self.forward = False

        return hook

    def _look(self, kind: str, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach()  # must not be recorded by autograd
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            return
        micro_batch = self.micro_batches[-1]
        count = micro_batch["non_finite"][kind] = micro_batch["non_finite"].get(kind, 0) + 1
        if count <= SHOWN:
            micro_batch["tensors"].append({"kind": kind, "name": name, **statistics(tensor)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def non_finite_parameters(module: nn.Module) -> list[dict[str, Any]]:
    """Statistics of this rank's parameters (under ZeRO-3: its partitions) that are not finite."""
    held = ((name, own_part(parameter)) for name, parameter in module.named_parameters())
    return [{"name": name, **statistics(part)} for name, part in held if not bool(torch.isfinite(part).all())][:SHOWN]


def first_fault(reports: list[dict[str, Any]]) -> str:
    """One-sentence summary of where the first non-finite tensor appeared, over all ranks' reports."""
    for report in reports:
        if report["parameters"]:
            return f"parameter {report['parameters'][0]['name']} is already non-finite: an earlier update corrupted it"
    for report in reports:
        for number, micro_batch in enumerate(report["micro_batches"]):
            if micro_batch["tensors"]:
                tensor = micro_batch["tensors"][0]
                ids = ", ".join(micro_batch["sample_ids"][:8])
                return (
                    f"first on rank {report['rank']} in micro-batch {number} of {len(report['micro_batches'])}: "
                    f"{tensor['kind']} {tensor['name']} with {tensor['nan']} NaN and {tensor['inf']} infinite of "
                    f"{math.prod(tensor['shape'])} elements (samples {ids})"
                )
    return "it did not recur when the step was repeated: the sum over ranks overflows, or a device is faulty"


def write_report(path: Path, report: dict[str, Any]) -> str:
    """Write a standard JSON report (non-finite numbers become strings). Returns its path, or the reason why it could
    not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_printable(report), indent=1))
    except OSError as error:
        return f"could not write the report to {path} ({error})"
    return f"report: {path}"


def _printable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value
