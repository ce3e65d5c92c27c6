"""Finds the files that settings name: as a path, or in the package's ``configs/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtprune_train.config.errors import ConfigError, nearest_name
from vtprune_train.files.parse import read_json_object

_PACKAGE = Path(__file__).resolve().parents[1]
# The recipes are inside the package in a wheel, and next to it in a checkout.
PACKAGED_CONFIGS = next(path / "configs" for path in (_PACKAGE, _PACKAGE.parent) if (path / "configs").is_dir())
SETTINGS = (".yaml", ".yml", ".json")


def recipe_names() -> list[str]:
    """The recipes of the package, for ``--config``."""
    return sorted(path.name for path in PACKAGED_CONFIGS.glob("*.yaml"))


def find_file(name: str, key: str, beside: Path | None = None) -> Path:
    """Find a file that a setting names: in the folder of the file ``beside``, in the working folder, or in the
    package's ``configs/``, whose files may be named with or without ``configs/``.

    The file ``beside`` itself is found last, so that it can extend a file of the same name.

    Raises:
        ConfigError: it is in none of them; the message lists the package's files and suggests the nearest name.
    """
    folders = (
        *([] if beside is None else [beside.resolve().parent]),
        Path(),
        PACKAGED_CONFIGS,
        PACKAGED_CONFIGS.parent,
    )
    if found := [folder / name for folder in folders if (folder / name).is_file()]:
        return next((file for file in found if beside is None or not file.samefile(beside)), found[0])
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{key}: {name} is a folder; name a file in it")
    packaged = "deepspeed/*.json" if path.suffix == ".json" else "*.yaml"
    known = {file.name: file.relative_to(PACKAGED_CONFIGS.parent) for file in sorted(PACKAGED_CONFIGS.glob(packaged))}
    files = {**known, **{file.name: file for file in path.parent.glob("*.[jy]*") if file.suffix in SETTINGS}}
    nearest = nearest_name(path.name, (file for file in files if file in known or files[file].is_file()), 0.6)
    suggestion = f"; did you mean {files[nearest]}?" if nearest else ""
    raise ConfigError(
        f"{key}: {name} does not exist; the package has {', '.join(map(str, known.values()))}{suggestion}"
    )


def read_deepspeed(name: str) -> dict[str, Any]:
    """Read the JSON file that ``deepspeed`` names.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    path = find_file(name, "deepspeed")
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ConfigError(f"deepspeed: {error}") from error
