"""Checks a folder of weights before it is loaded: files contain only tensors, and all of them are in the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune_train.files import pickles
from vtprune_train.files.parse import read_json_object

ATTENTION = "attn_implementation"  # key in a config or one of its sections, also with leading or trailing underscores


def check_weights(folder: str, place: str) -> None:
    """Check the weights that transformers will load. Hub ids are not checked: the restricted unpickler reads their
    files.

    Raises:
        ValueError: an index names a file outside the folder, or a weight file or adapter settings name code.
    """
    check_adapter(Path(folder), place)
    for file in _weights_files(Path(folder)):
        try:
            if pickles.may_hold_pickles(file):
                pickles.check(file)
        except pickles.ForeignCodeError as error:
            raise ValueError(f"{place}: {error}") from error


def _weights_files(folder: Path) -> list[Path]:
    """All files that transformers or PEFT may load weights from."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    for index in sorted(folder.glob("*.index.json")):
        files |= {folder / name for name in weight_map(index).values()}
    config = folder / "config.json"
    named = read_json_object(config).get("transformers_weights") if config.is_file() else None
    if isinstance(named, str):
        files.add(folder / named)
    return sorted(file for file in files if file.is_file())


def hub_kernels(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Attention kernels of the hub that a model's config names, as ``(key, value)``; ``a.b`` is ``b`` in the section
    ``a``. Names of attention functions in transformers and in this package have no slash."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from hub_kernels(value, f"{key}.{name}" if key else name)
    elif isinstance(content, list):
        for value in content:
            yield from hub_kernels(value, key)
    elif isinstance(content, str) and "/" in content and ATTENTION in key:
        yield key.rstrip("."), content


def check_adapter(folder: Path, place: str) -> None:
    """Check the settings that PEFT will read: it imports the module that ``megatron_core`` names.

    Raises:
        ValueError: the settings are damaged or name such a module.
    """
    file = folder / "adapter_config.json"
    if file.is_file() and read_json_object(file).get("megatron_config"):
        raise ValueError(
            f"{place}: {file} has megatron_config, for which PEFT imports code (megatron_core); set it to null"
        )


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor in a folder, from its ``*.index.json``.

    Raises:
        ValueError: the index is damaged, or names a file outside the folder.
    """
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        outside = sorted({name for name in files.values() if Path(name).name != name or name == ".."})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not JSON with a weight_map ({error}); copy it again") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]}, which is not a file of its folder; copy it again")
    return files
