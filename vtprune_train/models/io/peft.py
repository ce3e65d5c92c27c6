"""Adapters on a language model's decoder through PEFT: LoRA, DoRA, QLoRA; written, opened and folded in.

The adapter is put into the model in place, so classes and names of all other parameters stay what they were, and
``prune``, DeepSpeed and the loop see the model they know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from vtprune_train.config import model as model_settings
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.model import ModelConfig
from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of
from vtprune_train.models.io.build import LEARNED_NAME, build_model, first_line, resolve_checkpoint
from vtprune_train.models.io.export import Plan, stored
from vtprune_train.models.io.method_parameters import FILE, SOURCE
from vtprune_train.models.io.placement import WHOLE, Placement, placement_of
from vtprune_train.models.io.provenance import (
    EXTRA,
    RECORD,
    Base,
    lay_over,
    load_tensors,
    published_names,
    save_tensors,
)
from vtprune_train.models.io.weight_files import check_adapter
from vtprune_train.pruning import CONFIG_KEY

ADAPTED = "_vtprune_adapted"
ADAPTER = "default"
TRAINED = "trained.safetensors"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """What a training run keeps beside a model with an adapter, to write checkpoints: what it stands on, the
    :func:`~vtprune_train.models.io.provenance.extra_tensors`, and published names of the base's tensors by those in
    memory."""

    base: Base
    extra: dict[str, torch.Tensor]
    names: dict[str, str]


def adapted_of(model: HFModule) -> Adapted | None:
    """What :func:`adapt` left with a model; ``None`` for a model without an adapter."""
    return model.__dict__.get(ADAPTED)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is the ``hf/`` of a checkpoint that holds an adapter."""
    return (Path(folder) / RECORD).is_file()


def linear_layers(model: HFModule) -> list[str]:
    """Last names of all linear layers of the decoder, in the order of their first use in a layer."""
    layers = model.get_submodule(family_of(model).decoder).layers
    return list(dict.fromkeys(n.rpartition(".")[2] for n, m in layers.named_modules() if isinstance(m, nn.Linear)))


def lora_config(settings: model_settings.PeftConfig, model: HFModule) -> LoraConfig:
    """PEFT's settings; the targets are one expression, so that layers of the tower with the same names stay as they
    are.

    Raises:
        ConfigError: a target is not a linear layer of the decoder.
    """
    known = linear_layers(model)
    chosen = known if settings.target_modules is None else settings.target_modules
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(
            f"model.peft.target_modules: {unknown[0]!r} is not a linear layer of the language model's decoder; there "
            f"are {', '.join(known)}"
        )
    decoder = re.escape(family_of(model).decoder)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{decoder}\.layers\.\d+\.(.*\.)?({'|'.join(chosen)})",
        use_rslora=settings.use_rslora,
        use_dora=settings.kind == "dora",
        bias=settings.bias,
        task_type="CAUSAL_LM",
    )


def adapt(model: HFModule, settings: model_settings.PeftConfig) -> None:
    """Put a fresh adapter into the model; B is zero, so its outputs stay the same.

    Raises:
        ConfigError: a target that is not there.
    """
    chosen = lora_config(settings, model)
    dtype = model.dtype
    on_meta = next(model.parameters()).is_meta
    with placement_of(model).libraries_gather():
        LoraModel(model, chosen, ADAPTER, low_cpu_mem_usage=on_meta)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # PEFT makes them float32 beside a half-precision base; DeepSpeed keeps the masters
            parameter.data = parameter.data.to(dtype)


def check_quantisation(device: torch.device) -> None:
    """Try a 4-bit layer where the model will be.

    Raises:
        ConfigError: bitsandbytes is not there or does not work on the device.
    """
    way_out = "use model.peft.kind=lora, which needs no quantised base"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.peft.kind=qlora needs bitsandbytes, which cannot be imported here ({first_line(error)}); "
            f"pip install -r requirements-gpu.txt, or {way_out}"
        ) from error
    try:
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.peft.kind=qlora: bitsandbytes does not quantise on {device} ({first_line(error)}); run on a CUDA "
            f"device, or {way_out}"
        ) from error


def quantise(model: HFModule) -> None:
    """Keep the decoder's linear layers as 4-bit numbers (NF4, double quantisation), computing in the model's dtype;
    they are converted when the model moves to its device."""
    import bitsandbytes

    layers = model.get_submodule(family_of(model).decoder).layers
    for name, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        quantised = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=module.weight.dtype,
            quant_type="nf4",
        )
        quantised.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        quantised.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(layers.get_submodule(parent), last, quantised)
    model.is_loaded_in_4bit = True  # where PEFT looks


