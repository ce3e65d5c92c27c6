"""``vtprune convert``: convert checkpoints, or only projectors, between the original LLaVA code and Hugging Face."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from vtprune_train.cli.export import check_target, publish
from vtprune_train.cli.options import add_trust_option
from vtprune_train.core.stream import IMAGE
from vtprune_train.evaluation.answering import load_processor, load_weights, model_config
from vtprune_train.files.parse import read_json_object
from vtprune_train.models.families import class_of_config, supported_family
from vtprune_train.models.families import llava_original as names
from vtprune_train.models.families.llava_original_config import (
    check_images,
    hf_config,
    image_processor,
    original_config,
    trains_tower,
)
from vtprune_train.models.families.towers import check_clip, open_clip
from vtprune_train.models.io import original
from vtprune_train.models.io.build import (
    EMBEDDING_MULTIPLE,
    family_of_config,
    first_line,
    load_any_config,
    resolve_checkpoint,
)
from vtprune_train.models.io.method_parameters import saved_learner
from vtprune_train.models.io.processors import build_processor, saved_image_processor
from vtprune_train.models.io.tokenizer import add_image_token
from vtprune_train.models.io.weight_files import check_weights
from vtprune_train.pruning import CONFIG_KEY, NONE
from vtprune_train.training.checkpoint.manifest import check_export

log = logging.getLogger(__name__)

FORMS = ("hf", "original", "mm_projector", "projector")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    help_text = (
        "a checkpoint folder of the original LLaVA code, an mm_projector.bin, a run, or a Hugging Face model folder"
    )
    parser.add_argument("--model", required=True, metavar="PATH", help=help_text)
    add_trust_option(parser)
    parser.add_argument("--to", required=True, choices=FORMS, help="output format")
    parser.add_argument("--out", required=True, metavar="PATH", help="output folder; for mm_projector, output file")
    parser.add_argument("--vision_tower", metavar="DIR", help="CLIP vision tower (default: the one in config.json)")
    help_text = (
        "with --to original: leave out the learned parameters of the pruning method, which that format cannot store"
    )
    parser.add_argument("--without_learned", action="store_true", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace existing output")


def run(arguments: argparse.Namespace) -> int:
    """Convert."""
    form = arguments.to
    if arguments.vision_tower is not None and form not in ("hf", "original"):
        raise ValueError(f"--vision_tower has no effect with --to {form}, which converts only the projector; remove it")
    if arguments.without_learned and form != "original":
        raise ValueError(f"--without_learned has no effect with --to {form}; remove it")
    source, out = resolve_checkpoint(arguments.model), Path(arguments.out)
    check_export(source)
    if form == "mm_projector":
        _write_mm_projector(source, out, arguments.force)
    else:
        check_target(out, source, arguments.force)
        publish(out, _writer(source, form, arguments.vision_tower, arguments.without_learned))
    log.info("wrote %s to %s", form, out)
    return 0


def _writer(source: str, form: str, tower: str | None, without_learned: bool) -> Callable[[Path], None]:
    if form == "projector":
        projector = _projector(source)[0]
        tensors = {name.removeprefix("model."): value.contiguous() for name, value in projector.items()}
        return lambda folder: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if Path(source).is_file():
        raise ValueError(
            f"--to {form}: {source} is only a projector; use --to projector to write one for model.projector"
        )
    if form == "hf":
        _check_whole(Path(source))
    is_original = original.read_config(Path(source)) is not None
    if form == "hf" and is_original:
        return hf_writer(Path(source), tower)
    if form == "original" and not is_original:
        return original_writer(source, tower, without_learned)
    raise ValueError(f"--to {form}: {source} already has this format")


def _check_whole(source: Path) -> None:
    """Raise ``ValueError`` if the folder contains only part of a checkpoint."""
    if not source.is_dir():
        raise ValueError(f"--to hf: {source} is not a folder on this machine; download the checkpoint first")
    if not (source / "config.json").is_file():
        raise ValueError(f"--to hf: {source} has no config.json; copy the whole checkpoint")
    if any((source / name).is_file() for name in ("adapter_config.json", "non_lora_trainables.bin")):
        raise ValueError(
            f"--to hf: {source} is a LoRA adapter of the original code, not a model; merge it first with "
            "scripts/merge_lora_weights.py of that code"
        )
    has_weights = any(source.glob("*.safetensors")) or any(source.glob("pytorch_model*.bin"))
    if (source / original.MM_PROJECTOR).is_file() and not has_weights:
        raise ValueError(
            f"--to hf: {source} is only a projector ({original.MM_PROJECTOR}, tune_mm_mlp_adapter); use --to "
            "projector to write one for model.projector"
        )


def _projector(source: str) -> tuple[dict[str, Tensor], bool]:
    """Projector and ``image_newline`` by Hugging Face names, and whether the projector is linear."""
    file = Path(source) / original.MM_PROJECTOR if Path(source).is_dir() else Path(source)
    if file.is_file():
        projector = original.read_projector_file(file, source)
    elif original.read_config(Path(source)) is not None:
        projector = names.projector_to_hf(original.read_weights(Path(source)), source)
    else:
        config = _llava_config(source)
        prefixes = family_of_config(config)[1].projector
        weights = load_weights(source, "auto").state_dict()
        projector = {name: value for name, value in weights.items() if name.startswith(prefixes)}
        return projector, config.projector_hidden_act == "linear"
    return projector, names.is_linear(projector)


def _llava_config(source: str) -> PreTrainedConfig:
    config = model_config(source)
    if (why := supported_family(config.model_type, source).not_original) is not None:
        raise ValueError(f"{source} is a {config.model_type} model; {why}")
    return config


def _write_mm_projector(source: str, out: Path, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(
            f"--out {out} already exists; name a new file such as mm_projector.bin, or replace it with --force"
        )
    projector, linear = _projector(source)
    if linear and not names.is_linear(projector):
        raise ValueError(
            f"{source}: mm_projector needs GELU between its two linear layers, but this projector has none"
        )
    weights = names.projector_to_original(projector, linear)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    torch.save({name: value.clone() for name, value in weights.items()}, partial)
    partial.replace(out)


def hf_writer(source: Path, tower: str | None) -> Callable[[Path], None]:
    """A function that writes an original checkpoint in Hugging Face format: weights, config, tokenizer with
    ``<image>``, and processor."""
    settings = original.read_config(source)
    assert settings is not None
    name = tower or settings.get("mm_vision_tower") or settings.get("vision_tower")
    if not isinstance(name, str):
        raise ValueError(f"{source}: mm_vision_tower in config.json is {name!r}; set --vision_tower")
    config = hf_config(settings, _tower_config(name, str(source)), str(source))
    weights = hf_weights(original.read_weights(source), settings, name, str(source))
    tokenizer = _tokenizer(source, settings)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    _grow(weights, config, len(tokenizer))
    with torch.device("meta"):
        model = class_of_config(config)(config)
    expected = set(model.state_dict())
    if config.text_config.tie_word_embeddings and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    if missing := sorted(expected - set(weights)):
        raise ValueError(f"{source}: {len(missing)} tensor(s) are missing, for example {names.to_original(missing[0])}")
    if unexpected := sorted(set(weights) - expected):
        raise ValueError(
            f"{source}: unexpected tensor {names.to_original(unexpected[0])} for a {config.model_type} model"
        )
    for key, value in model.state_dict().items():
        _check_tensor(weights[key], value, f"{source}: {names.to_original(key)}")
    model.load_state_dict(weights, assign=True)
    config.dtype = model.config.dtype = weights["lm_head.weight"].dtype
    if (source / "generation_config.json").is_file():
        read_json_object(
            source / "generation_config.json"
        )  # raises an error with the name of the file if it is damaged
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    processor = build_processor(config, tokenizer)
    images = saved_image_processor(name)
    if images is None:
        log.warning(
            "the vision tower %s has no preprocessor_config.json on this machine; CLIP's defaults are used", name
        )
    processor.image_processor = image_processor(config, settings, images, str(source))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return write


def _check_tensor(value: Tensor, expected: Tensor, place: str) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{place} has the data type {value.dtype}; quantized weights cannot be converted")
    if value.shape != expected.shape:
        empty = " (it was saved under DeepSpeed ZeRO-3 without gathering it)" if not value.numel() else ""
        raise ValueError(
            f"{place} has shape {tuple(value.shape)}{empty}, but config.json requires {tuple(expected.shape)}"
        )


def _tower_config(name: str, place: str) -> PreTrainedConfig:
    loaded = load_any_config(name, f"the vision tower {name} (--vision_tower)", offline=False)
    vision = getattr(loaded, "vision_config", loaded)
    check_clip(vision, f"{place}: the vision tower {name}")
    return vision


def hf_weights(weights: dict[str, Tensor], settings: dict[str, Any], tower: str, place: str) -> dict[str, Tensor]:
    """Original weights by Hugging Face names; an untrained vision tower comes from its published checkpoint."""
    known = (names.TEXT_KEYS, names.TOWER_KEYS, names.PROJECTOR_KEYS)
    weights = {name: value for name, value in weights.items() if not name.endswith(names.COMPUTED)}
    for name in sorted(weights):
        if not any(pattern.match(name) for pattern in known):
            raise ValueError(
                f"{place}: unknown tensor {name}; is this a LLaVA checkpoint, and is its LoRA adapter merged?"
            )
    projector = names.projector_to_hf(weights, place)
    kind = settings.get("mm_projector_type", "linear")
    if (kind == "linear") != ("model.mm_projector.weight" in weights):
        raise ValueError(
            f"{place}: mm_projector_type={kind!r} in config.json does not match the tensors of the projector"
        )
    if settings.get("mm_patch_merge_type", "flat") == "flat" and projector.pop("model.image_newline", None) is not None:
        log.info("%s: image_newline is left out, because mm_patch_merge_type=flat does not use it", place)
    others = {names.to_hf(n): v for n, v in weights.items() if not names.PROJECTOR_KEYS.match(n)}
    return {**others, **projector, **_tower_weights(others, settings, tower, place)}


def _tower_weights(weights: dict[str, Tensor], settings: dict[str, Any], tower: str, place: str) -> dict[str, Tensor]:
    """The vision tower that the original code would use: the checkpoint's if it was trained, else the published one."""
    saved = {name: value for name, value in weights.items() if name.startswith(names.TOWER)}
    if trains_tower(settings):
        if not saved:
            raise ValueError(
                f"{place}: config.json says that the vision tower was trained (unfreeze_mm_vision_tower), but the "
                "checkpoint has no vision-tower weights"
            )
        return saved
    published = _published_tower(tower)
    if isinstance(published, str):
        if saved:
            return saved
        raise ValueError(f"{place} has no vision tower, and {tower} cannot be read ({published}); set --vision_tower")
    if saved and _same(saved, published):
        return saved
    if saved:
        log.warning(
            "the vision tower in %s differs from %s, but config.json does not say that it was trained "
            "(unfreeze_mm_vision_tower): as in the original code, %s is used", place, tower, tower,
        )  # fmt: skip
    return published


