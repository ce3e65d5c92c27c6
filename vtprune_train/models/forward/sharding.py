"""Support for sharded models (parameters only gathered during a module's call), and checks for attention heads split
across ranks.

FSDP gathers the parameters of a unit (usually a decoder layer) in hooks around the unit's call, as DeepSpeed does for a
ZeRO-3 leaf module. Code that uses submodules of such a unit must run inside that call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune_train.models import HFModule

T = TypeVar("T")

_FUNCTION = "_vtprune_function"  # keyword argument that makes a call run a function instead of forward
_FORWARD = "_vtprune_sharded_forward"  # on a module: the instance's forward before ours, or None
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INSTALLING = threading.Lock()


def call_inside(module: nn.Module, function: Callable[..., T], *tensors: Tensor) -> T:
    """Run ``function(module, *tensors)`` inside the module's call if that call gathers its parameters. Pass every
    tensor that may need gradients in ``tensors``, because FSDP registers hooks on the call's inputs.

    Gradients are reduced like those of a normal forward: FSDP and ZeRO-3 just see an extra call of the module.

    Raises:
        ValueError: gradients are needed through a ZeRO-3 leaf module, which DeepSpeed reduces only once per backward
            pass.
    """
    parts = list(_unwrapping(module))
    inner = parts[-1]
    if not any(isinstance(part, FSDPModule | FullyShardedDataParallel) or _is_leaf(part) for part in parts):
        return function(module, *tensors)
    if _is_leaf(module) and torch.is_grad_enabled():
        raise ValueError(
            f"{type(inner).__name__} is a ZeRO-3 leaf module, which DeepSpeed lets run once per backward pass, but the "
            "method runs it a second time to rank visual tokens with gradients: do not make decoder layers leaf "
            "modules (set_z3_leaf_modules), or set differentiable=False"
        )
    _install(inner)
    # Use nn.Module.__call__ directly so that no subclass applies checkpointing to this call.
    return nn.Module.__call__(module, *tensors, **{_FUNCTION: function})


def call_as(module: nn.Module, function: Callable[..., T], *tensors: Tensor) -> T:
    """Run ``function(module, *tensors)`` instead of the module's ``forward``, with all hooks of its call."""
    *_, inner = _unwrapping(module)
    _install(inner)
    return module(*tensors, **{_FUNCTION: function})  # type: ignore[no-any-return]