def open_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
    """The model that a run starts from, before an adapter of its own is put in. With ``placement`` its parameters are
    placed one by one, but for an adapter that is folded in.

    An adapter at ``config.path`` is folded in where the run trains without one. Where the run has an adapter, only the
    parts trained beside it are laid over the base, and :func:`continue_adapter` brings the rest.

    Raises:
        ValueError: see :func:`vtprune_train.models.io.build.build_model` and :func:`open_adapter`.
    """
    folder = Path(resolve_checkpoint(config.path)) if config.path is not None else None
    if folder is None or not is_adapter(folder):
        return build_model(config, tokenizer, placement)
    if config.projector is not None:
        raise ValueError(
            f"model.projector={config.projector} has no place: {folder} is an adapter with a projector of its own; "
            "leave model.projector null"
        )
    if config.peft is None:
        return open_adapter(folder, config.dtype, merge=True)
    return _open_base(folder, config.dtype, placement)


def continue_adapter(model: HFModule, settings: model_settings.PeftConfig, folder: Path) -> None:
    """Load the adapter of a checkpoint into the fresh one of a new run.

    Raises:
        ValueError: their settings differ.
    """
    saved, asked = Base.read(folder).peft, settings.model_dump()
    changed = [key for key in asked if key not in ("dropout", "kind") and asked[key] != saved.get(key)]
    if (saved.get("kind") == "dora") != (settings.kind == "dora"):
        changed.insert(0, "kind")
    if changed:
        lines = "; ".join(f"model.peft.{key}: there {saved.get(key)!r}, here {asked[key]!r}" for key in changed)
        raise ValueError(
            f"{folder} holds an adapter with other settings ({lines}). Set the same to continue it, or fold it in "
            "(vtprune export --merge) and start a new one on the result"
        )
    _load_adapter(model, folder)


def open_adapter(folder: str | Path, dtype: str, *, merge: bool) -> HFModule:
    """The model of a checkpoint (its ``hf/``) that holds an adapter, on the CPU. ``dtype`` may be ``auto`` (as
    trained). ``merge`` folds the adapter in, so that a plain model is left.

    Raises:
        ValueError: the base is gone or another one, or files of the adapter are missing.
    """
    folder = Path(folder)
    check_adapter(folder, f"model {folder}")
    model = _open_base(folder, dtype)
    try:
        tuner = LoraModel(model, PeftConfig.from_pretrained(str(folder)), ADAPTER)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder}: its adapter_config.json cannot be read ({first_line(error)})") from error
    _load_adapter(model, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    if merge:
        tuner.merge_and_unload(safe_merge=True)
        model.__dict__.pop("peft_config", None)
    return model


def _open_base(folder: Path, dtype: str, placement: Placement = WHOLE) -> HFModule:
    """The base with the parts trained beside the adapter, and the adapter's pruning and generation settings."""
    base = Base.read(folder)
    base.check(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = base.build(base.dtype if dtype == "auto" else dtype, tokenizer, placement)
    model.__dict__[SOURCE] = str(folder)
    names = published_names(model)
    for file in (EXTRA, TRAINED):
        lay_over(model, load_tensors(folder / file, names), str(folder / file))
    pruning = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), CONFIG_KEY, None)
    if pruning is not None:
        setattr(model.config, CONFIG_KEY, pruning)
    else:
        model.config.__dict__.pop(CONFIG_KEY, None)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _load_adapter(model: HFModule, folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"model {folder}: {WEIGHTS} is missing")
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    result: Any = set_peft_model_state_dict(model, tensors, ADAPTER)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"model {folder}: {WEIGHTS} does not fit, see {[*missing, *result.unexpected_keys][0]}")


def adapter_plan(model: HFModule) -> Plan:
    """The files with what was trained: the adapter as PEFT reads it, a method's parameters, and the parts beside them
    under their published names."""
    adapted = adapted_of(model)
    assert adapted is not None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    name_of = {id(parameter): name for name, parameter in trained.items()}
    own = get_peft_model_state_dict(model, trained, ADAPTER, save_embedding_layers=False)
    learned = {match[0].lstrip("."): name for name in trained if (match := LEARNED_NAME.search(name))}
    files = {
        FILE: learned,
        WEIGHTS: {PREFIX + name: name_of[id(parameter)] for name, parameter in own.items()},
        TRAINED: {adapted.names[name]: name for name in trained if name in adapted.names},
    }
    return Plan(
        {
            file: {published: stored(name, trained[name]) for published, name in names.items()}
            for file, names in files.items()
            if names
        }
    )


def write_adapter_settings(model: HFModule, folder: Path) -> None:
    """Write all of an adapter's export but what was trained and the processor: its settings, and the base's name."""
    adapted = adapted_of(model)
    assert adapted is not None
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(adapted.extra, adapted.names, folder / EXTRA)
    config: LoraConfig = model.peft_config[ADAPTER]
    # With more than the adapter needed, a loader that knows PEFT's files alone must not find a base by itself.
    more = adapter_plan(model).files.keys() - {WEIGHTS}
    alone = not more and not adapted.extra and list(adapted.base.sha256) == ["path"]
    config.base_model_name_or_path = adapted.base.model["path"] if alone else None
    config.save_pretrained(str(folder))
    adapted.base.write(folder)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
