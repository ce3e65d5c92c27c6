"""Converts ``config.json`` between the original LLaVA code and transformers, setting by setting; settings without a
counterpart are refused.

Sources: ``llava/mm_utils.py``, ``llava/model/llava_arch.py``, ``llava/model/builder.py`` and
``multimodal_encoder/clip_encoder.py`` of haotian-liu/LLaVA, and the same files of LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import ast
import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vtprune_train.models.families.llava_original import PROJECTOR_TYPES, TEXT_TYPES

log = logging.getLogger(__name__)

KEPT = "original_llava"  # key in config.json of a converted folder: the original config
# Settings of an image processor, other than sizes, that affect pixels.
PIXELS = (
    *("image_mean", "image_std", "rescale_factor", "resample"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
)
SELECT = {"patch": "default", "cls_patch": "full"}
ANYRES, ONE_TILE = ("spatial_unpad", "anyres"), ("flat", "square", "pad")
# Settings that affect the model's input: the values that transformers' classes support, and why others are refused.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "mm_use_im_start_end": (
        (False,),
        "the original code writes <im_start> and <im_end> around every image, which transformers' processors do not",
    ),
    "s2": ((False,), "transformers does not support multi-scale towers (S2)"),
    "mm_resampler_type": ((None,), "transformers does not support a resampler between tower and projector"),
    "mm_vision_resampler": ((None,), "transformers does not support a resampler between tower and projector"),
    "quantization_config": ((None,), "quantized weights are not converted; save the model in half precision first"),
}
# Settings of training, of videos, or of image formats that are refused above.
WITHOUT_EFFECT = {
    *("add_faster_video", "add_time_instruction", "faster_token_stride", "force_sample", "freeze_mm_mlp_adapter"),
    *("freeze_mm_vision_resampler", "image_crop_resolution", "image_split_resolution", "max_sequence_length"),
    *("mm_hidden_size", "mm_newline_position", "mm_projector_lr", "mm_spatial_pool_mode", "mm_spatial_pool_stride"),
    *("mm_spatial_pool_out_channels", "mm_tunable_parts", "mm_use_im_patch_token", "mm_vision_tower_lr"),
    *("pos_skipping_range", "pretraining_tp", "tokenizer_model_max_length", "tokenizer_padding_side"),
    *("tune_mm_mlp_adapter", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_mm_proj"),
    *("use_pos_skipping", "vision_tower_pretrained"),
}
READ = {
    *("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type", "mm_projector_type"),
    *("mm_vision_select_feature", "mm_vision_select_layer", "mm_vision_tower", "vision_tower"),
}
AFFECTS_INPUT = ("mm_", "image_", "vision", "s2")  # prefixes of unknown settings that are refused
COSMETIC = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}


def hf_config(settings: dict[str, Any], vision: CLIPVisionConfig, place: str) -> PreTrainedConfig:
    """Convert an original config to a Hugging Face config, which also stores the original.

    Args:
        settings: the original config.
        vision: config of the vision tower.
        place: the checkpoint, for errors.

    Raises:
        ValueError: a setting has no counterpart in transformers or does not fit the tower; the message names it.
    """
    text_type = settings.get("model_type")
    if text_type not in TEXT_TYPES:
        raise ValueError(f"{place}: model_type={text_type!r} is not known; known: {', '.join(TEXT_TYPES)}")
    kind = _one_of(settings, "mm_projector_type", "linear", PROJECTOR_TYPES, place)
    feature = _one_of(settings, "mm_vision_select_feature", "patch", SELECT, place)
    is_next = _is_next(settings, place)
    if is_next and feature != "patch":
        raise ValueError(
            f"{place}: mm_vision_select_feature={feature!r} is not supported with tiles, also by the original code"
        )
    default = CONFIG_MAPPING[TEXT_TYPES[text_type]]()
    text_keys = ({*default.to_dict()} | {"rope_theta", "rope_scaling", "head_dim"}) - COSMETIC
    _check_others(settings, text_keys | {*default.to_dict()}, place)
    if settings.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"{place}: mm_hidden_size={settings['mm_hidden_size']}, but the vision tower's hidden_size is "
            f"{vision.hidden_size}; pass the tower that the model was trained with as --vision_tower"
        )
    _check_rope(settings, place)
    # A copy, because transformers modifies the rope settings.
    text_settings = copy.deepcopy({key: value for key, value in settings.items() if key in text_keys})
    try:
        text = type(default)(**text_settings)
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{place}: transformers refuses a setting of config.json: {reason}") from error
    shared: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": _select_layer(settings, vision, place),
        "vision_feature_select_strategy": SELECT[feature],
        "projector_hidden_act": "linear" if kind == "linear" else "gelu",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
        KEPT: settings,
    }
    if not is_next:
        return LlavaConfig(**shared)
    return LlavaNextConfig(image_grid_pinpoints=pinpoints_to_hf(settings, vision.image_size, place), **shared)


def _one_of(settings: Mapping[str, Any], key: str, default: str, known: Any, place: str) -> str:
    value = settings.get(key, default)
    if value not in known:
        raise ValueError(f"{place}: {key}={value!r} has no counterpart in transformers; known: {', '.join(known)}")
    return value


def _is_next(settings: Mapping[str, Any], place: str) -> bool:
    """Whether images are tiled as in LLaVA-NeXT; ``False`` for one tile per image, as in LLaVA-1.5."""
    merge, aspect = settings.get("mm_patch_merge_type") or "flat", settings.get("image_aspect_ratio") or "square"
    if (merge, aspect) == ANYRES:
        return True
    if merge == ONE_TILE[0] and aspect in ONE_TILE[1:]:
        return False
    wrong = f"mm_patch_merge_type={merge!r}"
    if merge in (ANYRES[0], ONE_TILE[0]):
        wrong = f"image_aspect_ratio={aspect!r} with {wrong}"
    raise ValueError(
        f"{place}: {wrong} has no counterpart in transformers; known: spatial_unpad with anyres (LLaVA-NeXT), flat "
        "with pad or square (LLaVA-1.5)"
    )


def _select_layer(settings: Mapping[str, Any], vision: CLIPVisionConfig, place: str) -> int:
    layer, layers = settings.get("mm_vision_select_layer"), vision.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise ValueError(
            f"{place}: mm_vision_select_layer={layer!r} is not a layer of the vision tower, which has {layers}; the "
            "original code needs an integer here (-2 in LLaVA-1.5 and LLaVA-NeXT)"
        )
    return layer


def _check_rope(settings: Mapping[str, Any], place: str) -> None:
    scaling = settings.get("rope_scaling") or {}
    kind, known = scaling.get("rope_type", scaling.get("type")), ("default", *ROPE_INIT_FUNCTIONS)
    if scaling and kind not in known:
        raise ValueError(f"{place}: rope_scaling={scaling} has none of the types {', '.join(known)}")


def _check_others(settings: Mapping[str, Any], text: set[str], place: str) -> None:
    """Refuse settings whose effect the conversion would lose; warn of unknown ones."""
    for key, (values, reason) in ONLY.items():
        value = settings.get(key, values[0])
        if value is not None and value not in values:
            raise ValueError(f"{place}: {key}={value!r} cannot be converted: {reason}")
    others = set(settings) - text - WITHOUT_EFFECT - READ - set(ONLY) - COSMETIC
    others = {key for key in others if settings[key] not in (None, False)}
    for key in sorted(others):
        if key.startswith(AFFECTS_INPUT):
            raise ValueError(
                f"{place}: {key}={settings[key]!r} is unknown and may change the model's input; remove it from "
                "config.json if it does not"
            )
    if others:
        log.warning("%s: unknown settings are kept but not used: %s", place, ", ".join(sorted(others)))


def pinpoints_to_hf(settings: Mapping[str, Any], tile: int, place: str) -> list[list[int]]:
    """``image_grid_pinpoints`` as ``[height, width]`` in pixels; the original code has ``(width, height)``.

    The original value may also be a list as a string, or a range of tile counts ``(columns x rows)`` such as
    ``(1x1),...,(6x6)``.

    Raises:
        ValueError: it is none of these, or not a multiple of the tile size.
    """
    value = points = settings.get("image_grid_pinpoints")
    if isinstance(points, str) and (tiles := re.findall(r"\((\d+)x(\d+)\)", points)):
        (first_column, first_row), (last_column, last_row) = ([int(count) for count in tiles[end]] for end in (0, -1))
        points = [
            (columns * tile, rows * tile)
            for columns in range(first_column, last_column + 1)
            for rows in range(first_row, last_row + 1)
        ]
    elif isinstance(points, str):
        try:
            points = ast.literal_eval(points)
        except (ValueError, SyntaxError):
            points = None
    if not isinstance(points, list | tuple) or not points or not all(_is_pair(point) for point in points):
        raise ValueError(f"{place}: image_grid_pinpoints={value!r} is not a list of (width, height) in pixels")
    wrong = [list(point) for point in points if point[0] % tile or point[1] % tile]
    if wrong:
        raise ValueError(f"{place}: image_grid_pinpoints {wrong} are not multiples of the tower's image_size {tile}")
    return [[height, width] for width, height in points]


def _is_pair(point: Any) -> bool:
    return isinstance(point, list | tuple) and len(point) == 2 and all(isinstance(n, int) and n > 0 for n in point)


def image_processor(config: PreTrainedConfig, settings: Mapping[str, Any], tower: Any, place: str) -> Any:
    """The image processor that gives the same pixels as the original code.

    Args:
        config: the Hugging Face config.
        settings: the original config.
        tower: the tower's image processor, whose settings the original code uses; ``None`` for CLIP's defaults.
        place: the checkpoint, for errors.

    Raises:
        ValueError: the tower's image processor produces images of a different size than the tower takes.
    """
    tile = config.vision_config.image_size
    numbers: dict[str, Any] = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    if tower is not None:
        crop = getattr(tower, "crop_size", None) or {}
        sizes = [tower.size.get("shortest_edge"), crop.get("height"), crop.get("width")]
        if sizes != [tile] * 3:
            raise ValueError(
                f"{place}: the tower's preprocessor_config.json produces images of {sizes}, but the tower takes "
                f"{tile} x {tile}"
            )
        numbers |= {name: getattr(tower, name) for name in PIXELS}
    if isinstance(config, LlavaNextConfig):
        return LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **numbers)
    if settings.get("image_aspect_ratio") == "pad":
        return LlavaImageProcessorPil(do_pad=True, **numbers)
    return CLIPImageProcessorPil(**numbers)


def check_images(images: Any, published: Any, tower: str, place: str) -> None:
    """Check that an image processor has the settings of the tower's image processor, which the original code uses.

    Raises:
        ValueError: a setting differs; the message names it.
    """
    published = published or CLIPImageProcessorPil()
    for name in PIXELS:
        value, expected = (getattr(processor, name, None) for processor in (images, published))
        value, expected = (list(v) if isinstance(v, list | tuple) else v for v in (value, expected))
        if value != expected:
            raise ValueError(
                f"{place}: its image processor has {name}={value}, but the original code uses {tower}'s, "
                f"{expected}. Pass as --vision_tower a folder of this tower whose preprocessor_config.json has {value}"
            )


def trains_tower(settings: Mapping[str, Any]) -> bool:
    """Whether the original code loads the tower's weights from the checkpoint instead of from ``mm_vision_tower``."""
    parts = str(settings.get("mm_tunable_parts") or "").split(",")
    return bool(settings.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in parts


def original_config(config: PreTrainedConfig, images: Any, tower: str | None, place: str) -> dict[str, Any]:
    """Convert a Hugging Face config to the original format: the stored original config with later changes, or a new
    one.

    Args:
        config: the Hugging Face config.
        images: its image processor.
        tower: folder or hub id of the CLIP tower; required if no conversion recorded it.
        place: the checkpoint, for errors.

    Raises:
        ValueError: the tower is unknown, or a setting has no counterpart in the original code; the message names it.
    """
    made = _made(config, images, place)
    kept = getattr(config, KEPT, None)
    if kept is None:
        if tower is None:
            raise ValueError(f"{place} does not record its CLIP tower; pass --vision_tower, for example its hub id")
        return {**made, "mm_vision_tower": tower}
    before = hf_config(kept, config.vision_config, place)
    earlier = _made(before, image_processor(before, kept, None, place), place)
    changed = {key: value for key, value in made.items() if earlier.get(key) != value and key not in COSMETIC}
    changed.pop("vocab_size", None)  # larger because of <image>
    return {**kept, **changed, **({"mm_vision_tower": tower} if tower else {})}


def _made(config: PreTrainedConfig, images: Any, place: str) -> dict[str, Any]:
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    text_type = text["model_type"]
    types = {hf: original for original, hf in TEXT_TYPES.items() if original != "llava_llama"}
    if text_type not in types:
        raise ValueError(f"{place}: the original code has no LLaVA based on a {text_type}; it has {', '.join(types)}")
    _check_original_has(config, place)
    is_next = isinstance(config, LlavaNextConfig)
    strategies = {hf: original for original, hf in SELECT.items()}
    padded = "pad" if getattr(images, "do_pad", None) else "square"
    pinpoints = [[width, height] for height, width in config.image_grid_pinpoints] if is_next else None
    return {
        **{key: value for key, value in text.items() if value is not None},
        "architectures": [f"Llava{text_type.capitalize().removesuffix('2')}ForCausalLM"],
        "model_type": types[text_type],
        "rope_theta": rope.get("rope_theta", 10000.0),
        **_rope_scaling(rope),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": strategies[config.vision_feature_select_strategy],
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
        "image_aspect_ratio": "anyres" if is_next else padded,
        **({"image_grid_pinpoints": pinpoints} if is_next else {}),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` in the format of the transformers version of the original code."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind in ("linear", "dynamic"):
        return {"rope_scaling": {"type": kind, "factor": rope["factor"]}}
    return {"rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"}}


def _check_original_has(config: PreTrainedConfig, place: str) -> None:
    wrong = None
    if not isinstance(config.vision_config, CLIPVisionConfig):
        wrong = f"a {config.vision_config.model_type} as its vision tower; it has CLIP's"
    elif config.projector_hidden_act not in ("gelu", "linear"):
        wrong = f"projector_hidden_act={config.projector_hidden_act!r}; it has gelu and linear"
    elif not getattr(config, "multimodal_projector_bias", True):
        wrong = "a projector without bias"
    elif not isinstance(config.vision_feature_layer, int):
        wrong = f"vision_feature_layer={config.vision_feature_layer}; it takes one layer's features"
    if wrong:
        raise ValueError(f"{place}: the original code has no {wrong}")
