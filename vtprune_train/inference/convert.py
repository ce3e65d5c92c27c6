"""``vtprune convert``: checkpoints of the original LLaVA code to Hugging Face and back, and projectors alone."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vtprune_train.inference.chatting import load_processor, load_weights, model_config
from vtprune_train.inference.export import check_target, publish
from vtprune_train.models import original
from vtprune_train.models.build import (
    EMBEDDING_MULTIPLE,
    add_image_token,
    family_of_config,
    first_line,
    load_any_config,
    resolve_checkpoint,
)
from vtprune_train.models.learned import saved_learner
from vtprune_train.models.processors import build_processor
from vtprune_train.stream import IMAGE
from vtprune_train.training.manifest import check_export

log = logging.getLogger(__name__)

FORMS = ("hf", "original", "mm_projector", "projector")
KEPT = "original_llava"  # in config.json of a converted folder: the config that it came from
SELECT = {"patch": "default", "cls_patch": "full"}
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    help_text = (
        "a LLaVA folder of the original code, an mm_projector.bin, a run of this project, or a Hugging Face folder"
    )
    parser.add_argument("--model", required=True, metavar="PATH", help=help_text)
    parser.add_argument("--to", required=True, choices=FORMS, help="what to write")
    parser.add_argument("--out", required=True, metavar="PATH", help="a folder; for mm_projector a file")
    parser.add_argument("--vision_tower", metavar="DIR", help="CLIP tower; left out: the one that config.json names")
    help_text = "to original: leave out the parameters that the pruning method learned, for which it has no place"
    parser.add_argument("--without_learned", action="store_true", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the conversion.

    Raises:
        ValueError: what is wrong with an option or the checkpoint, or something there that must not be replaced.
    """
    source, out = resolve_checkpoint(arguments.model), Path(arguments.out)
    check_export(source)
    if arguments.to == "mm_projector":
        _write_mm_projector(source, out, arguments.force)
    else:
        check_target(out, source, arguments.force)
        publish(out, _writer(source, arguments.to, arguments.vision_tower, arguments.without_learned))
    log.info("%s is in %s", arguments.to, out)
    return 0


def _writer(source: str, form: str, tower: str | None, without_learned: bool) -> Callable[[Path], None]:
    if form == "projector":
        projector = _projector(source)[0]
        tensors = {name.removeprefix("model."): value.contiguous() for name, value in projector.items()}
        return lambda folder: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if Path(source).is_file():
        raise ValueError(f"--to {form}: {source} is a projector alone; --to projector makes what model.projector reads")
    if form == "hf" and not Path(source).is_dir():
        raise ValueError(f"--to hf: {source} is no folder here; download the checkpoint first")
    is_original = _original_config(source) is not None
    if form == "hf" and is_original:
        return hf_writer(Path(source), tower)
    if form == "original" and not is_original:
        return original_writer(source, tower, without_learned)
    raise ValueError(f"--to {form}: {source} is one already")


