"""What is not finite in a step, and where: every rank runs its micro-batches once more with an eye on every tensor.

The first pass of a step keeps nothing that could tell: activations are gone, and gradients are already averaged over
ranks. Parameters have not changed since, so the second pass shows the same, unless the fault was a passing one.
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

SHOWN = 8  # tensors of a micro-batch and kind that are described; the others are counted


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype, how many elements are NaN and infinite, and minimum, maximum and mean of the others."""
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
    """Looks at inputs, module outputs and gradients while it is open.

    ``micro_batches`` then holds, for each forward pass of the model in order, its sample ids, and the tensors that were
    not finite, in the order they came about: inputs, activations, the loss, gradients (of this rank's micro-batch
    alone: hooks see them before they are summed up).
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
            if self.forward:  # what is recomputed in the backward pass has been seen
                for tensor in tensors_in(output):
                    self._look("loss" if module is self.module else "activation", name, tensor)
            if module is self.module:
                self.forward = False

        return hook

    def _look(self, kind: str, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach()  # nothing of this may be saved for a backward pass
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            return
        seen = self.micro_batches[-1]
        count = seen["non_finite"][kind] = seen["non_finite"].get(kind, 0) + 1
        if count <= SHOWN:
            seen["tensors"].append({"kind": kind, "name": name, **statistics(tensor)})


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
    """Statistics of this rank's parameters (under ZeRO-3: its parts of them) that are not finite."""
    held = ((name, own_part(parameter)) for name, parameter in module.named_parameters())
    return [{"name": name, **statistics(part)} for name, part in held if not bool(torch.isfinite(part).all())][:SHOWN]


def first_fault(reports: list[dict[str, Any]]) -> str:
    """One sentence: where the first tensor that is not finite came about, of all ranks' reports."""
    for report in reports:
        if report["parameters"]:
            return f"parameter {report['parameters'][0]['name']} is not finite itself: an earlier update went wrong"
    for report in reports:
        for number, micro_batch in enumerate(report["micro_batches"]):
            if micro_batch["tensors"]:
                tensor = micro_batch["tensors"][0]
                ids = ", ".join(micro_batch["sample_ids"][:8])
                return (
                    f"first on rank {report['rank']} in micro-batch {number} of {len(report['micro_batches'])}: "
                    f"{tensor['kind']} {tensor['name']} has {tensor['nan']} NaN and {tensor['inf']} infinite of "
                    f"{math.prod(tensor['shape'])} elements (samples {ids})"
                )
    return "it did not come again when the step was repeated: sums over ranks overflow, or a device is at fault"


def write_report(path: Path, report: dict[str, Any]) -> str:
    """JSON that any reader takes: numbers that are not finite become strings. Returns where it is, or why it is not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_printable(report), indent=1))
    except OSError as error:
        return f"its report could not be written to {path} ({error})"
    return f"written to {path}"


def _printable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value
