"""Builds a model from a checkpoint, from its parts, or from sizes in the YAML."""

from __future__ import annotations

import difflib
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vtprune_train.config.errors import nearest_name
from vtprune_train.config.model import ModelConfig
from vtprune_train.files import pickles
from vtprune_train.models import HFModule
from vtprune_train.models.families import (
    FAMILIES,
    KNOWN_CONFIGS,
    OUTSIDE,
    class_of_config,
    config_of_parts,
    trained_family,
)
from vtprune_train.models.families.base import Family, Loop
from vtprune_train.models.families.llava_original import is_linear
from vtprune_train.models.families.towers import open_clip
from vtprune_train.models.forward.decoder import PARAMETERS
from vtprune_train.models.io import original
from vtprune_train.models.io.export import EXPORT, PLAN, UNEXPORTED
from vtprune_train.models.io.in_pieces import Deferred, placing_what_is_read
from vtprune_train.models.io.placement import WHOLE, Placement, place_all, whole_shape
from vtprune_train.models.io.weight_files import check_weights, hub_kernels
from vtprune_train.pruning import CONFIG_KEY, check_trusted, completed_settings

log = logging.getLogger(__name__)

EMBEDDING_MULTIPLE = 64
PARTS = ("projector", "language_model", "vision_tower", "lora", "pruning", "unused")  # of parts_of
_LOADING = threading.RLock()  # guards a class attribute of transformers
LEARNED_NAME = re.compile(rf"(?:^|\.){PARAMETERS}\.(.+)$")  # names of a method's parameters, in memory and in files


def resolve_checkpoint(path: str) -> str:
    """The Hugging Face folder of a run or of one of its checkpoints; any other folder or hub id is returned unchanged.

    Raises:
        ValueError: the run has no complete checkpoint, or the checkpoint has no export.
    """
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        return path
    if not (checkpoint / EXPORT / "config.json").is_file() and (checkpoint / UNEXPORTED / PLAN).is_file():
        raise ValueError(
            f"{checkpoint} holds no Hugging Face export (train.export was last or never). Make one with `vtprune "
            f"export --model {checkpoint} --out DIR`, then use DIR"
        )
    return str(checkpoint / EXPORT)


def newest_checkpoint(path: str) -> Path | None:
    """The checkpoint at a path, or the newest one of a run; ``None`` if the path is neither.

    Raises:
        ValueError: the run has no complete checkpoint.
    """
    folder = Path(path)
    if (folder / EXPORT / "config.json").is_file() or (folder / UNEXPORTED / PLAN).is_file():
        return folder
    if not (folder / "checkpoints").is_dir():
        return None
    latest = folder / "checkpoints" / "latest"
    named = latest.read_text().strip() if latest.is_file() else ""
    finished = sorted(path.parent.name for path in latest.parent.glob("step_????????*/manifest.json"))
    finished = [name for name in finished if name.removeprefix("step_").isdigit()]
    if not finished:
        raise ValueError(f"{folder} has no complete checkpoint yet ({latest.parent} holds no finished step_XXXXXXXX)")
    return latest.parent / (named if named in finished else finished[-1])


def load_model_config(config: ModelConfig, *, offline: bool = False) -> PreTrainedConfig:
    """The model's config, without weights. ``offline`` uses recorded configs of well-known hub ids (dry runs).

    Raises:
        ValueError: the checkpoint does not exist, or the training loop does not support its family.
    """
    if config.path is not None:
        loaded = load_any_config(resolve_checkpoint(config.path), f"model.path={config.path}", offline)
        trained_family(loaded.model_type, f"model.path={config.path}")
        return loaded
    if config.config is not None:
        return _config_of_sizes(config.config)
    assert config.language_model is not None and config.vision_tower is not None
    text = load_any_config(config.language_model, f"model.language_model={config.language_model}", offline)
    vision = load_any_config(config.vision_tower, f"model.vision_tower={config.vision_tower}", offline)
    return config_of_parts(text, vision, config.image_grid_pinpoints, f"model.vision_tower={config.vision_tower}")


def family_of_config(config: PreTrainedConfig) -> tuple[Family, Loop]:
    """The family of a config from :func:`load_model_config`, and what the training loop needs from it."""
    return trained_family(config.model_type, "this config")