def _unwrapping(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and then the module inside each wrapper."""
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        inner = next((inner._modules[name] for name in _WRAPPED if name in inner._modules), None)


def _is_leaf(module: nn.Module) -> bool:
    return getattr(module, "_z3_leaf", False) is True


def gathers_submodules(module: nn.Module) -> bool:
    """Whether parameters are gathered around each call of a submodule (ZeRO-3, or FSDP units in the module), so that
    every rank must call the submodules equally often."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return True
    units = FSDPModule | FullyShardedDataParallel
    return any(isinstance(part, units) for part in module.modules() if part is not module)


def partitions_weight(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers the module's weight for its own output, which a loss must then use."""
    return hasattr(module.weight, "ds_id")


def restore_forward(module: nn.Module) -> None:
    """Undo what :func:`call_inside` did to a module."""
    if _FORWARD in module.__dict__:
        original = module.__dict__.pop(_FORWARD)
        del module.__dict__["forward"]
        if original is not None:
            module.forward = original


def _install(module: nn.Module) -> None:
    with _INSTALLING:
        if _FORWARD not in module.__dict__:
            _replace_forward(module)


def _replace_forward(module: nn.Module) -> None:
    module.__dict__[_FORWARD] = module.__dict__.get("forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = kwargs.pop(_FUNCTION, None)
        if function is not None:
            return function(self, *args)
        original = self.__dict__.get(_FORWARD) or type(self).forward.__get__(self)
        return original(*args, **kwargs)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def check_layers(text_model: HFModule, attention: str, learns: str | None) -> None:
    """Reject a decoder that is split in an unsupported way. ``learns`` is the name of the method if it adds parameters;
    ``attention`` is the decoder's implementation before :func:`~vtprune_train.models.patch.prune`.

    Raises:
        ValueError: pipeline parallelism, layers on several devices, DeepSpeed's sequence parallelism, or a method
            with learned parameters on a decoder that is already sharded.
    """
    mixers = ("self_attn", "linear_attn")
    missing = [i for i, layer in enumerate(text_model.layers) if not any(hasattr(layer, mixer) for mixer in mixers)]
    if missing:
        raise ValueError(
            f"decoder layer {missing[0]} is a {type(text_model.layers[missing[0]]).__name__}, not on this rank: a "
            "pruned model needs all decoder layers on each rank, so pipeline parallelism does not work; shard the "
            "model with FSDP or ZeRO"
        )
    devices = sorted({str(p.device) for p in text_model.layers.parameters() if p.device.type != "meta"})
    if len(devices) > 1:
        raise ValueError(
            f"the decoder's layers are on {' and '.join(devices)}: a pruned model runs its decoder on one device; load "
            'it with device_map={"": 0}, or shard it with FSDP or ZeRO-3'
        )
    check_attention_function(attention)
    if learns is not None and (how := _sharded_already(text_model)):
        raise ValueError(
            f"{learns} adds learned parameters, but the decoder is already sharded ({how}), so they would differ on "
            "each rank: prune first, then shard the model"
        )


def check_attention_function(attention: str) -> None:
    """Raise if DeepSpeed sequence parallelism replaced this attention function; a pruned model would bypass it."""
    function = ALL_ATTENTION_FUNCTIONS.get(attention)
    if "deepspeed" in getattr(function, "__module__", ""):
        raise ValueError(
            f"attention {attention!r} was replaced by DeepSpeed's sequence parallelism (Ulysses): a pruned model needs "
            "all tokens of a sample on each rank; use sequence_parallel_size=1, and shard the model with FSDP or ZeRO"
        )


def _sharded_already(text_model: HFModule) -> str | None:
    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in text_model.modules()):
        return "FSDP"
    if any(isinstance(parameter, DTensor) for parameter in text_model.parameters()):
        return "tensor parallelism"
    if any(parameter.device.type == "meta" for parameter in text_model.parameters()):
        return "offloaded by accelerate"
    return None


def check_all_heads(config: Any, reader: str, queries: int, keys: int | None = None) -> None:
    """Raise if attention heads are split over ranks (tensor parallelism), since each rank would keep different tokens.
    ``queries`` and ``keys`` are head counts on this rank; ``reader`` names the component that needs the attention.

    Raises:
        ValueError: some heads are missing; the message lists alternatives.
    """
    expected = config.num_attention_heads
    expected_keys = getattr(config, "num_key_value_heads", None) or expected
    if queries == expected and keys in (None, expected_keys):
        return
    have = f"{queries} of {expected} attention heads" if queries != expected else f"{keys} of {expected_keys} key heads"
    raise ValueError(
        f"{reader} sees only {have}: tensor parallelism (tp_plan, DeepSpeed AutoTP) splits heads over the ranks, so "
        "each rank would keep different visual tokens. Shard the model with FSDP or ZeRO instead (load it without "
        "tp_plan), or use a method that does not need attention of the decoder: prumerge, divprune, cdpruner, "
        "uniform, random or pool"
    )


def check_whole_stream(hidden: Tensor, expected: int, layer: int) -> None:
    """Raise if a layer returns fewer than the ``expected`` tokens (sequence parallelism).

    Raises:
        ValueError: ``hidden`` [1, T, C] has a different length.
    """
    if hidden.shape[1] != expected:
        raise ValueError(
            f"decoder layer {layer} returned {hidden.shape[1]} tokens, not {expected}: a pruned model needs all tokens "
            "of a sample on each rank, so sequence and context parallelism do not work; shard the model with FSDP or "
            "ZeRO"
        )
