"""A model built sharded: under ZeRO-3 every parameter is cut among the ranks as soon as it has its values.

DeepSpeed cuts the parameters of a whole model when its engine starts. Here the same function is given one parameter
after the other, so no rank ever holds the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vtprune_train.config.settings import Config
from vtprune_train.models.io.placement import SHAPE, WHOLE, Placement
from vtprune_train.training.distributed import rank
from vtprune_train.training.engine.settings import zero_stage

log = logging.getLogger(__name__)


class Sharded(Placement):
    """Cuts parameters as DeepSpeed's ZeRO-3 does; ``settings`` and ``dtype`` are those that the engine starts with."""

    sharded = True

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype):
        self._settings, self._dtype = settings, dtype
        self._first: Any = None

    def place(self, parameter: Any) -> None:
        import deepspeed

        if is_cut(parameter):
            return
        assert not parameter.is_meta, "a parameter without values"
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(self._dtype)
        parameter.data = parameter.data.contiguous()
        setattr(parameter, SHAPE, parameter.shape)
        if self._first is None:
            self._first = parameter
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=self._settings, dtype=self._dtype
            )
        else:
            self._first.convert_to_zero_parameters([parameter])

    @contextmanager
    def whole(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        import deepspeed

        cut = [parameter for parameter in parameters if is_cut(parameter)]
        with deepspeed.zero.GatheredParameters(cut, modifier_rank=0):
            devices = [parameter.device for parameter in cut]
            for parameter in cut:
                parameter.data = parameter.data.cpu()
            try:
                yield
            finally:
                for parameter, device in zip(cut, devices, strict=True):
                    parameter.data = parameter.data.to(device)

    @contextmanager
    def libraries_gather(self) -> Iterator[None]:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        known = HfDeepSpeedConfig(self._settings)  # transformers and PEFT look whether one is alive
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del known


def is_cut(parameter: Any) -> bool:
    """Whether DeepSpeed has cut a parameter among the ranks."""
    return hasattr(parameter, "ds_id")


def complete(model: nn.Module) -> None:
    """Cut what was added to a sharded model since, and number all parameters as DeepSpeed does with a whole model:
    in this order it sums gradients, and sums of floating point numbers depend on it."""
    parameters: list[Any] = list(model.parameters())
    first = next((parameter for parameter in parameters if is_cut(parameter)), None)
    if first is None:
        return
    added = [parameter for parameter in parameters if not is_cut(parameter)]
    first.convert_to_zero_parameters(added)
    start = min(parameter.ds_id for parameter in parameters)
    for number, parameter in enumerate(parameters):
        parameter.ds_id = start + number


def placement_for(config: Config, settings: dict[str, Any]) -> Placement:
    """How a run's model is built: sharded under ZeRO-3.

    Whole where it cannot be otherwise: partitions on NVMe are swapped by the engine, and a base of random weights that
    an adapter stands on is written down at the start.
    """
    zero = settings.get("zero_optimization", {})
    on_nvme = zero.get("offload_param", {}).get("device") == "nvme"
    keeps_base = config.model.peft is not None and config.model.config is not None
    if zero_stage(settings) < 3 or on_nvme or keeps_base:
        return WHOLE
    if rank() == 0:
        log.info("ZeRO-3: every parameter is cut among the ranks as soon as it is read")
    return Sharded(settings, getattr(torch, config.model.dtype))