def _config_of_sizes(sizes: dict[str, Any]) -> PreTrainedConfig:
    """A config from the sizes in the YAML; ``model_type`` names the family, by default the first one."""
    model_type = sizes.get("model_type", FAMILIES[0].model_type)
    _, loop = trained_family(model_type, "model.config")
    if loop.needs_checkpoint:
        raise ValueError(
            f"model.config.model_type={model_type!r}: this family can only be trained from a checkpoint; set model.path"
        )
    _check_keys(sizes, CONFIG_MAPPING[model_type]())
    try:
        return CONFIG_MAPPING[model_type](**{key: value for key, value in sizes.items() if key != "model_type"})
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"model.config: transformers refuses these sizes: {reason}") from error


def _check_keys(sizes: dict[str, Any], default: PreTrainedConfig) -> None:
    """Refuse unknown keys, which transformers would silently store: a typo would leave a size at its default."""
    sections: list[tuple[str, dict[str, Any], PreTrainedConfig]] = [("model.config", sizes, default)]
    for section in ("text_config", "vision_config"):
        values = sizes.get(section) or {}
        model_type = values.get("model_type", getattr(default, section).model_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model.config.{section}.model_type={model_type!r} is unknown to transformers")
        sections.append((f"model.config.{section}", values, CONFIG_MAPPING[model_type]()))
    for place, values, default in sections:
        known = [*default.to_dict(), *default.attribute_map, "head_dim"]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {place}.{nearest[0]}?" if nearest else ""
                raise ValueError(f"{place}.{key}: unknown key{hint}")


def load_any_config(name: str, place: str, offline: bool) -> PreTrainedConfig:
    """The config in a folder or on the hub, of any family.

    Args:
        name: folder or hub id.
        place: the setting that names it, with its value, for errors.
        offline: use recorded configs of well-known hub ids.

    Raises:
        ValueError: there is no config, or it is one of the original LLaVA code.
    """
    if offline and name in KNOWN_CONFIGS and not Path(name).exists():
        return KNOWN_CONFIGS[name]()
    try:
        is_original = original.read_config(Path(name)) is not None
        if not is_original:
            _check_type(name)
        config = None if is_original else AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {_no_config(name, error)}") from error
    if config is None:
        raise ValueError(
            f"{place}: this is a checkpoint of the original LLaVA code; convert it to a Hugging Face folder first: "
            f"vtprune convert --model {name} --to hf --out DIR"
        )
    check_attention(name, place)
    return config


def _no_config(name: str, error: Exception) -> str:
    """Why there is no config in a folder or on the hub, with a suggestion."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return f"no readable config.json there ({first_line(error)})"
    if folder.is_dir():
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        return "this folder has no config.json" + (f"; these folders in it do: {', '.join(inside)}" if inside else "")
    nearest = nearest_name(folder.name, (path.name for path in folder.parent.glob("*") if path.is_dir()), cutoff=0.6)
    hint = f"; did you mean {folder.parent / nearest}?" if nearest else ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        hub = "is not a Hub id"
    else:
        hub = f"cannot be loaded from the Hub ({first_line(error)})"
    return f"no such folder here (working directory {Path.cwd()}), and the name {hub}{hint}"


def _check_type(name: str) -> None:
    """Refuse a model type that transformers does not know, unless the checkpoint brings code for it."""
    content, _ = PreTrainedConfig.get_config_dict(name)
    model_type = content.get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING and "auto_map" not in content:
        raise ValueError(f"its model_type {model_type!r} is unknown to transformers; {OUTSIDE}")


def check_attention(name: str, place: str) -> None:
    """Check the attention that a ``config.json`` names: transformers would download and run kernels of the hub.

    Raises:
        ValueError: it names a kernel of the hub.
    """
    content, _ = PreTrainedConfig.get_config_dict(name)
    kernel = next(hub_kernels(content), None)
    if kernel is not None:
        key, value = kernel
        raise ValueError(
            f"{place}: config.json of {name} has {key}={value!r}, a kernel of the hub, whose code is not run; remove "
            "the key or set it to sdpa"
        )


@contextmanager
def learned_expected() -> Iterator[None]:
    """A context in which ``from_pretrained`` does not warn about a method's parameters, which ``prune`` loads
    itself."""
    with _LOADING:
        before = PreTrainedModel._keys_to_ignore_on_load_unexpected
        PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or ()), LEARNED_NAME.pattern]
        try:
            yield
        finally:
            PreTrainedModel._keys_to_ignore_on_load_unexpected = before


@contextmanager
def _loading(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{place}: cannot be loaded ({first_line(error)})") from error


def open_whole(model_class: Any, folder: str, dtype: Any, place: str, placement: Placement = WHOLE) -> HFModule:
    """Call ``model_class.from_pretrained`` and require every weight; transformers would initialize missing ones
    randomly.

    Raises:
        ValueError: a file cannot be read, or a weight is missing or has another shape.
    """
    check_weights(folder, place)
    with _loading(place), learned_expected(), placing_what_is_read(placement):
        model, loading_info = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(
            f"{place}: {len(missing)} weight(s) of the {type(model).__name__} are missing, first {missing[0]}; copy "
            "the whole checkpoint"
        )
    return model


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
    """Build the model as an instance of an unmodified transformers class, with the image token of ``tokenizer``.

    Parameters have ``config.dtype``. Buffers keep the dtype that transformers uses: rotary frequencies rounded to
    bfloat16 would change the angles of late positions by more than a radian. With ``placement`` each parameter is
    placed before the next one is read or initialized; the embeddings, the output layer and a projector are placed at
    the end.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    dtype = getattr(torch, config.dtype)
    model_config = load_model_config(config)
    _, loop = family_of_config(model_config)
    image_token_id = tokenizer.convert_tokens_to_ids(loop.image_token)
    if config.path is not None:
        folder, place = resolve_checkpoint(config.path), f"model.path={config.path}"
        model = open_whole(class_of_config(model_config), folder, dtype, place, placement)
    else:
        model_config.image_token_id = image_token_id
        if config.config is not None:
            _fit_special_tokens(model_config, tokenizer, loop)
            model = _from_sizes(model_config, dtype, placement)
        else:
            model = _from_parts(config, model_config, placement)
    if config.projector is not None:
        _load_projector(model, loop, config.projector, placement)
    vocab = whole_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > vocab:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_MULTIPLE)
    model.config.image_token_id = image_token_id
    place_all(model, placement)
    return model


