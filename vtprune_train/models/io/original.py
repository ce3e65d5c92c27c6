"""Reads files of original LLaVA checkpoints; :mod:`vtprune_train.models.families` interprets their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtprune_train.files import pickles
from vtprune_train.files.parse import read_json_object
from vtprune_train.models.families.llava_original import is_original, projector_to_hf
from vtprune_train.models.io.weight_files import weight_map

MM_PROJECTOR = "mm_projector.bin"  # only a projector, from stage 1 (tune_mm_mlp_adapter)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in ``*.safetensors`` or ``pytorch_model*.bin`` files.

    Raises:
        ValueError: there is no file, a file in the index is missing, a file is damaged, or two files have the same
            tensor.
    """
    for pattern, index, read in (
        ("*.safetensors", "model.safetensors.index.json", load_file),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json", read_bin),
    ):
        files = sorted(folder.glob(pattern))
        if (folder / index).is_file():
            named = set(weight_map(folder / index).values())
            if missing := sorted(named - {file.name for file in files}):
                raise ValueError(f"{folder}: {index} lists {missing[0]}, which is missing")
            files = [folder / name for name in sorted(named)]
        weights: dict[str, Tensor] = {}
        for file in files:
            try:
                tensors = read(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error})") from error
            if repeated := sorted(weights.keys() & tensors.keys()):
                raise ValueError(f"{file} contains {repeated[0]}, and so does another file; remove the outdated one")
            weights.update(tensors)
        if weights:
            return weights
    raise ValueError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, without executing any code in it.

    Raises:
        ValueError: the file is damaged, names code, or contains anything but named tensors.
    """
    loaded = pickles.read(file)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file} holds no dictionary of tensors")
    return loaded


def read_projector_file(file: Path, place: str) -> dict[str, Tensor]:
    """The projector in an ``mm_projector.bin``, by Hugging Face names.

    Raises:
        ValueError: see ``projector_to_hf``; or the file also contains trained embeddings.
    """
    weights = read_bin(file)
    if embeddings := [name for name in weights if "embed_tokens" in name or "embed_in" in name]:
        raise ValueError(
            f"{place}: {embeddings[0]} was trained with the projector (mm_use_im_start_end): the original code writes "
            "<im_start> and <im_end> around every image, which transformers' processors do not"
        )
    return projector_to_hf(weights, place)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read ``config.json`` if a folder is in the original format; ``None`` otherwise.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json_object(path)
    return config if is_original(config) else None
