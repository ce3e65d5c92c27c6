"""A folder of weights, before it is opened: its files are tensors alone, and of the folder."""

from __future__ import annotations

import json
from pathlib import Path

from vtprune_train import pickles
from vtprune_train.parse import read_json_object


def check_weights(folder: str, place: str) -> None:
    """Look at the weights that transformers is about to read. A hub id passes, whose files are read by the restricted
    unpickler in any case.

    Args:
        folder: a folder or hub id.
        place: for errors.

    Raises:
        ValueError: an index names a file outside the folder, or a ``*.bin`` file or an adapter's settings name code.
    """
    check_adapter(Path(folder), place)
    for index in sorted(Path(folder).glob("*.index.json")):
        weight_map(index)
    if any(Path(folder).glob("*.safetensors")):  # which are read instead
        return
    for file in sorted(Path(folder).glob("*.bin")):
        try:
            pickles.check(file)
        except pickles.ForeignCodeError as error:
            raise ValueError(f"{place}: {error}") from error


def check_adapter(folder: Path, place: str) -> None:
    """Look at the settings that PEFT is about to read: it imports the module that ``megatron_core`` names.

    Raises:
        ValueError: they are damaged or name one.
    """
    file = folder / "adapter_config.json"
    if file.is_file() and read_json_object(file).get("megatron_config"):
        raise ValueError(
            f"{place}: {file} has megatron_config, for which PEFT imports code (megatron_core); set it to null"
        )


def weight_map(index: Path) -> dict[str, str]:
    """Which file of a folder holds a tensor, from its ``*.index.json``.

    Raises:
        ValueError: it is damaged, or names a file that is not of the folder.
    """
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        outside = sorted({name for name in files.values() if Path(name).name != name or name == ".."})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not JSON with a weight_map ({error}); copy it again") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]}, which is no file of its folder; copy it again")
    return files