def _from_sizes(model_config: PreTrainedConfig, dtype: torch.dtype, placement: Placement) -> HFModule:
    """A model with random weights."""
    if not placement.sharded:
        return AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    with Deferred() as deferred:
        model = AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    deferred.make(model, placement)
    return model


def _fit_special_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, loop: Loop) -> None:
    text = config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"model.config.text_config.vocab_size={text.vocab_size} is smaller than the tokenizer ({len(tokenizer)})"
        )
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    if loop.video_token in loop.visual_tokens:
        config.video_token_id = tokenizer.convert_tokens_to_ids(loop.video_token)


def _from_parts(config: ModelConfig, model_config: PreTrainedConfig, placement: Placement) -> HFModule:
    """Build a model from a language model and a vision tower; only the projector is initialized."""
    assert config.language_model is not None and config.vision_tower is not None
    dtype = getattr(torch, config.dtype)
    places = f"model.language_model={config.language_model}", f"model.vision_tower={config.vision_tower}"
    check_weights(config.language_model, places[0])
    check_weights(config.vision_tower, places[1])
    with _loading(places[0]), placing_what_is_read(placement):
        language = AutoModelForCausalLM.from_pretrained(config.language_model, dtype=dtype, trust_remote_code=False)
    with _loading(places[1]), placing_what_is_read(placement):
        tower = open_clip(config.vision_tower, dtype)
    with no_init_weights(), Deferred() as deferred:
        model = AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    for module, source in (
        (model.model.language_model, language.model),
        (model.lm_head, language.lm_head),
        (model.model.vision_tower, tower),
    ):
        _hand_over(source, module)
    deferred.make(model, WHOLE)  # the projector, which init_weights initializes
    model.init_weights()
    model.generation_config = language.generation_config
    return model


def _hand_over(source: HFModule, module: HFModule) -> None:
    """Move the parameters and buffers of ``source`` to ``module``, which has the same structure."""
    loaded, empty = (dict(m.named_parameters(remove_duplicate=False)) for m in (source, module))
    shapes = [{name: whole_shape(p) for name, p in parameters.items()} for parameters in (loaded, empty)]
    if differing := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ValueError(f"the config of a {type(source).__name__} does not fit its weights, see {differing[0]}")
    for name, parameter in loaded.items():
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent)._parameters[last] = parameter
        parameter._is_hf_initialized = True  # transformers' flag for loaded parameters
    module.load_state_dict({name: b for name, b in source.state_dict().items() if name not in loaded}, strict=False)


