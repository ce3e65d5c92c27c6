"""The parameters that a pruning method adds to a model at ``<decoder>.pruning``: creates them or reads them from a
checkpoint.

They are part of the model's state, so optimizers, DeepSpeed and ``save_pretrained`` treat them like all others. Only
``from_pretrained`` ignores them; :func:`attach` reads them from the files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward.decoder import PARAMETERS
from vtprune_train.models.io.build import LEARNED_NAME
from vtprune_train.models.io.provenance import weight_files
from vtprune_train.pruning import UntrustedMethodError, method_from_settings, saved_settings
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.learned import learns

log = logging.getLogger(__name__)

SOURCE = "_vtprune_source"  # model attribute: the folder it was loaded from, if its config names another
FILE = "pruning.safetensors"  # beside an adapter


def attach(model: HFModule, method: PruningMethod) -> None:
    """Set ``<decoder>.pruning`` to the module of ``method.module``, if it has one, in the decoder's dtype and on its
    device. ``model`` is the Hugging Face model, not a PEFT model that wraps it.

    Values come from the model's checkpoint if that was saved with the same method. Otherwise they are initialized, with
    a warning; initial values depend only on PyTorch's seed, not on random numbers drawn since it was set."""
    text_model = model.get_submodule(family_of(model).decoder)
    module = fresh(method, text_model, model)
    detach(model)
    if module is not None:
        _fill(module, saved_tensors(model, method), model, method)
        setattr(text_model, PARAMETERS, module)


def detach(model: HFModule) -> nn.Module | None:
    """Remove the module that :func:`attach` added and return it; ``None`` if there is none."""
    return model.get_submodule(family_of(model).decoder)._modules.pop(PARAMETERS, None)


def modules_to_save(model: HFModule) -> list[str]:
    """Names for PEFT's ``modules_to_save`` of the modules that :func:`attach` added."""
    added = model.get_submodule(family_of(model).decoder)._modules.get(PARAMETERS)
    named = () if added is None else added.named_modules(prefix=PARAMETERS)
    return [name for name, module in named if next(module.parameters(recurse=False), None) is not None]


def carry(model: HFModule) -> None:
    """Call :func:`attach` for a model that is not pruned, but will be saved again with the method in its config.

    Raises:
        ValueError: see :func:`check_trained` and :func:`saved_learner`.
    """
    method = saved_learner(model.config, _source(model))
    if method is not None:
        check_trained(model, method)
        attach(model, method)


def check_trained(model: HFModule, method: PruningMethod) -> None:
    """Check that the checkpoint of a model has all parameters of ``method``, for use without training.

    Raises:
        ValueError: parameters are missing and would be untrained.
    """
    if not learns(method):
        return
    module = fresh(method, model.get_submodule(family_of(model).decoder), model)
    if module is None:
        return
    state, names = module.state_dict(), _names(method)
    if missing := _missing(state, saved_tensors(model, method)):
        named = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
        raise ValueError(
            f"{' and '.join(names)} has trained parameters, but {_lack(model, state, missing)}; train with "
            f"pruning.method={named} and use that run, with the settings of its training, or choose a method without "
            "trained parameters"
        )


def saved_learner(config: PreTrainedConfig, source: str = "") -> PruningMethod | None:
    """The method in a config's settings, if it adds parameters; ``source`` is the folder of the model's files.

    Raises:
        UntrustedMethodError: the method is code outside the package that the user did not name, and ``source`` has its
            parameters.
    """
    try:
        settings = saved_settings(config)
    except UntrustedMethodError:
        if _learned_tensors(source):
            raise
        return None
    method = None if settings is None else method_from_settings(settings)
    return method if learns(method) else None


def fresh(method: PruningMethod, text_model: HFModule, model: HFModule | None = None) -> nn.Module | None:
    """The initialized module of ``method.module`` for a decoder, in its dtype and on its device; ``None`` if there is
    none. With ``model``, that of ``method.tower_module`` too."""
    weight, config = text_model.get_input_embeddings().weight, text_model.config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        added = method.module(config.hidden_size, len(text_model.layers))
        if model is not None and method.needs.tower is not None:
            added = _joined(added, method.tower_module(tile_tower(model.get_submodule(family_of(model).base).config)))
        if added is None:
            return None
        for module in added.modules():
            if isinstance(module, nn.Embedding):
                text_model._init_weights(module)
    return added.to(weight.device, weight.dtype).train(text_model.training)


def _joined(first: nn.Module | None, second: nn.Module | None) -> nn.Module | None:
    """One module of both; two only in a combination, whose parts have different names."""
    if first is None or second is None:
        return first or second
    assert isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict)
    first.update(dict(second.items()))
    return first


@torch.no_grad()
def _fill(module: nn.Module, saved: dict[str, Tensor], model: HFModule, method: PruningMethod) -> None:
    """Copy saved values into a module; log the ones that are missing."""
    state = module.state_dict()
    missing = _missing(state, saved)
    for name, value in state.items():
        if name not in missing:
            value.copy_(saved[name])
    if not missing:
        return
    names = " and ".join(_names(method))
    if _source(model):
        lack = _lack(model, state, missing)
        log.warning("%s has trained parameters, but %s: they are initialized and must be trained", names, lack)
    else:
        log.info("%s adds %d initialized tensors to the model", names, len(state))


def _missing(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """The names in ``state`` that ``saved`` does not have with the same shape."""
    return [name for name, value in state.items() if name not in saved or saved[name].shape != value.shape]


def _lack(model: HFModule, state: Mapping[str, Tensor], missing: list[str]) -> str:
    """Describes the parameters that the model's checkpoint lacks."""
    count = f"{len(missing)} of {len(state)} tensors are missing or of another shape, first {missing[0]}"
    return f"{_source(model) or 'this model'} does not have them ({count})"


def _source(model: HFModule) -> str:
    return model.__dict__.get(SOURCE) or getattr(model.config, "_name_or_path", "") or ""


def saved_tensors(model: HFModule, method: PruningMethod) -> dict[str, Tensor]:
    """The parameters of ``method`` in the files of a model, by their names below ``pruning``; empty if the checkpoint
    was saved with another method."""
    source = _source(model)
    return _learned_tensors(source) if _saved_names(model.config) == _names(method) else {}


def _learned_tensors(source: str) -> dict[str, Tensor]:
    """The parameters of a method in the files of a checkpoint."""
    if not source:
        return {}
    try:
        files = weight_files(source)
    except ValueError:
        return {}
    tensors = {}
    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                if match := LEARNED_NAME.search(key):
                    tensors[match[1]] = opened.get_tensor(key)
    return tensors


def _names(method: PruningMethod) -> list[str]:
    return [str(part.settings()["method"]) for part in method.parts]


def _saved_names(config: PreTrainedConfig) -> list[str]:
    """Names of the methods in a config's settings."""
    named = (getattr(config, "pruning", None) or {}).get("method")
    return [str(part.get("method")) for part in named] if isinstance(named, list | tuple) else [str(named)]
