"""The parameters that a pruning method adds to a model: made, found in a checkpoint, put at ``<decoder>.pruning``.

They are part of the model's state from then on, so optimizers, DeepSpeed and ``save_pretrained`` treat them like any
other. Only ``from_pretrained`` does not know them: it drops them, and :func:`attach` reads them from the files.
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
from vtprune_train.models.forward.decoder import PARAMETERS
from vtprune_train.models.io.build import LEARNED_NAME
from vtprune_train.models.io.provenance import weight_files
from vtprune_train.pruning import UntrustedMethodError, method_from_settings, saved_settings
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.learned import learns

log = logging.getLogger(__name__)

SOURCE = "_vtprune_source"  # on a model: the folder that it was read from, where its config names another
FILE = "pruning.safetensors"  # beside an adapter


def attach(model: HFModule, method: PruningMethod) -> None:
    """Put what ``method.module`` makes at ``<decoder>.pruning``, in the decoder's dtype and on its device; nothing if
    it makes nothing. ``model`` is the Hugging Face model itself, not a PEFT model around it.

    Values come from the checkpoint that the model was loaded from, if that was saved with the same method; a warning
    says so where they do not. Fresh ones depend on PyTorch's seed alone, not on what was drawn since it was set."""
    text_model = model.get_submodule(family_of(model).decoder)
    made = fresh(method, text_model)
    detach(model)
    if made is not None:
        _fill(made, saved_tensors(model, method), model, method)
        setattr(text_model, PARAMETERS, made)


def detach(model: HFModule) -> nn.Module | None:
    """Take the module of :func:`attach` out of the model; ``None`` if there is none."""
    return model.get_submodule(family_of(model).decoder)._modules.pop(PARAMETERS, None)


def modules_to_save(model: HFModule) -> list[str]:
    """The names by which PEFT's ``modules_to_save`` finds the parameters of :func:`attach`, a module each."""
    made = model.get_submodule(family_of(model).decoder)._modules.get(PARAMETERS)
    named = () if made is None else made.named_modules(prefix=PARAMETERS)
    return [name for name, module in named if next(module.parameters(recurse=False), None) is not None]


def carry(model: HFModule) -> None:
    """:func:`attach` for a model that is not pruned, but saved again with the settings in its config.

    Raises:
        ValueError: see :func:`check_trained` and :func:`saved_learner`.
    """
    method = saved_learner(model.config, _source(model))
    if method is not None:
        check_trained(model, method)
        attach(model, method)


def check_trained(model: HFModule, method: PruningMethod) -> None:
    """Whether the checkpoint that a model was loaded from brings all parameters of ``method``, for those who do not
    train it.

    Raises:
        ValueError: it does not, so some would start fresh.
    """
    if not learns(method):
        return
    made = fresh(method, model.get_submodule(family_of(model).decoder))
    if made is None:
        return
    own, names = made.state_dict(), _names(method)
    if missing := _missing(own, saved_tensors(model, method)):
        named = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
        raise ValueError(
            f"{' and '.join(names)} learns parameters, and {_lack(model, own, missing)}; train with "
            f"pruning.method={named} and name that run, with the settings of its training, or name a method "
            "that learns nothing"
        )


def saved_learner(config: PreTrainedConfig, source: str = "") -> PruningMethod | None:
    """The method in a config's settings if it has parameters of its own; ``source`` is where the model's files are.

    Raises:
        UntrustedMethodError: it is code outside the package that nobody named, and its parameters are in ``source``.
    """
    try:
        settings = saved_settings(config)
    except UntrustedMethodError:
        if _learned_tensors(source):
            raise
        return None
    method = None if settings is None else method_from_settings(settings)
    return method if learns(method) else None


def fresh(method: PruningMethod, text_model: HFModule) -> nn.Module | None:
    """What ``method.module`` makes for a decoder, in its dtype and on its device; ``None`` if it makes nothing."""
    weight, config = text_model.get_input_embeddings().weight, text_model.config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        made = method.module(config.hidden_size, len(text_model.layers))
        if made is None:
            return None
        for module in made.modules():
            if isinstance(module, nn.Embedding):
                text_model._init_weights(module)
    return made.to(weight.device, weight.dtype).train(text_model.training)


@torch.no_grad()
def _fill(made: nn.Module, found: dict[str, Tensor], model: HFModule, method: PruningMethod) -> None:
    own = made.state_dict()
    missing = _missing(own, found)
    for name, value in own.items():
        if name not in missing:
            value.copy_(found[name])
    if not missing:
        return
    names = " and ".join(_names(method))
    if _source(model):
        lack = _lack(model, own, missing)
        log.warning("%s learns parameters, and %s: they start fresh and are of no use untrained", names, lack)
    else:
        log.info("%s adds %d tensors to the model, which start fresh", names, len(own))


def _missing(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The names in ``own`` that ``found`` does not have in that shape."""
    return [name for name, value in own.items() if name not in found or found[name].shape != value.shape]


def _lack(model: HFModule, own: Mapping[str, Tensor], missing: list[str]) -> str:
    """What the model's checkpoint does not hold, in words."""
    found = f"{len(missing)} of {len(own)} tensors are missing or of another shape, first {missing[0]}"
    return f"{_source(model) or 'this model'} holds none that fit ({found})"


def _source(model: HFModule) -> str:
    return model.__dict__.get(SOURCE) or getattr(model.config, "_name_or_path", "") or ""


def saved_tensors(model: HFModule, method: PruningMethod) -> dict[str, Tensor]:
    """The parameters of ``method`` in the files that a model was loaded from, by their names below ``pruning``; none if
    the checkpoint was saved with another method."""
    source = _source(model)
    return _learned_tensors(source) if _saved_names(model.config) == _names(method) else {}


def _learned_tensors(source: str) -> dict[str, Tensor]:
    """The parameters of a method in a checkpoint's files."""
    if not source:
        return {}
    try:
        files = weight_files(source)
    except ValueError:
        return {}
    found = {}
    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                if match := LEARNED_NAME.search(key):
                    found[match[1]] = tensors.get_tensor(key)
    return found


def _names(method: PruningMethod) -> list[str]:
    return [str(part.settings()["method"]) for part in method.parts]


def _saved_names(config: PreTrainedConfig) -> list[str]:
    """The methods in a config's settings."""
    named = (getattr(config, "pruning", None) or {}).get("method")
    return [str(part.get("method")) for part in named] if isinstance(named, list | tuple) else [str(named)]