def _load_projector(model: HFModule, loop: Loop, path: str, placement: Placement = WHOLE) -> None:
    """Load only the projector (and ``image_newline``, if there is one) from a checkpoint of stage 1."""
    source = Path(resolve_checkpoint(path))
    if (source / original.MM_PROJECTOR).is_file():  # stage 1 of the original code
        source = source / original.MM_PROJECTOR
    keys = tuple(name.removeprefix("model.") for name in loop.projector)
    parameters = {key: value for key, value in model.model.named_parameters() if key.startswith(keys)}
    if source.is_file():
        tensors = _read_mm_projector(model, source)
        if "image_newline" in parameters and "image_newline" not in tensors:
            log.warning("model.projector=%s has no image_newline; the model's initial value is used", path)
            del parameters["image_newline"]
        place = str(source)
    else:
        files = sorted(source.glob("*.safetensors"))
        tensors, place = read_projector(files, keys), f"{len(files)} safetensors file(s) of {source}"
    if missing := sorted(set(parameters) - set(tensors)):
        raise ValueError(f"model.projector={path}: no {missing[0]} in {place}")
    for key, parameter in parameters.items():
        if whole_shape(parameter) != tensors[key].shape:
            raise ValueError(
                f"model.projector={path}: {key} has shape {tuple(tensors[key].shape)}, but this model needs "
                f"{tuple(whole_shape(parameter))}; it was trained with a different language model or vision tower"
            )
    with placement.whole(parameters.values()):
        for key, parameter in parameters.items():
            parameter.data.copy_(tensors[key])


def _read_mm_projector(model: HFModule, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an original ``mm_projector.bin``, by their names in the model's base."""
    projector = original.read_projector_file(file, f"model.projector={file}")
    needs_linear = getattr(model.config, "projector_hidden_act", None) == "linear"
    if is_linear(projector) and not needs_linear:
        raise ValueError(f"model.projector={file} is a linear projector; this model's has two layers and GELU")
    if needs_linear and not is_linear(projector):
        raise ValueError(f"model.projector={file} has two layers and GELU; this model's projector is linear")
    return {name.removeprefix("model."): value for name, value in projector.items()}


def read_projector(files: Iterable[Path], keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The projector in the files of a checkpoint (names that start with one of ``keys``), by its names in the base.

    Raises:
        ValueError: a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    short = key.removeprefix("model.")
                    if short.startswith(keys):
                        tensors[short] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({first_line(error)})") from error
    return tensors


def parts_of(model: HFModule) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters of the parts in ``model.train``. ``unused`` has the tower layers after the features, which get
    no gradient; ``lora`` the parameters of an adapter, including biases; ``pruning`` the parameters of the method."""
    family, loop = family_of_config(model.config)
    adapter = getattr(model, "peft_config", {}).get("default")
    adapts_bias = adapter is not None and adapter.bias == "lora_only"
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if adapter is not None and (".lora_" in name or (adapts_bias and name.endswith(".base_layer.bias"))):
            part = "lora"
        elif name.startswith(f"{family.decoder}.{PARAMETERS}."):
            part = "pruning"
        elif name.startswith(loop.projector):
            part = "projector"
        elif name.startswith(loop.vision):
            part = "unused" if loop.untrained(model.config, name) else "vision_tower"
        else:
            part = "language_model"
        parts[part].append((name, parameter))
    return parts


def set_trainable(model: HFModule, train: dict[str, float]) -> None:
    """Freeze all parts except those in ``train`` and the method's parameters, which every run trains."""
    for part, parameters in parts_of(model).items():
        for _, parameter in parameters:
            parameter.requires_grad_(part in train or part == "pruning")


def saved_pruning(path: str, requested: Any = None) -> dict[str, Any] | None:
    """The pruning settings in the ``config.json`` of ``train.init_from``; ``None`` if it was trained without dropping.

    Args:
        path: the checkpoint.
        requested: the method that the user named, if any. Settings of a different saved method are returned unchanged.

    Raises:
        ValueError: there is no such checkpoint, or its method is code outside the package that the user did not name.
    """
    place = f"train.init_from={path}"
    settings = getattr(load_any_config(resolve_checkpoint(path), place, offline=False), CONFIG_KEY, None)
    if settings is None or requested not in (None, settings.get("method")):
        return settings
    named = settings.get("method")
    check_trusted(settings, place, f"name it in this run's own settings: pruning.method={named}")
    return completed_settings(settings)


def first_line(error: Exception) -> str:
    """An error's message on one line."""
    if "custom code which must be executed" in str(error):
        return "it contains custom code (auto_map), which is not run; only classes of transformers are supported"
    return pickles.first_line(error)
