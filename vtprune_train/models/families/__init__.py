"""Model families, one file each, and the list of them; :mod:`.base` describes what a family defines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from vtprune_train.core.user_code import load
from vtprune_train.models import HFModule
from vtprune_train.models.families import (
    internvl,
    known,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
)
from vtprune_train.models.families.base import Family, Lacks, Loop
from vtprune_train.models.families.towers import check_clip

FAMILIES: list[Family] = [
    llava_next.FAMILY,
    llava.FAMILY,
    llava_onevision.FAMILY,
    llava_next_video.FAMILY,
    qwen2_vl.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
    qwen3_vl_moe.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5_moe.FAMILY,
    internvl.FAMILY,
]
PACKAGED = tuple(FAMILIES)

KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = dict(known.PARTS)
for _family in FAMILIES:
    KNOWN_CONFIGS.update(_family.known)

OUTSIDE = "for a family outside the package, set model.family or --family: path/to/file.py:FAMILY"
# Models that do not fit, and why.
UNSUPPORTED = {
    "Gemma3ForConditionalGeneration": "its image tokens attend to each other in both directions, which the causal "
    "variable-length kernels do not support",
    "PaliGemmaForConditionalGeneration": "its prompt attends in both directions, which the causal variable-length "
    "kernels do not support",
    "MllamaForConditionalGeneration": "it feeds images through cross-attention, so there are no visual tokens to drop",
}


def register_family(family: Family | str, key: str = "family") -> Family:
    """Add a family from outside the package, so that its models can be pruned, trained and evaluated like those of the
    package.

    The family's file must also register its classes with transformers, unless transformers already has them:
    ``AutoConfig.register``, ``AutoModelForImageTextToText.register`` and ``AutoProcessor.register``.

    Args:
        family: the family, or its path ``path/to/file.py:FAMILY``. It replaces one registered earlier for the same
            ``model_type``.
        key: the setting or option that holds the path, for errors.

    Returns:
        The family.

    Raises:
        ValueError: the path cannot be loaded or does not name a :class:`~vtprune_train.models.families.base.Family`, or
            a family of the package has the same ``model_type`` or ``model_class``, or another family the same hub id
            in ``known``.
    """
    loaded = load(family, key) if isinstance(family, str) else family
    if not isinstance(loaded, Family):
        raise ValueError(f"{key}={family!r} is not a Family of vtprune_train.models.families.base, but {loaded!r}")
    for other in PACKAGED:
        if loaded.model_type == other.model_type or loaded.model_class == other.model_class:
            raise ValueError(
                f"{key}: model_type {loaded.model_type!r} or model_class {loaded.model_class!r} of {loaded.title} is "
                f"already used by {other.title}, a family of the package; rename it"
            )
    taken = dict(known.PARTS)
    for other in FAMILIES:
        if other.model_type != loaded.model_type:
            taken.update(other.known)
    # A family made by dataclasses.replace may keep the entries of the other one.
    if repeated := [name for name, config in loaded.known.items() if taken.get(name, config) is not config]:
        raise ValueError(
            f"{key}: known of {loaded.title} names {repeated[0]}, a checkpoint with another config already; remove it"
        )
    FAMILIES[:] = [other for other in FAMILIES if other.model_type != loaded.model_type] + [loaded]
    KNOWN_CONFIGS.update(loaded.known)
    return loaded


def family_of(model: HFModule) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: the class or the type of its language model is not supported; the message gives the reason and lists
            what is supported.
    """
    by_class = {family.model_class: family for family in FAMILIES}
    for cls in type(model).__mro__:
        if (family := by_class.get(cls.__name__)) is not None:
            family.check(model)
            return family
    reason = UNSUPPORTED.get(type(model).__name__)
    if isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, DeepSpeed's engine, ...
        reason = "call prune before wrapping the model (DistributedDataParallel, DeepSpeed, ...)"
    elif not type(model).__name__.endswith("ForConditionalGeneration"):
        reason = "pass the whole model, for example a LlavaNextForConditionalGeneration"
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise ValueError(
        f"cannot prune a {type(model).__name__}{f': {reason}' if reason else ''}; supported: {supported}, and families "
        "added with register_family"
    )


def family_of_type(model_type: str) -> Family | None:
    """The family of a config's ``model_type``; ``None`` if it is not supported."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def supported_family(model_type: str, place: str) -> Family:
    """The family of a config's ``model_type``.

    Raises:
        ValueError: it is not supported; the message names ``place`` (where the config comes from) and the supported
            types.
    """
    if (family := family_of_type(model_type)) is None:
        supported = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"{place} holds a {model_type}, which is not supported; supported: {supported}; {OUTSIDE}")
    return family


def trained_family(model_type: str, place: str) -> tuple[Family, Loop]:
    """The family of a config's ``model_type``, and its :class:`Loop`, which the training loop needs.

    Raises:
        ValueError: the training loop does not support it; the message names ``place`` (where the model comes from) and
            the supported types.
    """
    family = family_of_type(model_type)
    if family is None or isinstance(family.loop, Lacks):
        trained = ", ".join(family.model_type for family in FAMILIES if not isinstance(family.loop, Lacks))
        raise ValueError(
            f"{place} holds a {model_type}, which the training loop does not support; it supports: {trained}; {OUTSIDE}"
        )
    return family, family.loop


def class_of_config(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of a config's models.

    Raises:
        ValueError: it is not registered.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"transformers knows no image-text-to-text model for a {type(config).__name__}; call "
            f"AutoModelForImageTextToText.register({type(config).__name__}, ...) in the family's file"
        )
    cls: type[PreTrainedModel] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return cls


def config_of_parts(
    text: PreTrainedConfig, vision: PreTrainedConfig, pinpoints: Iterable[Iterable[int]] | None, place: str
) -> PreTrainedConfig:
    """Build the config of a model combined from a language model and a vision tower: LLaVA-1.5, or LLaVA-NeXT if its
    tiling resolutions ``pinpoints`` are set.

    Raises:
        ValueError: the tower is not CLIP's; ``place`` names it.
    """
    vision = getattr(vision, "vision_config", vision)
    check_clip(vision, place)
    shared = {
        "text_config": text,
        "vision_config": vision,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if pinpoints is None:
        return LlavaConfig(**shared)
    return LlavaNextConfig(image_grid_pinpoints=[list(point) for point in pinpoints], **shared)
