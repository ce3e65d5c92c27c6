"""Tensors that claim to be on CUDA and compute on the CPU: they find device mismatches and hidden waits without a GPU.

::

    with FakeCuda() as cuda:
        model, batch = cuda.put(model), batch.pin_memory().to("cuda")
        model(batch).loss_sum.backward()
    assert cuda.waits == []

How it works. A :class:`CudaTensor` wraps a CPU tensor and says that it is on ``cuda:0``. For PyTorch's C++ code it is
on the ``meta`` device: composite operators and backward formulas then make new tensors on ``meta`` too, and autograd
needs no CUDA build. While a :class:`FakeCuda` is active it sees every call twice: as Python makes it
(``TorchFunctionMode``), where ``device="cuda"`` becomes ``meta`` and memory is marked as pinned; and as the operators
that the call is made of (``TorchDispatchMode``), which it runs on the wrapped tensors. There it

- raises what PyTorch raises where an operator mixes CPU and CUDA tensors, in backward passes too;
- records an :class:`Event` for whatever makes the host wait for the device: a ``read`` (``item``, ``tolist``, ``cpu``,
  ``nonzero``, a boolean index, ...) or a ``blocking copy`` (from the host, without ``non_blocking`` or out of pageable
  memory, which ``torch.tensor(..., device="cuda")`` and an index on the CPU make too).

What it cannot see: waits inside an operator that ``READS`` does not list (most of ``torch.linalg``, for one); races of
asynchronous copies; memory and speed; kernels that CUDA lacks, or that want other dtypes, strides or alignments there;
code that asks ``torch.cuda.is_available()``; 0-dim CPU tensors in operators that do not take them beside CUDA ones;
backward passes other than ``loss.backward()`` through layers that are run again. A tensor made on ``meta`` by name
counts as one on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vtprune_train.core.stream import map_leaves

DEVICE = torch.device("cuda", 0)
STAND_IN = torch.device("meta")  # where C++ takes these tensors to be
READ, COPY = "read", "blocking copy"
# Operators that copy something to the host on CUDA: a value, how many elements the output has, or whether it failed.
READS = {
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_local_scalar_dense", "_unique2", "allclose", "bincount",
    "equal", "is_nonzero", "linalg_eig", "linalg_lstsq", "masked_select", "multinomial", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
EMULATED: dict[Any, Callable[..., Any]] = {}  # operators without a CPU kernel: what computes the same
ROOT = Path(__file__).parents[2]
PASSED_OVER = (str(Path(torch.__file__).parent), __file__, "<")


class Event(NamedTuple):
    """The host waits: ``kind`` is ``READ`` or ``COPY``; ``op`` is the operator; ``where`` is ``file:line`` of the
    innermost line outside PyTorch, and after ``<-`` that of the innermost line in another file of this project."""

    kind: str
    op: str
    where: str


class CudaTensor(Tensor):
    """A CPU tensor ``elem`` that claims to be on CUDA."""

    elem: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elem: Tensor) -> CudaTensor:
        assert not isinstance(elem, CudaTensor)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=STAND_IN,
        )  # fmt: skip
        made.elem = elem
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a fake CUDA tensor outside `with FakeCuda()`")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()


class FakeCuda(TorchFunctionMode):
    """While it is active, ``"cuda"`` is a device whose tensors are :class:`CudaTensor`. ``waits`` are the events."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Event] = []
        self.pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor gets it
        self.operators = _Operators(self)

    def __enter__(self) -> FakeCuda:
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.operators.__exit__(*failure)

    def put(self, value: Any) -> Any:
        """A module (in place; tied parameters stay tied) or tensors in nested containers, on the device, unrecorded."""
        if not isinstance(value, nn.Module):
            return map_leaves(value, Tensor, lambda tensor: CudaTensor(tensor.detach().clone()))
        done: dict[Tensor, Tensor] = {}
        for module in value.modules():
            for name, own in module._parameters.items():
                if own is not None and own not in done:
                    done[own] = nn.Parameter(CudaTensor(own.detach()), requires_grad=own.requires_grad)
                module._parameters[name] = None if own is None else done[own]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else CudaTensor(buffer)
        return value

    def record(self, kind: str, op: str) -> None:
        self.waits.append(Event(kind, op, _where()))

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        made = tensor if self.is_pinned(tensor) else tensor.clone()
        self.pinned[made.untyped_storage().data_ptr()] = made
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.pin_memory:
            assert not isinstance(args[0], CudaTensor), "only memory of the host can be pinned"
            return self.pin(args[0])
        if func is Tensor.is_pinned:
            return not isinstance(args[0], CudaTensor) and self.is_pinned(args[0])
        if func is Tensor.cuda:
            return args[0].to(STAND_IN, non_blocking=kwargs.get("non_blocking", args[2:] == (True,)))
        if func is Tensor.backward:
            return self._backward(args[0])
        args, kwargs = tree_map(_stand_in, (args, kwargs))
        if func in FROM_DATA and not isinstance(args[0], Tensor):
            return self._from_data(func, *args, **kwargs)
        pins = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return self.pin(made) if pins else made

    def _backward(self, loss: Tensor) -> None:
        """``loss.backward()``, within which this mode stays active, for the layers that checkpointing runs again."""
        gradient = torch.ones_like(loss)
        super().__enter__()
        try:
            torch.autograd.graph._engine_run_backward(
                (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        finally:
            super().__exit__(None, None, None)

    def _from_data(self, func: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Of numbers on the host, and of tensors on the device that are read one by one."""
        made = func(tree_map(lambda x: x.item() if isinstance(x, CudaTensor) else x, data), *args, **kwargs)
        if device != STAND_IN:
            return made
        if made.numel():
            self.record(COPY, f"torch.{func.__name__}")
        return CudaTensor(made)


class _Operators(TorchDispatchMode):
    """The operators that calls are made of."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cuda = any(isinstance(tensor, CudaTensor) for tensor in tensors)
        device = kwargs.get("device")
        target = on_cuda if device is None else device == STAND_IN
        if device == STAND_IN:
            kwargs["device"] = torch.device("cpu")
        if not on_cuda and not target:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("copy_", "_to_copy"):
            self._copied(name, args, kwargs, target)
        elif name in INDEXING:
            self._indexed(name, args, kwargs)
        else:
            self._computed(name, tensors, on_cuda, kwargs)
        out = EMULATED.get(func, func)(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if name == "_to_copy" and any(out is tensor.elem for tensor in tensors if isinstance(tensor, CudaTensor)):
            out = out.clone()
        if (written := _written(func, args, kwargs)) is not None:
            return written
        return tree_map(lambda x: CudaTensor(x) if isinstance(x, Tensor) else x, out) if target else out

    def _copied(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: bool) -> None:
        """``copy_(to, from, non_blocking)`` or ``_to_copy(from, ..., device=..., non_blocking=...)``. Only a copy of
        contiguous pinned memory without a change of dtype runs beside the host."""
        fills = name == "copy_"
        source, to_cuda = (args[1], isinstance(args[0], CudaTensor)) if fills else (args[0], target)
        from_cuda = isinstance(source, CudaTensor)
        if from_cuda == to_cuda or not source.numel():
            return
        on_host = source if to_cuda else args[0] if fills else None  # None: new memory, which is pageable
        straight = on_host is not None and self.cuda.is_pinned(on_host) and on_host.is_contiguous()
        straight &= source.dtype == (args[0].dtype if fills else kwargs.get("dtype") or source.dtype)
        asks_to_wait = not (kwargs.get("non_blocking") or (fills and args[2:] == (True,)))
        if asks_to_wait or not straight:
            self.cuda.record(READ if from_cuda else COPY, name)

    def _indexed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An index on the CPU is copied; a boolean one is counted first, except to fill with one value."""
        indices = [index for index in args[1] if index is not None]
        fills = len(args) > 2 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        for index in indices:
            if isinstance(args[0], CudaTensor) and not isinstance(index, CudaTensor):
                self.cuda.record(COPY, name)
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                self.cuda.record(READ, f"{name} by a boolean mask")
        _check_device(name, [args[0], *args[2:3], *(index for index in indices if isinstance(index, CudaTensor))])

    def _computed(self, name: str, tensors: list[Tensor], on_cuda: bool, kwargs: dict[str, Any]) -> None:
        _check_device(name, tensors)
        counts_repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        checks_lengths = name == "segment_reduce" and not kwargs.get("unsafe")
        if on_cuda and (name in READS or counts_repeats or checks_lengths):
            self.cuda.record(READ, name)


def _check_device(name: str, tensors: list[Tensor]) -> None:
    """As PyTorch, which takes a 0-dim CPU tensor for a number."""
    if not any(isinstance(tensor, CudaTensor) for tensor in tensors):
        return
    for tensor in tensors:
        if not isinstance(tensor, CudaTensor) and tensor.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got one on cuda:0 and one of shape "
                f"{tuple(tensor.shape)} on the CPU, at {_where()}"
            )


def _stand_in(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return STAND_IN
    return STAND_IN if isinstance(value, torch.device) and value.type == "cuda" else value


def _unwrapped(value: Any) -> Any:
    return value.elem if isinstance(value, CudaTensor) else value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an in-place operator or one with ``out`` returns: the tensors that it wrote to."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    if not aliases or any(alias is None or not alias.is_write for alias in aliases):
        return None
    written = [
        kwargs[argument.name] if argument.name in kwargs else args[place]
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return written[0] if len(aliases) == 1 else tuple(written)


def _where() -> str:
    """The innermost line outside PyTorch and, if any, the innermost one of another file that is this project's."""
    frame: FrameType | None = sys._getframe(1)
    found: list[str] = []
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        own = path.startswith(str(ROOT / "vtprune_train"))
        place = path.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
        if not path.startswith(PASSED_OVER) and (not found or (own and not found[0].startswith(place))):
            found.append(f"{place}:{frame.f_lineno}")
        frame = frame.f_back
    return " <- ".join(found)
