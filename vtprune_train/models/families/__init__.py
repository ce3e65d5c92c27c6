"""Model families, one file each, which holds all that the project knows of it (:mod:`.base` says what that is)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig

from vtprune_train.models import HFModule
from vtprune_train.models.families import (
    internvl,
    known,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from vtprune_train.models.families.base import Family, Lacks, Loop
from vtprune_train.models.families.towers import check_clip

FAMILIES: tuple[Family, ...] = (
    llava_next.FAMILY,
    llava.FAMILY,
    llava_onevision.FAMILY,
    qwen2_vl.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
    internvl.FAMILY,
)

KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = dict(known.PARTS)
for _family in FAMILIES:
    KNOWN_CONFIGS.update(_family.known)

# Families that were looked at and do not fit, and why.
UNSUPPORTED = {
    "Gemma3ForConditionalGeneration": "its image tokens attend to each other in both directions, which the causal "
    "variable-length kernels do not do",
    "PaliGemmaForConditionalGeneration": "its prompt attends in both directions, which the causal variable-length "
    "kernels do not do",
    "MllamaForConditionalGeneration": "its images enter by cross-attention, so there are no visual tokens to drop",
}


def family_of(model: HFModule) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: the class, or the type of its language model, is not supported; says why and what is.
    """
    bases = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if family.model_class in bases:
            family.check(model)
            return family
    reason = UNSUPPORTED.get(type(model).__name__)
    if isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, DeepSpeed's engine, ...
        reason = "prune the model before it is wrapped"
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise ValueError(f"cannot prune a {type(model).__name__}{f': {reason}' if reason else ''}; supported: {supported}")


def family_of_type(model_type: str) -> Family | None:
    """The family of a config's ``model_type``; ``None`` where it is not supported."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def supported_family(model_type: str, place: str) -> Family:
    """The family of a config's ``model_type``.

    Raises:
        ValueError: it is not supported; names ``place``, where the config comes from, and what is.
    """
    if (family := family_of_type(model_type)) is None:
        supported = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"{place} holds a {model_type}, which is not supported; supported: {supported}")
    return family


def trained_family(model_type: str, place: str) -> tuple[Family, Loop]:
    """The family that the project's own loop trains under this config's ``model_type``.

    Raises:
        ValueError: there is none; names ``place``, where the model comes from, and what is trained.
    """
    family = family_of_type(model_type)
    if family is None or isinstance(family.loop, Lacks):
        trained = ", ".join(family.model_type for family in FAMILIES if not isinstance(family.loop, Lacks))
        raise ValueError(f"{place} holds a {model_type}, which the training loop does not know; it trains: {trained}")
    return family, family.loop


def config_of_parts(
    text: PreTrainedConfig, vision: PreTrainedConfig, pinpoints: Iterable[Iterable[int]] | None, place: str
) -> PreTrainedConfig:
    """A LLaVA-1.5 made of a language model and a tower; with ``pinpoints``, resolutions to tile by, a LLaVA-NeXT.

    Raises:
        ValueError: the tower, which ``place`` names, is not CLIP's.
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
