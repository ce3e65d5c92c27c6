"""Checkpoints of the original LLaVA code: how it names tensors and settings, and transformers' names for them.

Source: ``LlavaMetaModel``, ``CLIPVisionTower`` and ``build_vision_projector`` of the LLaVA repository. Names on the
Hugging Face side are those of a model in memory (``model.language_model.``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtprune_train.files import pickles
from vtprune_train.files.parse import read_json_object
from vtprune_train.models.io.weight_files import weight_map

TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
PROJECTOR_TYPES = ("mlp2x_gelu", "linear")
RENAMED = (  # original, Hugging Face
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
TEXT_KEYS = re.compile(r"^(lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\..+)$")
TOWER_KEYS = re.compile(r"^model\.vision_tower\.vision_tower\.vision_model\..+$")
PROJECTOR_KEYS = re.compile(r"^model\.(mm_projector\.((0|2)\.)?(weight|bias)|image_newline)$")
MM_PROJECTOR = "mm_projector.bin"  # a projector alone: stage 1, tune_mm_mlp_adapter
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # old versions saved them


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in ``*.safetensors`` or ``pytorch_model*.bin`` files.

    Raises:
        ValueError: there are none, one that the index names is missing, one is damaged, or a tensor stands in two.
    """
    for pattern, index, read in (
        ("*.safetensors", "model.safetensors.index.json", load_file),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json", read_bin),
    ):
        files = sorted(folder.glob(pattern))
        if (folder / index).is_file():
            named = set(weight_map(folder / index).values())
            if missing := sorted(named - {file.name for file in files}):
                raise ValueError(f"{folder}: {missing[0]} is missing, which {index} names")
            files = [folder / name for name in sorted(named)]
        weights: dict[str, Tensor] = {}
        for file in files:
            try:
                found = read(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error})") from error
            if again := sorted(weights.keys() & found.keys()):
                raise ValueError(f"{file} holds {again[0]}, as another file does; remove the one that is left over")
            weights.update(found)
        if weights:
            return weights
    raise ValueError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of ``torch.save``; nothing in it is executed.

    Raises:
        ValueError: it is damaged, names code, or holds something else than named tensors.
    """
    loaded = pickles.read(file)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file} holds no dictionary of tensors")
    return loaded


def projector_to_hf(weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The projector and ``image_newline`` among original weights, by Hugging Face names. A linear projector becomes
    two layers, the second of which changes nothing (its model needs ``projector_hidden_act`` linear).

    Raises:
        ValueError: there is no projector, or one of another shape than ``mlp2x_gelu`` and ``linear``, or its tensors do
            not fit together.
    """
    found = {_full(name): value for name, value in weights.items() if "mm_projector" in name or "image_newline" in name}
    others = sorted(name for name in found if not PROJECTOR_KEYS.match(name))
    if others:
        raise ValueError(f"{place}: {others[0]} is of no projector known here; known: {', '.join(PROJECTOR_TYPES)}")
    layers = {name for name in found if "mm_projector" in name}
    if layers == {"model.mm_projector.weight", "model.mm_projector.bias"}:
        weight, bias = found.pop("model.mm_projector.weight"), found.pop("model.mm_projector.bias")
        found |= {
            "model.mm_projector.0.weight": weight,
            "model.mm_projector.0.bias": bias,
            "model.mm_projector.2.weight": torch.eye(len(weight), dtype=weight.dtype),
            "model.mm_projector.2.bias": torch.zeros_like(bias),
        }
    elif layers != {f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}:
        raise ValueError(f"{place}: no whole projector there; found {sorted(layers) or 'nothing'}")
    _check_projector(found, place)
    return {to_hf(name): value for name, value in found.items()}


def read_projector_file(file: Path, place: str) -> dict[str, Tensor]:
    """The projector in an ``mm_projector.bin``, by Hugging Face names.

    Raises:
        ValueError: see :func:`projector_to_hf`; or the file holds trained embeddings too.
    """
    weights = read_bin(file)
    if embeddings := [name for name in weights if "embed_tokens" in name or "embed_in" in name]:
        raise ValueError(
            f"{place}: {embeddings[0]} was trained with the projector (mm_use_im_start_end): the original code writes "
            "<im_start> and <im_end> around every image, which transformers' processors do not"
        )
    return projector_to_hf(weights, place)


def _check_projector(found: Mapping[str, Tensor], place: str) -> None:
    first, last = (found[f"model.mm_projector.{layer}.weight"] for layer in (0, 2))
    rows = {
        "model.mm_projector.0.bias": first.shape[:1],
        "model.mm_projector.2.weight": (*last.shape[:1], *first.shape[:1]),
        "model.mm_projector.2.bias": last.shape[:1],
        "model.image_newline": last.shape[:1],
    }
    for name, value in found.items():
        if not value.is_floating_point():
            raise ValueError(f"{place}: {name} holds {value.dtype}; quantised weights are not converted")
        if not value.numel():
            raise ValueError(f"{place}: {name} is empty (it was saved under DeepSpeed ZeRO-3 without gathering it)")
        if tuple(value.shape) != tuple(rows.get(name, value.shape)):
            raise ValueError(f"{place}: {name} has shape {tuple(value.shape)}, which does not fit {tuple(rows[name])}")


def is_linear(projector: Mapping[str, Tensor]) -> bool:
    """Whether a projector by Hugging Face names has a second layer that changes nothing."""
    weight = projector["model.multi_modal_projector.linear_2.weight"]
    bias = projector["model.multi_modal_projector.linear_2.bias"]
    return torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any()


def projector_to_original(weights: Mapping[str, Tensor], linear: bool) -> dict[str, Tensor]:
    """Projector and ``image_newline`` among Hugging Face weights, by original names."""
    own = ("model.multi_modal_projector.", "model.image_newline")
    found = {to_original(name): value for name, value in weights.items() if name.startswith(own)}
    if not linear:
        return found
    newline = {name: value for name, value in found.items() if name == "model.image_newline"}
    parts = {f"model.mm_projector.{part}": found[f"model.mm_projector.0.{part}"] for part in ("weight", "bias")}
    return {**parts, **newline}


def to_hf(name: str) -> str:
    """The Hugging Face name of an original tensor."""
    return _renamed(name, [(ours, theirs) for ours, theirs in RENAMED])


def to_original(name: str) -> str:
    """The original name of a Hugging Face tensor."""
    return _renamed(name, [(theirs, ours) for ours, theirs in RENAMED])


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise ValueError(f"{name} is no tensor of a LLaVA")


def _full(name: str) -> str:
    """LoRA runs and old versions write other prefixes."""
    return "model." + name[name.index("mm_projector" if "mm_projector" in name else "image_newline") :]


def read_config(folder: Path) -> dict[str, Any] | None:
    """``config.json`` of a folder of the original code; ``None`` for others.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json_object(path)
    return config if is_original(config) else None


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is the original code's."""
    return "vision_config" not in config and ("mm_vision_tower" in config or "mm_projector_type" in config)
