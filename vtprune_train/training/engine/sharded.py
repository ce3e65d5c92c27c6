"""Sharded construction: under ZeRO-3 every parameter is partitioned as soon as it has its values.

DeepSpeed partitions the parameters of a whole model when its engine starts. Here the same function gets one parameter
at a time, so no rank ever has the whole model in memory."""

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
    """Partitions parameters as DeepSpeed's ZeRO-3 does; ``settings`` and ``dtype`` must be those of the engine."""

    sharded = True

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype):
        self._settings, self._dtype = settings, dtype
        self._first: Any = None

    def place(self, parameter: Any) -> None:
        import deepspeed

        if is_partitioned(parameter):
            return
        assert not parameter.is_meta, "a parameter on the meta device"
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

        partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
            devices = [parameter.device for parameter in partitioned]
            for parameter in partitioned:
                parameter.data = parameter.data.cpu()
            try:
                yield
            finally:
                for parameter, device in zip(partitioned, devices, strict=True):
                    parameter.data = parameter.data.to(device)

    @contextmanager
    def libraries_gather(self) -> Iterator[None]:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        config = HfDeepSpeedConfig(self._settings)  # transformers and PEFT gather parameters while it exists
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del config


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


def complete(model: nn.Module) -> None:
    """Partition parameters that were added to a sharded model after it was built, and number all of them as DeepSpeed
    does for a whole model: gradients are summed in this order, which affects rounding."""
    parameters: list[Any] = list(model.parameters())
    first = next((parameter for parameter in parameters if is_partitioned(parameter)), None)
    if first is None:
        return
    added = [parameter for parameter in parameters if not is_partitioned(parameter)]
    first.convert_to_zero_parameters(added)
    start = min(parameter.ds_id for parameter in parameters)
    for number, parameter in enumerate(parameters):
        parameter.ds_id = start + number


def placement_for(config: Config, settings: dict[str, Any]) -> Placement:
    """How a run's model is built: sharded under ZeRO-3, otherwise whole.

    Also whole under ZeRO-3 if parameters are offloaded to NVMe (the engine does that), or if an adapter is trained on
    random weights (they are written to a file at the start).
    """
    zero = settings.get("zero_optimization", {})
    on_nvme = zero.get("offload_param", {}).get("device") == "nvme"
    keeps_base = config.model.peft is not None and config.model.config is not None
    if zero_stage(settings) < 3 or on_nvme or keeps_base:
        return WHOLE
    if rank() == 0:
        log.info("ZeRO-3: building the model sharded, one parameter at a time")
    return Sharded(settings, getattr(torch, config.model.dtype))
