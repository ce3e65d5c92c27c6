"""Vision towers for tiles of one size (CLIP, SigLIP, InternVL's), shared by the LLaVA families and InternVL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import CLIPVisionConfig, CLIPVisionModel

from vtprune_train.core.flops import TowerGeometry

# Number of class tokens before the patches, for towers whose attention can be read.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def class_tokens(vision: Any) -> int:
    """Number of class tokens of a tower whose attention is read.

    Raises:
        ValueError: the tower is not one of :data:`CLASS_TOKENS`.
    """
    if vision.model_type not in CLASS_TOKENS:
        raise ValueError(f"reads the attention of {' and '.join(CLASS_TOKENS)} towers, not of a {vision.model_type}")
    return CLASS_TOKENS[vision.model_type]


def check_clip(vision: Any, place: str) -> None:
    """Check that a vision tower is CLIP's; ``place`` names it in the error.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"{place} is a {vision.model_type}; use a CLIP vision tower")


def open_clip(path: str, dtype: Any) -> CLIPVisionModel:
    """Load a CLIP vision tower from a checkpoint of the tower alone or of the full CLIP model."""
    return CLIPVisionModel.from_pretrained(path, dtype=dtype)


def feature_states(config: Any) -> list[int]:
    """Indices of the tower's hidden states that the projector reads; 0 is the input of the first layer."""
    layers = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return [state % states for state in ([layers] if isinstance(layers, int) else layers)]


def patch_grid(vision: Any) -> tuple[int, int]:
    """Rows and columns of patches in a tile."""
    sizes = np.broadcast_to(vision.image_size, 2), np.broadcast_to(vision.patch_size, 2)
    rows, columns = (int(size // patch) for size, patch in zip(*sizes, strict=True))
    return rows, columns


def tile_tower(config: Any) -> TowerGeometry:
    """Sizes of the tower and the projector of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision.

    Raises:
        ValueError: the tower is not one of :data:`CLASS_TOKENS`.
    """
    vision = config.vision_config
    if vision.model_type not in CLASS_TOKENS:
        raise ValueError(f"only {' and '.join(CLASS_TOKENS)} towers are counted, not a {vision.model_type}")
    return TowerGeometry(
        num_layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patches=int(np.prod(patch_grid(vision))),
        patch_size=vision.patch_size,
        projector_in=vision.hidden_size * len(feature_states(config)),
        projector_out=config.text_config.hidden_size,
        class_tokens=CLASS_TOKENS[vision.model_type],
        grid=patch_grid(vision),
        depth=min(feature_states(config)),
        heads=vision.num_attention_heads,
    )


@dataclass(frozen=True)
class SavedByTower:
    """Sizes of the activations that autograd saves for the backward pass of a tower and its projector, in elements of
    the activations' dtype unless noted; used by ``vtprune_train.training.memory.predict``.

    Args:
        layers: number of layers before the features.
        tokens: tokens per tile; 1 if the tower counts patches.
        hidden: width.
        intermediate: width of the MLP.
        elements: per layer and token.
        raw_bytes: bytes per layer and token that do not depend on the dtype (float32 statistics).
        projector: per token of the tower.
    """

    layers: int
    tokens: int
    hidden: int
    intermediate: int
    elements: int
    raw_bytes: int
    projector: int


def saved_by_tiles(config: Any) -> SavedByTower:
    """Activations that a CLIP or SigLIP tower of a LLaVA family saves."""
    vision, geometry, states = config.vision_config, tile_tower(config), feature_states(config)
    per_mlp = 3 if vision.hidden_act == "quick_gelu" else 2
    return SavedByTower(
        layers=max(states),
        tokens=geometry.patches + geometry.class_tokens,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        elements=8 * vision.hidden_size + per_mlp * vision.intermediate_size,
        raw_bytes=16 + 4 * vision.num_attention_heads,
        projector=len(states) * vision.hidden_size + 3 * config.text_config.hidden_size,
    )


def after_features(config: Any, name: str) -> bool:
    """Whether a parameter of the tower comes after the layer that gives the features, so that it gets no gradient."""
    if "post_layernorm" in name or ".head." in name:
        return True
    _, in_layer, rest = name.partition("encoder.layers.")
    return bool(in_layer) and int(rest.partition(".")[0]) >= max(feature_states(config))


def counted_by_patches(config: Any) -> dict[str, Any]:
    """Settings by which the processors of LLaVA-1.5 and LLaVA-NeXT count visual tokens."""
    vision = config.vision_config
    settings = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if vision.model_type in CLASS_TOKENS:
        settings["num_additional_image_tokens"] = CLASS_TOKENS[vision.model_type]
    return settings


def check_class_token_is_dropped(config: Any) -> None:
    """Check that a config drops the tower's class token.

    Raises:
        ValueError: it keeps the token.
    """
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported; "
            "LLaVA-NeXT and LLaVA-1.5 use 'default' (the class token is dropped)"
        )
