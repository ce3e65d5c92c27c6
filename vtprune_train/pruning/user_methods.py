"""Methods outside the package: named by ``package.module:Class`` or by ``path/to/file.py:Class``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "vtprune_train.pruning."
_FILES: dict[str, str] = {}  # of each module that was named by its file, the path as the user wrote it


def load_class(path: str) -> Any:
    """What ``path`` names, be it a class or not; ``None`` where the module has no such name.

    A file's folder joins the END of ``sys.path`` and the file is imported by its own name, as a script's neighbours
    are: so classes in it can be pickled, and found again by processes that are started rather than forked.

    Raises:
        ValueError: there is no such file or module, or another module has the file's name.
    """
    place, _, attribute = path.rpartition(":")
    if place.endswith(".py"):
        return getattr(_load_file(place, path), attribute, None)
    _FILES.pop(place, None)
    return getattr(_load_module(place, path), attribute, None)


def loaded_class(path: str) -> Any:
    """What :func:`load_class` gives where its module was imported already, by whomever; else ``None``. Runs nothing."""
    place, _, attribute = path.rpartition(":")
    if not place.endswith(".py"):
        module = sys.modules.get(place)
        return None if module is None else vars(module).get(attribute)
    file, module = Path(place).expanduser(), sys.modules.get(Path(place).stem)
    if module is None or getattr(module, "__file__", None) is None or not file.is_file():
        return None
    return vars(module).get(attribute) if Path(str(module.__file__)).samefile(file) else None


def names_beside(path: str) -> list[str]:
    """What else the module that ``path`` names defines, once :func:`load_class` has loaded it."""
    place = path.rpartition(":")[0]
    return list(vars(sys.modules[Path(place).stem if place.endswith(".py") else place]))


def _load_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        raise ValueError(f"method={path!r} cannot be imported: {error}") from error
    except ImportError as error:
        raise ValueError(
            f"method={path!r} cannot be imported: {error}; its folder must be the working folder's or in PYTHONPATH, "
            "or name a file: 'path/to/file.py:Class'"
        ) from error


def _load_file(place: str, path: str) -> ModuleType:
    file = Path(place).expanduser()
    if not file.is_file():
        raise ValueError(
            f"method={path!r}: there is no file {place} (seen from {Path.cwd()}); put it there, or name it where it is"
        )
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    module = _load_module(file.stem, path)
    if module.__file__ is None or not Path(module.__file__).samefile(file):
        raise ValueError(
            f"method={path!r}: another module is named {file.stem} ({module.__file__ or 'built in'}); rename the file"
        )
    _FILES[file.stem] = place
    return module


def method_name(cls: type) -> str:
    """What settings call a class: its name if the package has it, else the path that :func:`load_class` takes."""
    if cls.__module__.startswith(PACKAGE):
        return cls.name  # type: ignore[attr-defined]
    return f"{_FILES.get(cls.__module__, cls.__module__)}:{cls.__qualname__}"
