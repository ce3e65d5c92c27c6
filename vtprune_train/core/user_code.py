"""Imports user code that a setting names by its path: ``package.module:Name`` or ``path/to/file.py:Name``.

Every extension point goes through here: methods, callbacks, optimizers, schedules, data readers, attention backends and
families.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

IN_MODULE = "add the package's folder to PYTHONPATH, start in that folder, or give a file: path/to/file.py:Name"
IN_FILE = "install the missing package, or put the missing module into the folder of the file"
MACHINERY = (__file__, importlib.__file__)
# This package, the standard library and installed packages: their lines are not where a user looks first.
LIBRARIES = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))

_FILES: dict[str, str] = {}  # user-written path of each module loaded from a file


def is_path(name: str) -> bool:
    """Whether ``name`` is an import path rather than a built-in name."""
    return ":" in name


def load(path: str, key: str) -> Any:
    """Import the object at ``path`` (a class, function or any other object).

    A file's folder is appended to ``sys.path`` and the file is imported under its file name, like a module beside a
    script, so its classes can be pickled, and imported by processes started with ``spawn`` or ``forkserver``.

    Args:
        path: ``package.module:Name`` or ``path/to/file.py:Name``.
        key: the setting that holds ``path``, for errors.

    Raises:
        ValueError: the file or module does not exist or raises an exception at import (the message names file and
            line), another module already has that name, or the module does not define ``Name`` (the message suggests
            the closest one).
    """
    place, colon, attribute = path.rpartition(":")
    if not colon or not attribute:
        raise ValueError(f"{key}={path!r} is not a path; write package.module:Name or path/to/file.py:Name")
    if place.endswith(".py"):
        module = _load_file(place, path, key)
    else:
        module = _import(place, f"{key}={path!r}", IN_MODULE)
        _FILES.pop(place, None)
    if attribute not in vars(module) and not hasattr(module, attribute):
        raise ValueError(f"{key}={path!r}: {place} does not define {attribute}{_nearest(module, attribute)}")
    return getattr(module, attribute)


def load_class(path: str, base: type[T], key: str) -> type[T]:
    """Like :func:`load`, for a subclass of ``base``.

    Raises:
        ValueError: see :func:`load`; or ``path`` does not name a subclass of ``base``.
    """
    cls = load(path, key)
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ValueError(f"{key}={path!r} must be a subclass of {base.__name__}, but is {cls!r}")
    return cls


def loaded(path: str) -> Any:
    """Return the object at ``path`` if its module is already imported, else ``None``. Never executes code."""
    place, _, attribute = path.rpartition(":")
    if not place.endswith(".py"):
        module = sys.modules.get(place)
        return None if module is None else vars(module).get(attribute)
    file, module = Path(place).expanduser(), sys.modules.get(Path(place).stem)
    if module is None or getattr(module, "__file__", None) is None or not file.is_file():
        return None
    return vars(module).get(attribute) if Path(str(module.__file__)).samefile(file) else None


def path_of(cls: type) -> str:
    """Return the path to pass to :func:`load` for ``cls``; file paths are returned as the user wrote them."""
    return f"{_FILES.get(cls.__module__, cls.__module__)}:{cls.__qualname__}"


def _nearest(module: ModuleType, attribute: str) -> str:
    nearest = difflib.get_close_matches(attribute, vars(module), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _import(name: str, place: str, hint: str) -> ModuleType:
    """Import the module ``name``. Errors begin with ``place``; those of a missing module end with ``hint``."""
    try:
        return importlib.import_module(name)
    except SyntaxError as error:  # names file and line itself
        raise ValueError(f"{place} cannot be imported: {error}") from error
    except ImportError as error:
        raise ValueError(f"{place} cannot be imported{_line_of(error)}: {error}; {hint}") from error
    except Exception as error:
        raise ValueError(f"{place} cannot be imported{_line_of(error)}: {type(error).__name__}: {error}") from error


def _line_of(error: Exception) -> str:
    """File and line where the import failed, outside libraries if possible; empty if no module was executed."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [f for f in frames if f.filename not in MACHINERY and not f.filename.startswith("<frozen importlib")]
    frames = [f for f in frames if not f.filename.startswith(LIBRARIES)] or frames
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _load_file(place: str, path: str, key: str) -> ModuleType:
    file = Path(place).expanduser()
    if not file.is_file():
        raise ValueError(f"{key}={path!r}: file {place} does not exist in {Path.cwd()}; correct the path")
    if "." in file.stem:
        raise ValueError(
            f"{key}={path!r}: {file.name} cannot be imported, because a module name has no dots; rename it to "
            f"{file.stem.replace('.', '_')}.py"
        )
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    module = _import(file.stem, f"{key}={path!r}", IN_FILE)
    if module.__file__ is None or not Path(module.__file__).samefile(file):
        raise ValueError(
            f"{key}={path!r}: another module is already named {file.stem} ({module.__file__ or 'built in'}); rename "
            "the file"
        )
    _FILES[file.stem] = place
    return module
