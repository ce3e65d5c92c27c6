"""Packed and pruned models in LLaMA-Factory, which has no plug-ins: this module takes the place of its command.

::

    VTPRUNE=pack DISABLE_VERSION_CHECK=1 python -m vtprune_train.integrations.llama_factory train config.yaml

The commands and settings are those of ``llamafactory-cli``, and :mod:`vtprune_train.integrations.variable` lists the
values of ``VTPRUNE``. Each model that LLaMA-Factory loads, including the reference model of DPO and KTO, is packed or
pruned before its adapters are added. With several GPUs or ``FORCE_TORCHRUN=1``, ``torchrun`` starts this file in each
process.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from llamafactory import launcher
from llamafactory.extras.misc import is_env_enabled
from llamafactory.model import loader

from vtprune_train.integrations.variable import apply

NOT_SUPPORTED = {
    "USE_V1": "only the default version 0 of LLaMA-Factory's trainer is supported",
    "USE_RAY": "Ray starts its workers without this module",
    "USE_MCA": "Megatron has models of its own",
}


def install() -> None:
    """Pack or prune the models that LLaMA-Factory loads in this process."""
    loader.init_adapter = _applying(loader.init_adapter)


def _applying(init_adapter: Any) -> Any:
    @functools.wraps(init_adapter)
    def apply_and_init_adapter(config: Any, model: Any, model_args: Any, *args: Any, **kwargs: Any) -> Any:
        if model_args.use_unsloth:
            raise ValueError("use_unsloth: true replaces the code of the model, which then cannot be packed; remove it")
        return init_adapter(config, apply(model), model_args, *args, **kwargs)

    return apply_and_init_adapter


def main() -> None:
    for name, reason in NOT_SUPPORTED.items():
        if is_env_enabled(name):
            raise ValueError(f"{name}=1: the model would not be packed or pruned, as {reason}; unset it")
    if sys.argv[1:2] == ["webui"]:
        raise ValueError("webui starts llamafactory-cli, which does not pack or prune; use train config.yaml")
    install()
    if "LOCAL_RANK" in os.environ:  # started by the launcher's torchrun, which passes on the settings alone
        from llamafactory.train.tuner import run_exp

        run_exp()
    else:
        launcher.__file__ = __file__  # the file that torchrun starts
        launcher.launch()


if __name__ == "__main__":
    main()
