"""Names of tensors in the original LLaVA code and in transformers.

Source: ``LlavaMetaModel``, ``CLIPVisionTower`` and ``build_vision_projector`` of the LLaVA repository. Hugging Face
names are those of a model in memory (``model.language_model.``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TOWER = "model.vision_tower."  # Hugging Face
PROJECTOR = ("model.multi_modal_projector.", "model.image_newline")
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
PROJECTOR_TYPES = ("mlp2x_gelu", "linear")
RENAMED = (  # original, Hugging Face
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
TEXT_KEYS = re.compile(r"^(lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\..+)$")
TOWER_KEYS = re.compile(r"^model\.vision_tower\.vision_tower\.vision_model\..+$")
PROJECTOR_KEYS = re.compile(r"^model\.(mm_projector\.((0|2)\.)?(weight|bias)|image_newline)$")
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that old versions saved


def projector_to_hf(weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The projector and ``image_newline`` in original weights, by Hugging Face names. A linear projector becomes two
    layers of which the second is the identity (the model needs ``projector_hidden_act`` linear).

    Raises:
        ValueError: there is no projector, its type is neither ``mlp2x_gelu`` nor ``linear``, or its tensors do not fit
            together.
    """
    # LoRA runs and old versions use other prefixes.
    names = {name: re.search(r"(mm_projector|image_newline).*", name) for name in weights}
    projector = {f"model.{match[0]}": weights[name] for name, match in names.items() if match}
    others = sorted(name for name in projector if not PROJECTOR_KEYS.match(name))
    if others:
        raise ValueError(
            f"{place}: {others[0]} does not belong to a known projector type; known: {', '.join(PROJECTOR_TYPES)}"
        )
    layers = {name for name in projector if "mm_projector" in name}
    if layers == {"model.mm_projector.weight", "model.mm_projector.bias"}:
        weight, bias = projector.pop("model.mm_projector.weight"), projector.pop("model.mm_projector.bias")
        projector |= {
            "model.mm_projector.0.weight": weight,
            "model.mm_projector.0.bias": bias,
            "model.mm_projector.2.weight": torch.eye(len(weight), dtype=weight.dtype),
            "model.mm_projector.2.bias": torch.zeros_like(bias),
        }
    elif layers != {f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}:
        raise ValueError(f"{place}: no complete projector there; found {sorted(layers) or 'nothing'}")
    _check_projector(projector, place)
    return {to_hf(name): value for name, value in projector.items()}


def _check_projector(projector: Mapping[str, Tensor], place: str) -> None:
    """Check dtypes and shapes of a projector by original names."""
    first, last = (projector[f"model.mm_projector.{layer}.weight"] for layer in (0, 2))
    rows = {
        "model.mm_projector.0.bias": first.shape[:1],
        "model.mm_projector.2.weight": (*last.shape[:1], *first.shape[:1]),
        "model.mm_projector.2.bias": last.shape[:1],
        "model.image_newline": last.shape[:1],
    }
    for name, value in projector.items():
        if not value.is_floating_point():
            raise ValueError(f"{place}: {name} holds {value.dtype}; quantized weights are not converted")
        if not value.numel():
            raise ValueError(f"{place}: {name} is empty (it was saved under DeepSpeed ZeRO-3 without gathering it)")
        if tuple(value.shape) != tuple(rows.get(name, value.shape)):
            raise ValueError(f"{place}: {name} has shape {tuple(value.shape)}, which does not fit {tuple(rows[name])}")


def is_linear(projector: Mapping[str, Tensor]) -> bool:
    """Whether the second layer of a projector by Hugging Face names is the identity."""
    weight = projector["model.multi_modal_projector.linear_2.weight"]
    bias = projector["model.multi_modal_projector.linear_2.bias"]
    return torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any()


def projector_to_original(weights: Mapping[str, Tensor], linear: bool) -> dict[str, Tensor]:
    """The projector and ``image_newline`` in Hugging Face weights, by original names."""
    projector = {to_original(name): value for name, value in weights.items() if name.startswith(PROJECTOR)}
    if not linear:
        return projector
    newline = {name: value for name, value in projector.items() if name == "model.image_newline"}
    parts = {f"model.mm_projector.{part}": projector[f"model.mm_projector.0.{part}"] for part in ("weight", "bias")}
    return {**parts, **newline}


def to_hf(name: str) -> str:
    """The Hugging Face name of an original tensor."""
    return _renamed(name, list(RENAMED))


def to_original(name: str) -> str:
    """The original name of a Hugging Face tensor."""
    return _renamed(name, [(hf, original) for original, hf in RENAMED])


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise ValueError(f"{name} is not a tensor of a LLaVA")


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is in the format of the original code."""
    return "vision_config" not in config and ("mm_vision_tower" in config or "mm_projector_type" in config)
