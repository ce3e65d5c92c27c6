"""Model families, one small file each: which class it is, how long an image is, what else goes with its tokens."""

from __future__ import annotations

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vtprune_train.models import HFModule
from vtprune_train.models.families import (
    internvl,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from vtprune_train.models.families.base import Family, Loop

FAMILIES: tuple[Family, ...] = (
    llava_next.FAMILY,
    llava.FAMILY,
    llava_onevision.FAMILY,
    qwen2_vl.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
    internvl.FAMILY,
)

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
    """The family that transformers builds for a config's ``model_type``; ``None`` where it is not supported."""
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    return next((family for family in FAMILIES if family.model_class == model_class), None)


def trained_family(model_type: str, place: str) -> tuple[Family, Loop]:
    """The family that the project's own loop trains under this config's ``model_type``.

    Raises:
        ValueError: there is none; names ``place``, where the model comes from, and what is trained.
    """
    for family in FAMILIES:
        if family.loop is not None and family.loop.model_type == model_type:
            return family, family.loop
    trained = ", ".join(family.loop.model_type for family in FAMILIES if family.loop is not None)
    raise ValueError(f"{place} holds a {model_type}, which the training loop does not know; it trains: {trained}")


__all__ = ["FAMILIES", "UNSUPPORTED", "Family", "Loop", "family_of", "family_of_type", "trained_family"]
