"""Finds the files that settings name: as a path, or in the package's ``configs/``."""

from __future__ import annotations

from pathlib import Path

from vtprune_train.config.errors import ConfigError, nearest_name

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the recipes lie in the package, in a checkout beside it.
PACKAGED_CONFIGS = next(path / "configs" for path in (_PACKAGE, _PACKAGE.parent) if (path / "configs").is_dir())
SETTINGS = (".yaml", ".yml", ".json")


def find_file(name: str, key: str) -> Path:
    """``name`` as it is, or in ``configs/`` of the project.

    Raises:
        ConfigError: it is in neither place.
    """
    for candidate in (Path(name), PACKAGED_CONFIGS / name, PACKAGED_CONFIGS.parent / name):
        if candidate.is_file():
            return candidate
    asked = Path(name)
    if asked.is_dir():
        raise ConfigError(f"{key}: {name} is a folder; name a file in it")
    packaged = "deepspeed/*.json" if asked.suffix == ".json" else "*.yaml"
    known = {path.name: path.relative_to(PACKAGED_CONFIGS.parent) for path in sorted(PACKAGED_CONFIGS.glob(packaged))}
    files = {**known, **{path.name: path for path in asked.parent.glob("*.[jy]*") if path.suffix in SETTINGS}}
    nearest = nearest_name(asked.name, (name for name in files if name in known or files[name].is_file()), 0.6)
    meant = f"; did you mean {files[nearest]}?" if nearest else ""
    raise ConfigError(
        f"{key}: {name} is neither here nor in {PACKAGED_CONFIGS.name}/ (there: {', '.join(known)}){meant}"
    )
