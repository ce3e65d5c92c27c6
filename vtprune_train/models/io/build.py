"""Where a model comes from: a checkpoint, its parts, or a config in the YAML."""

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
import transformers
from huggingface_hub.errors import StrictDataclassError
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

from vtprune_train.config.model import ModelConfig
from vtprune_train.files import pickles
from vtprune_train.models import HFModule
from vtprune_train.models.families import FAMILIES, KNOWN_CONFIGS, config_of_parts, trained_family
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
_LOADING = threading.RLock()  # transformers keeps what it does not warn of on a class
LEARNED_NAME = re.compile(rf"(?:^|\.){PARAMETERS}\.(.+)$")  # what a method adds, in memory and in files


def resolve_checkpoint(path: str) -> str:
    """The Hugging Face folder of a run, one of its checkpoints, or a folder or hub id as it is.

    Raises:
        ValueError: a run's folder without a complete checkpoint, or a checkpoint without an export.
    """
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        return path
    if not (checkpoint / EXPORT / "config.json").is_file() and (checkpoint / UNEXPORTED / PLAN).is_file():
        raise ValueError(
            f"{checkpoint} holds no Hugging Face export (train.export was last or never). Make one with "
            f"`vtprune export --model {checkpoint} --out DIR`, and name DIR"
        )
    return str(checkpoint / EXPORT)


def newest_checkpoint(path: str) -> Path | None:
    """The checkpoint at a path, or a run's newest; ``None`` for what is neither a run nor a checkpoint.

    Raises:
        ValueError: a run's folder without a complete checkpoint.
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
    """The model's config, without weights. ``offline`` takes recorded sizes for well-known hub ids (dry runs).

    Raises:
        ValueError: there is no such checkpoint, or none of a family that the loop trains.
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
    """The family of a config that :func:`load_model_config` returned, and how it is trained."""
    return trained_family(config.model_type, "this config")


def _config_of_sizes(sizes: dict[str, Any]) -> PreTrainedConfig:
    """A config from the YAML's sizes; ``model_type`` names the family, the first one where it is left out."""
    model_type = sizes.get("model_type", FAMILIES[0].model_type)
    _, loop = trained_family(model_type, "model.config")
    if loop.needs_checkpoint:
        raise ValueError(
            f"model.config.model_type={model_type!r}: this family is trained from a checkpoint only; set model.path"
        )
    _check_keys(sizes, CONFIG_MAPPING[model_type]())
    try:
        return CONFIG_MAPPING[model_type](**{key: value for key, value in sizes.items() if key != "model_type"})
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"model.config: transformers refuses these sizes: {reason}") from error


def _check_keys(sizes: dict[str, Any], default: PreTrainedConfig) -> None:
    """Refuse keys that transformers would silently store: a typo would leave a size at its default."""
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
    """The config in a folder or on the hub, of whatever family; ``place`` is the setting that named it and its value.
    ``offline`` takes recorded sizes for well-known hub ids.

    Raises:
        ValueError: there is none, or one of the original LLaVA code.
    """
    if offline and name in KNOWN_CONFIGS and not Path(name).exists():
        return KNOWN_CONFIGS[name]()
    try:
        is_original = original.read_config(Path(name)) is not None
        config = None if is_original else AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: no readable config.json there or on the hub ({first_line(error)})") from error
    if config is None:
        raise ValueError(
            f"{place}: this is a checkpoint of the original LLaVA code; make a Hugging Face folder of it first: "
            f"vtprune convert --model {name} --to hf --out DIR"
        )
    check_attention(name, place)
    return config


def check_attention(name: str, place: str) -> None:
    """Look at the attention that a ``config.json`` asks for: transformers downloads kernels of the hub and runs them.

    Raises:
        ValueError: it names one.
    """
    content, _ = PreTrainedConfig.get_config_dict(name)
    found = next(hub_kernels(content), None)
    if found is not None:
        key, value = found
        raise ValueError(
            f"{place}: config.json of {name} has {key}={value!r}, a kernel of the hub, whose code is not run; remove "
            "the key or set it to sdpa"
        )