def _published_tower(name: str) -> dict[str, Tensor] | str:
    """The weights of a published vision tower, named as in a LLaVA, or why they cannot be read."""
    check_weights(name, f"the vision tower {name}")
    try:
        weights = open_clip(name, "auto").state_dict()
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        return first_line(error)
    return {f"{names.TOWER}{key}": value for key, value in weights.items()}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two vision towers are equal in the data type of the first."""
    return one.keys() == two.keys() and all(
        one[name].shape == two[name].shape and torch.equal(one[name], two[name].to(one[name].dtype)) for name in one
    )


def _tokenizer(source: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: the tokenizer cannot be read ({first_line(error)})") from error
    add_image_token(tokenizer)
    side, length = settings.get("tokenizer_padding_side"), settings.get("tokenizer_model_max_length")
    if side is not None:
        tokenizer.padding_side = side
    if length is not None:
        tokenizer.model_max_length = length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _grow(weights: dict[str, Tensor], config: PreTrainedConfig, tokens: int) -> None:
    """Add embedding rows for ``<image>``, which the original code has outside its vocabulary: the mean of all rows."""
    rows = config.text_config.vocab_size
    if tokens <= rows:
        return
    size = -(-tokens // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    for name in names.EMBEDDINGS:
        if name in weights:
            mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(size - rows, -1)])
    config.text_config.vocab_size = size


def original_writer(source: str, tower: str | None, without_learned: bool) -> Callable[[Path], None]:
    """A function that writes a Hugging Face folder or a run in the format of the original code."""
    config = _llava_config(source)
    _check_learned(config, source, without_learned)
    processor = load_processor(source, config)
    tokenizer = processor.tokenizer
    settings = original_config(config, processor.image_processor, tower, source)
    name = settings["mm_vision_tower"]
    check_images(processor.image_processor, saved_image_processor(name), name, source)
    model = load_weights(source, "auto")
    state = model.state_dict()
    if not _tower_is(state, name):
        settings["unfreeze_mm_vision_tower"] = True  # else the original code would load the published one
    rows = settings["vocab_size"]  # the original code has none for <image>
    if more := [token for token, number in tokenizer.get_vocab().items() if number >= rows and token != IMAGE]:
        log.info("%s: the full vocabulary is kept because of tokens such as %s", source, more[0])
        settings["vocab_size"] = config.text_config.vocab_size
    linear = config.projector_hidden_act == "linear"
    weights = names.projector_to_original(state, linear)
    weights |= {names.to_original(name): value for name, value in state.items() if not name.startswith(names.PROJECTOR)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: settings["vocab_size"]].clone()
    settings["torch_dtype"] = str(weights["lm_head.weight"].dtype).removeprefix("torch.")

    def write(folder: Path) -> None:
        save_torch_state_dict(weights, folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def _tower_is(state: dict[str, Tensor], tower: str) -> bool:
    """Whether the vision tower equals the published one; false if that cannot be read."""
    published = _published_tower(tower)
    if isinstance(published, str):
        log.info(
            "the vision tower %s cannot be read here, so the model's is written as a trained one (%s)", tower, published
        )
        return False
    return _same({name: value for name, value in state.items() if name.startswith(names.TOWER)}, published)


def _check_learned(config: PreTrainedConfig, source: str, without_learned: bool) -> None:
    settings = getattr(config, CONFIG_KEY, None)
    if settings is not None and settings["method"] != NONE:
        log.warning(
            "%s: the original code does not support pruning, so the settings of %s are left out and the model will "
            "use all visual tokens there", source, settings["method"],
        )  # fmt: skip
    method = saved_learner(config, source)
    if method is None:
        return
    if not without_learned:
        raise ValueError(
            f"--to original: the format cannot store the learned parameters of {method.name} in {source}, and "
            "without them the model is less accurate; leave them out with --without_learned, or keep them with vtprune "
            "export"
        )
    log.warning(
        "%s: the learned parameters of %s are left out; the original format cannot store them", source, method.name
    )
