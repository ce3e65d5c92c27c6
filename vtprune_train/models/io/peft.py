"""PEFT adapters (LoRA, DoRA, QLoRA) on the decoder of the language model: creates, saves, loads and merges them.

The adapter is added to the model in place, so the classes and the names of all other parameters do not change for
``prune``, DeepSpeed and the training loop.
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
    """Data of a run that trains an adapter, for its checkpoints.

    Args:
        base: the record of the base model.
        extra: see :func:`~vtprune_train.models.io.provenance.extra_tensors`.
        names: published names of the base's tensors by their names in memory.
    """

    base: Base
    extra: dict[str, torch.Tensor]
    names: dict[str, str]


def adapted_of(model: HFModule) -> Adapted | None:
    """The :class:`Adapted` of a model; ``None`` for a model without an adapter."""
    return model.__dict__.get(ADAPTED)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is the ``hf/`` folder of a checkpoint with an adapter."""
    return (Path(folder) / RECORD).is_file()


def linear_layers(model: HFModule) -> list[str]:
    """Last parts of the names of the decoder's linear layers, in the order in which they first appear."""
    layers = model.get_submodule(family_of(model).decoder).layers
    return list(dict.fromkeys(n.rpartition(".")[2] for n, m in layers.named_modules() if isinstance(m, nn.Linear)))


def lora_config(settings: model_settings.PeftConfig, model: HFModule) -> LoraConfig:
    """PEFT's settings. The targets are one regular expression, so that layers of the vision tower with the same names
    are not adapted.

    Raises:
        ConfigError: a target is not a linear layer of the decoder.
    """
    known = linear_layers(model)
    targets = known if settings.target_modules is None else settings.target_modules
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(
            f"model.peft.target_modules: {unknown[0]!r} is not a linear layer of the language model's decoder; it "
            f"has {', '.join(known)}"
        )
    decoder = re.escape(family_of(model).decoder)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{decoder}\.layers\.\d+\.(.*\.)?({'|'.join(targets)})",
        use_rslora=settings.use_rslora,
        use_dora=settings.kind == "dora",
        bias=settings.bias,
        task_type="CAUSAL_LM",
    )


def adapt(model: HFModule, settings: model_settings.PeftConfig) -> None:
    """Add a new adapter to the model. Its matrix B is zero, so the outputs do not change.

    Raises:
        ConfigError: see :func:`lora_config`.
    """
    config = lora_config(settings, model)
    dtype = model.dtype
    on_meta = next(model.parameters()).is_meta
    with placement_of(model).libraries_gather():
        LoraModel(model, config, ADAPTER, low_cpu_mem_usage=on_meta)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # PEFT uses float32 with a half-precision base, but DeepSpeed keeps master weights
            parameter.data = parameter.data.to(dtype)


def check_quantization(device: torch.device) -> None:
    """Check that a 4-bit layer works on ``device``.

    Raises:
        ConfigError: bitsandbytes is not installed or does not work on the device.
    """
    fix = "use model.peft.kind=lora, which needs no quantized base"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.peft.kind=qlora needs bitsandbytes, which cannot be imported here ({first_line(error)}); "
            f"pip install -r requirements-gpu.txt, or {fix}"
        ) from error
    try:
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.peft.kind=qlora: bitsandbytes does not quantize on {device} ({first_line(error)}); run on a CUDA "
            f"device, or {fix}"
        ) from error


def quantize(model: HFModule) -> None:
    """Replace the decoder's linear layers by 4-bit layers (NF4, double quantization) that compute in the model's dtype.
    The weights are converted when the model moves to its device."""
    import bitsandbytes

    layers = model.get_submodule(family_of(model).decoder).layers
    for name, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        quantized = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=module.weight.dtype,
            quant_type="nf4",
        )
        quantized.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        quantized.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(layers.get_submodule(parent), last, quantized)
    model.is_loaded_in_4bit = True  # read by PEFT


def open_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
    """Load the model that a run starts from, without the run's own adapter. Parameters are placed one by one by
    ``placement``, except for an adapter that is merged.

    An adapter at ``config.path`` is merged if the run has no adapter. If it has one, only the other trained parts of
    that checkpoint are loaded here, and :func:`continue_adapter` loads the adapter.

    Raises:
        ValueError: see :func:`vtprune_train.models.io.build.build_model` and :func:`open_adapter`.
    """
    folder = Path(resolve_checkpoint(config.path)) if config.path is not None else None
    if folder is None or not is_adapter(folder):
        return build_model(config, tokenizer, placement)
    if config.projector is not None:
        raise ValueError(
            f"model.projector={config.projector} has no effect: the adapter {folder} includes its projector; set "
            "model.projector to null"
        )
    if config.peft is None:
        return open_adapter(folder, config.dtype, merge=True)
    return _open_base(folder, config.dtype, placement)


def continue_adapter(model: HFModule, settings: model_settings.PeftConfig, folder: Path) -> None:
    """Load the adapter of a checkpoint into the new adapter of a run.

    Raises:
        ValueError: their settings differ.
    """
    saved, new = Base.read(folder).peft, settings.model_dump()
    changed = [key for key in new if key not in ("dropout", "kind") and new[key] != saved.get(key)]
    if (saved.get("kind") == "dora") != (settings.kind == "dora"):
        changed.insert(0, "kind")
    if changed:
        lines = "; ".join(f"model.peft.{key}: saved {saved.get(key)!r}, now {new[key]!r}" for key in changed)
        raise ValueError(
            f"{folder} holds an adapter with other settings ({lines}). Use the same settings to continue it, or merge "
            "it (vtprune export --merge) and start a new one on the result"
        )
    _load_adapter(model, folder)


def open_adapter(folder: str | Path, dtype: str, *, merge: bool) -> HFModule:
    """Load the model of a checkpoint's ``hf/`` folder with an adapter, on the CPU.

    Args:
        folder: the ``hf/`` folder.
        dtype: dtype of the model, or ``auto`` for that of training.
        merge: merge the adapter into the base, which gives a plain model.

    Raises:
        ValueError: the base is missing or has changed, or files of the adapter are missing.
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
    """Load the base with the parts that were trained in addition to the adapter, and the checkpoint's pruning and
    generation settings."""
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
    """Plan the files of the trained tensors: the adapter in PEFT's format, the method's parameters, and other trained
    parts under their published names."""
    adapted = adapted_of(model)
    assert adapted is not None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    name_of = {id(parameter): name for name, parameter in trained.items()}
    adapter = get_peft_model_state_dict(model, trained, ADAPTER, save_embedding_layers=False)
    learned = {match[0].lstrip("."): name for name in trained if (match := LEARNED_NAME.search(name))}
    files = {
        FILE: learned,
        WEIGHTS: {PREFIX + name: name_of[id(parameter)] for name, parameter in adapter.items()},
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
    """Write the export of an adapter without its trained tensors and the processor: settings and the record of the
    base."""
    adapted = adapted_of(model)
    assert adapted is not None
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(adapted.extra, adapted.names, folder / EXTRA)
    config: LoraConfig = model.peft_config[ADAPTER]
    # If more than the adapter is needed, loaders that read only PEFT's files must not find a base.
    other_files = adapter_plan(model).files.keys() - {WEIGHTS}
    is_complete = not other_files and not adapted.extra and list(adapted.base.sha256) == ["path"]
    config.base_model_name_or_path = adapted.base.model["path"] if is_complete else None
    config.save_pretrained(str(folder))
    adapted.base.write(folder)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