def _original_config(source: str) -> dict[str, Any] | None:
    """``config.json`` of a folder of the original code; ``None`` for others."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    return config if original.is_original(config) else None


def _projector(source: str) -> tuple[dict[str, Tensor], bool]:
    """Projector and ``image_newline`` by Hugging Face names, and whether it is a linear one.

    Raises:
        ValueError: there is none.
    """
    if Path(source).is_file():
        found = original.projector_to_hf(original.read_bin(Path(source)), source)
        return found, original.is_linear(found)
    if _original_config(source) is not None:
        found = original.projector_to_hf(original.read_weights(Path(source)), source)
        return found, original.is_linear(found)
    config = _llava_config(source)
    weights = load_weights(source, "auto").state_dict()
    own = family_of_config(config)[1].projector
    found = {name: value for name, value in weights.items() if name.startswith(own)}
    return found, config.projector_hidden_act == "linear"


def _llava_config(source: str) -> PreTrainedConfig:
    config = model_config(source)
    if not isinstance(config, LlavaConfig | LlavaNextConfig):
        raise ValueError(f"{source} holds a {config.model_type}; the original format is LLaVA's and LLaVA-NeXT's")
    return config


def _write_mm_projector(source: str, out: Path, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(f"--out {out} is there; name a file such as mm_projector.bin, or replace one with --force")
    projector, linear = _projector(source)
    if linear and not original.is_linear(projector):
        raise ValueError(f"{source}: two linear layers without GELU between them are no mm_projector")
    weights = original.projector_to_original(projector, linear)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    torch.save({name: value.clone() for name, value in weights.items()}, partial)
    partial.replace(out)


def hf_writer(source: Path, tower: str | None) -> Callable[[Path], None]:
    """Writes an original checkpoint as weights, config, tokenizer with ``<image>``, and processor.

    Raises:
        ValueError: a setting that transformers' classes do not have, a missing tower, missing or unexpected tensors.
    """
    settings = _original_config(str(source))
    assert settings is not None
    config = hf_config(settings, tower, str(source))
    name = tower or settings["mm_vision_tower"]
    weights = hf_weights(original.read_weights(source), settings, name, str(source))
    tokenizer = _tokenizer(source)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    _grow(weights, config, len(tokenizer))
    with torch.device("meta"):
        model = getattr(transformers, family_of_config(config)[0].model_class)(config)
    own = set(model.state_dict())
    if config.text_config.tie_word_embeddings and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    if missing := sorted(own - set(weights)):
        raise ValueError(f"{source}: {len(missing)} tensor(s) are missing, first {original.to_original(missing[0])}")
    if unexpected := sorted(set(weights) - own):
        raise ValueError(f"{source}: {original.to_original(unexpected[0])} has no place in a {config.model_type}")
    for key, value in model.state_dict().items():
        if value.shape != weights[key].shape:
            raise ValueError(
                f"{source}: {original.to_original(key)} has shape {tuple(weights[key].shape)}, config.json asks for "
                f"{tuple(value.shape)}"
            )
    model.load_state_dict(weights, assign=True)
    config.dtype = model.config.dtype = weights["lm_head.weight"].dtype
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    processor = build_processor(config, tokenizer)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return write


def hf_config(settings: dict[str, Any], tower: str | None, place: str) -> PreTrainedConfig:
    """The Hugging Face config for an original one, which is kept in it.

    Raises:
        ValueError: a setting that transformers' classes do not have, or no CLIP tower.
    """
    text_type = original.TEXT_TYPES.get(settings.get("model_type", ""))
    if text_type is None:
        known = ", ".join(original.TEXT_TYPES)
        raise ValueError(f"{place}: model_type={settings.get('model_type')!r} is not known; known: {known}")
    kind = settings.get("mm_projector_type", "linear")
    if kind not in original.PROJECTOR_TYPES:
        known = ", ".join(original.PROJECTOR_TYPES)
        raise ValueError(f"{place}: mm_projector_type={kind!r} has no counterpart in transformers; known: {known}")
    merge = settings.get("mm_patch_merge_type", "flat")
    if merge not in ("flat", "spatial_unpad"):
        raise ValueError(f"{place}: mm_patch_merge_type={merge!r} has no counterpart; known: flat, spatial_unpad")
    feature = settings.get("mm_vision_select_feature", "patch")
    if feature not in SELECT:
        raise ValueError(f"{place}: mm_vision_select_feature={feature!r} is not known; known: {', '.join(SELECT)}")
    vision = _tower_config(tower or settings.get("mm_vision_tower"), place)
    default = CONFIG_MAPPING[text_type]()
    own = {*default.to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "transformers_version"}
    text = CONFIG_MAPPING[text_type](**{key: value for key, value in settings.items() if key in own})
    shared: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": settings.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT[feature],
        "projector_hidden_act": "linear" if kind == "linear" else "gelu",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
        KEPT: settings,
    }
    if merge == "flat":
        return LlavaConfig(**shared)
    pinpoints = settings.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list):
        raise ValueError(f"{place}: image_grid_pinpoints={pinpoints!r} is no list of (height, width)")
    return LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)


def _tower_config(name: str | None, place: str) -> CLIPVisionConfig:
    if name is None:
        raise ValueError(f"{place}: config.json names no mm_vision_tower; give --vision_tower")
    loaded = load_any_config(name, f"the vision tower {name} (--vision_tower)", offline=False)
    vision = getattr(loaded, "vision_config", loaded)
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"{place}: the vision tower {name} is a {vision.model_type}; only CLIP towers are converted")
    return vision


def hf_weights(weights: dict[str, Tensor], settings: dict[str, Any], tower: str, place: str) -> dict[str, Tensor]:
    """Original weights by Hugging Face names; a tower that was not trained is taken from its own checkpoint.

    Raises:
        ValueError: a tensor that is not known, or no readable tower.
    """
    known = (original.TEXT_KEYS, original.TOWER_KEYS, original.PROJECTOR_KEYS)
    weights = {name: value for name, value in weights.items() if not name.endswith(original.COMPUTED)}
    for name in sorted(weights):
        if not any(pattern.match(name) for pattern in known):
            raise ValueError(f"{place}: the tensor {name} is not known; is this a LLaVA, and merged if it was a LoRA?")
    found = original.projector_to_hf(weights, place)
    if settings.get("mm_patch_merge_type", "flat") == "flat" and found.pop("model.image_newline", None) is not None:
        log.info("%s: image_newline is left out; mm_patch_merge_type flat does not use it", place)
    others = {original.to_hf(n): v for n, v in weights.items() if not original.PROJECTOR_KEYS.match(n)}
    if not any(name.startswith("model.vision_tower.") for name in others):
        try:
            loaded = CLIPVisionModel.from_pretrained(tower, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{place} holds no vision tower, and {tower} cannot be read ({first_line(error)}); give --vision_tower"
            ) from error
        others |= {f"model.vision_tower.{name}": value for name, value in loaded.state_dict().items()}
    return {**others, **found}


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no readable tokenizer there ({first_line(error)})") from error
    add_image_token(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _grow(weights: dict[str, Tensor], config: PreTrainedConfig, tokens: int) -> None:
    """Room for ``<image>``, which the original code keeps outside of its vocabulary: the mean of the other rows."""
    rows = config.text_config.vocab_size
    if tokens <= rows:
        return
    size = -(-tokens // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    for name in EMBEDDINGS:
        if name in weights:
            mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(size - rows, -1)])
    config.text_config.vocab_size = size


def original_writer(source: str, tower: str | None, without_learned: bool) -> Callable[[Path], None]:
    """Writes a Hugging Face folder, or a run, as the original code reads it.

    Raises:
        ValueError: it is no LLaVA, or nothing says which tower it has, or its pruning method learned parameters that
            are not to be left out.
    """
    config = _llava_config(source)
    _check_learned(config, source, without_learned)
    settings = original_config(config, tower, source)
    tokenizer = load_processor(source, config).tokenizer
    model = load_weights(source, "auto")
    state = model.state_dict()
    linear = config.projector_hidden_act == "linear"
    weights = original.projector_to_original(state, linear)
    weights |= {
        original.to_original(name): value
        for name, value in state.items()
        if not name.startswith(("model.multi_modal_projector.", "model.image_newline"))
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: settings["vocab_size"]].clone()
    settings["torch_dtype"] = str(weights["lm_head.weight"].dtype).removeprefix("torch.")

    def write(folder: Path) -> None:
        save_torch_state_dict(weights, folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def _check_learned(config: PreTrainedConfig, source: str, without_learned: bool) -> None:
    method = saved_learner(config)
    if method is None:
        return
    if not without_learned:
        raise ValueError(
            f"--to original: the format has no place for the parameters of {method.name} that {source} was trained "
            "with, and without them it is another, weaker model; --without_learned leaves them out all the same, and "
            "vtprune export keeps them"
        )
    log.warning("%s: the parameters of %s are left out, as the original code knows none", source, method.name)


def original_config(config: PreTrainedConfig, tower: str | None, place: str) -> dict[str, Any]:
    """``config.json`` of the original code: the one that was kept, or one made from the Hugging Face config.

    Raises:
        ValueError: nothing says which tower it has.
    """
    kept = getattr(config, KEPT, None)
    if kept is not None:
        return {**kept, **({"mm_vision_tower": tower} if tower else {})}
    if tower is None:
        raise ValueError(f"{place} does not say which CLIP tower it has; give --vision_tower, for example its hub id")
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    text_type = text["model_type"]
    types = {ours: theirs for theirs, ours in original.TEXT_TYPES.items() if theirs != "llava_llama"}
    if text_type not in types:
        raise ValueError(f"{place}: the original code has no LLaVA over a {text_type}; it has {', '.join(types)}")
    is_next = isinstance(config, LlavaNextConfig)
    select = {ours: theirs for theirs, ours in SELECT.items()}
    return {
        **{key: value for key, value in text.items() if value is not None},
        "architectures": [f"Llava{text_type.capitalize().removesuffix('2')}ForCausalLM"],
        "model_type": types[text_type],
        "rope_theta": rope.get("rope_theta", 10000.0),
        **({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}),
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": select[config.vision_feature_select_strategy],
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
        "image_aspect_ratio": "anyres" if is_next else "pad",
        **({"image_grid_pinpoints": [list(point) for point in config.image_grid_pinpoints]} if is_next else {}),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