@contextmanager
def learned_expected() -> Iterator[None]:
    """Within it, ``from_pretrained`` does not warn of a method's own parameters, which ``prune`` reads by itself."""
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
    """``model_class.from_pretrained``, which must find every weight: transformers starts missing ones at random.

    Raises:
        ValueError: a file cannot be read, a weight is missing or has another shape.
    """
    check_weights(folder, place)
    with _loading(place), learned_expected(), placing_what_is_read(placement):
        model, found = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{place}: {len(missing)} weight(s) of the {type(model).__name__} are missing, first {missing[0]}; copy "
            "the whole checkpoint"
        )
    return model


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
    """The model, with the image token of ``tokenizer``; unmodified transformers classes.

    Parameters have ``config.dtype``. Buffers keep the dtype that transformers gives them: rotary frequencies rounded to
    bfloat16 would move the angles of late positions by more than a radian. With ``placement`` each parameter is placed
    before the next is read or drawn; the embeddings, the output layer and a projector at the end.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    dtype = getattr(torch, config.dtype)
    model_config = load_model_config(config)
    family, loop = family_of_config(model_config)
    image_token_id = tokenizer.convert_tokens_to_ids(loop.image_token)
    model_class = getattr(transformers, family.model_class)
    if config.path is not None:
        folder, place = resolve_checkpoint(config.path), f"model.path={config.path}"
        model = open_whole(model_class, folder, dtype, place, placement)
    else:
        model_config.image_token_id = image_token_id
        if config.config is not None:
            _fit_special_tokens(model_config, tokenizer)
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


def _fit_special_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    text = config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"model.config.text_config.vocab_size={text.vocab_size} is smaller than the tokenizer ({len(tokenizer)})"
        )
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id


def _from_parts(config: ModelConfig, model_config: PreTrainedConfig, placement: Placement) -> HFModule:
    """A language model and a tower with a new projector between them; only the projector is initialised."""
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
    deferred.make(model, WHOLE)  # what is left: the projector, which init_weights fills
    model.init_weights()
    model.generation_config = language.generation_config
    return model


def _hand_over(source: HFModule, module: HFModule) -> None:
    """Let ``module`` have the parameters and buffers of ``source``, which holds the same."""
    taken, own = (dict(m.named_parameters(remove_duplicate=False)) for m in (source, module))
    shapes = [{name: whole_shape(p) for name, p in parameters.items()} for parameters in (taken, own)]
    if differing := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ValueError(f"the config of a {type(source).__name__} does not fit its weights, see {differing[0]}")
    for name, parameter in taken.items():
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent)._parameters[last] = parameter
        parameter._is_hf_initialized = True  # what transformers' own loading marks
    module.load_state_dict({name: b for name, b in source.state_dict().items() if name not in taken}, strict=False)


def _load_projector(model: HFModule, loop: Loop, path: str, placement: Placement = WHOLE) -> None:
    """The projector (with ``image_newline``, if there is one) of a stage-1 checkpoint; nothing else of it is read."""
    source = Path(resolve_checkpoint(path))
    if (source / original.MM_PROJECTOR).is_file():  # stage 1 of the original code
        source = source / original.MM_PROJECTOR
    keys = tuple(name.removeprefix("model.") for name in loop.projector)
    own = {key: value for key, value in model.model.named_parameters() if key.startswith(keys)}
    if source.is_file():
        found = _read_mm_projector(model, source)
        if "image_newline" in own and "image_newline" not in found:
            log.warning("model.projector=%s holds no image_newline; it starts as the model's own", path)
            del own["image_newline"]
        place = str(source)
    else:
        files = sorted(source.glob("*.safetensors"))
        found, place = read_projector(files, keys), f"{len(files)} safetensors file(s) of {source}"
    if missing := sorted(set(own) - set(found)):
        raise ValueError(f"model.projector={path}: no {missing[0]} in {place}")
    for key, parameter in own.items():
        if whole_shape(parameter) != found[key].shape:
            raise ValueError(
                f"model.projector={path}: {key} has shape {tuple(found[key].shape)}, but this model needs "
                f"{tuple(whole_shape(parameter))}; it was trained for another language model or tower"
            )
    with placement.whole(own.values()):
        for key, parameter in own.items():
            parameter.data.copy_(found[key])


def _read_mm_projector(model: HFModule, file: Path) -> dict[str, torch.Tensor]:
    """The ``mm_projector.bin`` of the original code, by its names in the base."""
    found = original.read_projector_file(file, f"model.projector={file}")
    wants_linear = getattr(model.config, "projector_hidden_act", None) == "linear"
    if is_linear(found) and not wants_linear:
        raise ValueError(f"model.projector={file} is a linear projector; this model's has two layers and GELU")
    if wants_linear and not is_linear(found):
        raise ValueError(f"model.projector={file} has two layers and GELU; this model's projector is linear")
    return {name.removeprefix("model."): value for name, value in found.items()}


def read_projector(files: Iterable[Path], keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The projector (names that begin with one of ``keys``) in a checkpoint's files, by its names in the base.

    Raises:
        ValueError: a file cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (no mapping)
                    short = key.removeprefix("model.")
                    if short.startswith(keys):
                        found[short] = tensors.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({first_line(error)})") from error
    return found


def parts_of(model: HFModule) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters of the parts that ``model.train`` names; ``unused`` holds tower layers after the one whose
    features are taken, which no gradient reaches; ``lora`` what an adapter trains (its biases included); ``pruning``
    what the method adds."""
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
    """Freeze all parts but the named ones, and what a method adds, which is trained in every run."""
    for part, parameters in parts_of(model).items():
        for _, parameter in parameters:
            parameter.requires_grad_(part in train or part == "pruning")


def saved_pruning(path: str, asked: Any = None) -> dict[str, Any] | None:
    """The pruning settings in the ``config.json`` of ``train.init_from``; ``None`` if it was trained without dropping.
    ``asked`` is the method that the user named, if any; the settings of another one are returned as they are.

    Raises:
        ValueError: there is no such checkpoint, or its method is code outside the package that nobody named.
    """
    place = f"train.init_from={path}"
    settings = getattr(load_any_config(resolve_checkpoint(path), place, offline=False), CONFIG_KEY, None)
    if settings is None or asked not in (None, settings.get("method")):
        return settings
    named = settings.get("method")
    check_trusted(settings, place, f"name it in this run's own settings: pruning.method={named}")
    return completed_settings(settings)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    if "custom code which must be executed" in str(error):
        return "it brings code of its own (auto_map), which is not run; only transformers' own classes are opened"
    return pickles.first_line(error)
