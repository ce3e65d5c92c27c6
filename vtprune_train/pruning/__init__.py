"""The methods, one file each, and their registry."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vtprune_train.core.user_code import load_class, loaded
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vtprune_train.pruning.setting_types import setting_types

log = logging.getLogger(__name__)

CONFIG_KEY = "pruning"  # key in a model's config
NONE = "none"
SAVED: Literal["saved"] = "saved"  # use the checkpoint's saved method, if any
METHODS: dict[str, str] = {
    "pyramiddrop": "vtprune_train.pruning.methods.pyramiddrop:PyramidDrop",
    "sparsevlm": "vtprune_train.pruning.methods.sparsevlm:SparseVLM",
    "plphp": "vtprune_train.pruning.methods.plphp:PLPHP",
    "fastv": "vtprune_train.pruning.methods.fastv:FastV",
    "dart": "vtprune_train.pruning.methods.dart:DART",
    "feather": "vtprune_train.pruning.methods.feather:Feather",
    "prumerge": "vtprune_train.pruning.methods.prumerge:PruMerge",
    "fopru": "vtprune_train.pruning.methods.fopru:FoPru",
    "vtc_cls": "vtprune_train.pruning.methods.vtc_cls:VTCCLS",
    "visionzip": "vtprune_train.pruning.methods.visionzip:VisionZip",
    "divprune": "vtprune_train.pruning.methods.divprune:DivPrune",
    "cdpruner": "vtprune_train.pruning.methods.cdpruner:CDPruner",
    "scope": "vtprune_train.pruning.methods.scope:SCOPE",
    "hiprune": "vtprune_train.pruning.methods.hiprune:HiPrune",
    "vispruner": "vtprune_train.pruning.methods.vispruner:VisPruner",
    "idpruner": "vtprune_train.pruning.methods.idpruner:IDPruner",
    "evs": "vtprune_train.pruning.methods.evs:EVS",
    "vidcom2": "vtprune_train.pruning.methods.vidcom2:VidCom2",
    "dycoke": "vtprune_train.pruning.methods.dycoke:DyCoke",
    "prunevid": "vtprune_train.pruning.methods.prunevid:PruneVid",
    "videollm_mod": "vtprune_train.pruning.methods.videollm_mod:VideoLLMMoD",
    "victor": "vtprune_train.pruning.methods.victor:Victor",
    "voco": "vtprune_train.pruning.methods.voco:VoCo",
    "hidrop": "vtprune_train.pruning.methods.hidrop:HiDrop",
    "lvlm_csp": "vtprune_train.pruning.methods.lvlm_csp:LVLMCSP",
    "zipvl": "vtprune_train.pruning.methods.zipvl:ZipVL",
    "prefix": "vtprune_train.pruning.methods.prefix:Prefix",
    "random": "vtprune_train.pruning.methods.random_tokens:Random",
    "uniform": "vtprune_train.pruning.methods.uniform:Uniform",
    "pool": "vtprune_train.pruning.methods.pool:Pool",
}


def method_class(name: str) -> type[PruningMethod]:
    """Return the class of a method, by its name in :data:`METHODS` or by its import path, ``package.module:Class`` or
    ``path/to/file.py:Class``.

    Raises:
        ValueError: the name is unknown or the path does not point to a pruning method; the message lists the known
            methods.
    """
    path = METHODS.get(name, name)
    if name == SAVED:
        raise ValueError(
            f"method={SAVED!r} means the method that a checkpoint was saved with and only works alone, as in "
            f"prune(model, {SAVED!r}); here, use one of {', '.join(METHODS)}, {NONE}"
        )
    if ":" not in path:
        nearest = difflib.get_close_matches(name.lower(), (*METHODS, NONE, SAVED), n=1)
        raise ValueError(
            f"method={name!r} is unknown; {f'did you mean {nearest[0]}? ' if nearest else ''}known methods: "
            f"{', '.join(METHODS)}, {NONE}; for a custom method, pass its path, 'package.module:Class' or "
            "'path/to/file.py:Class'"
        )
    return load_class(path, PruningMethod, "method")


def method_from_settings(settings: Mapping[str, Any]) -> PruningMethod | None:
    """Build a method from plain data (YAML, a checkpoint's ``config.json``); ``method: none`` returns ``None``; a list
    of names or mappings returns a combination.

    Raises:
        ValueError: unknown method or setting, or an invalid value; the message lists the valid names.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"pruning settings must be a mapping, not {settings!r}; for example {{'method': 'pyramiddrop'}}"
        )
    name = settings.get("method")
    values = {key: value for key, value in settings.items() if key != "method"}
    if name in (None, NONE):
        return None
    if isinstance(name, Sequence) and not isinstance(name, str):
        return _combined(name, values)
    cls = method_class(str(name))
    types = setting_types(cls)
    if unknown := sorted(set(values) - set(types)):
        raise UnknownSettingError(unknown[0], str(name), tuple(types))
    _check_given(cls, str(name), values)
    return cls(**values)


class UntrustedMethodError(ValueError):
    """A checkpoint refers to a method defined outside this package that the user did not name explicitly; its code is
    not executed."""


def saved_settings(config: Any) -> dict[str, Any] | None:
    """Return the pruning settings in a model's config, see :func:`completed_settings`, or ``None`` if there are none.

    Raises:
        UntrustedMethodError: the settings refer to a method outside this package that has not been imported in this
            process.
    """
    settings = getattr(config, CONFIG_KEY, None)
    if settings is None:
        return None
    check_trusted(settings, str(getattr(config, "_name_or_path", "") or "this model"))
    return completed_settings(settings)


def outside_methods(settings: Any) -> list[str]:
    """List the paths of custom (non-built-in) methods in a checkpoint's saved settings."""
    name = settings.get("method") if isinstance(settings, Mapping) else settings
    if isinstance(name, list | tuple):
        return [path for part in name for path in outside_methods(part)]
    if isinstance(name, Mapping):
        return outside_methods(name)
    if not isinstance(name, str) or ":" not in name or name in METHODS or name in METHODS.values():
        return []
    return [name]


def check_trusted(settings: Any, place: str, name_it: str = "") -> None:
    """Check that a checkpoint's saved settings only refer to built-in methods or to code this process has already
    imported (because the user's YAML, command line or script named it).

    Args:
        settings: the settings as saved in the checkpoint.
        place: checkpoint path, used in the error message.
        name_it: how the user can name the method in this context, for the error message; by default it suggests
            --method, prune(model, method) or trust_remote_code.

    Raises:
        UntrustedMethodError: the settings refer to other code; the message names the checkpoint, the method and how to
            allow it.
    """
    for path in outside_methods(settings):
        imported = loaded(path)
        if not (inspect.isclass(imported) and issubclass(imported, PruningMethod)):
            ways = name_it or (
                f"name the method yourself (--method {path}, or prune(model, method)), or pass --trust_remote_code (in "
                "Python trust_remote_code=True)"
            )
            raise UntrustedMethodError(
                f"{place} was saved with the method {path}, which is not part of vtprune_train. Opening a checkpoint "
                f"does not run such code by default; if you trust it, {ways}"
            )


def trust_saved(config: Any) -> None:
    """Import the custom methods named in a model's config (the user passed trust_remote_code), so that
    :func:`saved_settings` accepts them.

    Raises:
        ValueError: see :func:`method_class`.
    """
    for path in outside_methods(getattr(config, CONFIG_KEY, None)):
        log.warning("running the code of %s, named in %s", path, getattr(config, "_name_or_path", "this model"))
        method_class(path)


def completed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's method settings after :func:`check_trusted`. Settings added to the method since the
    checkpoint was saved are filled in with values that reproduce the old behaviour."""
    name = settings.get("method")
    if isinstance(name, list | tuple):
        return {
            **settings,
            "method": [completed_settings(part) if isinstance(part, Mapping) else part for part in name],
        }
    return {**({} if name in (None, NONE) else method_class(str(name)).before), **settings}


def _check_given(cls: type[PruningMethod], name: str, values: Mapping[str, Any]) -> None:
    """Check that every required setting has a value."""
    for field in dataclasses.fields(cls):
        if field.name not in values and {field.default, field.default_factory} == {dataclasses.MISSING} and field.init:
            raise ValueError(f"{field.name} of {name} has no default; set it")


class UnknownSettingError(ValueError):
    """Raised for a setting ``key`` the method does not have; ``also`` lists other keys to suggest."""

    def __init__(self, key: str, method: str, known: tuple[str, ...], also: tuple[str, ...] = ()):
        self.key, self.method, self.known = key, method, known
        nearest = difflib.get_close_matches(key, (*known, *also), n=1, cutoff=0.5)
        meant = f"did you mean {nearest[0]}? " if nearest else ""
        super().__init__(f"{key!r} is not a setting of {method}; {meant}it has: {', '.join(known) or 'none'}")


def _combined(entries: Sequence[Any], others: Mapping[str, Any]) -> PruningMethod:
    if others:
        key = next(iter(others))
        raise ValueError(
            f"{key}={others[key]!r} is set next to a list of methods; move it into the entry it belongs to"
        )
    methods = [_part(number, entry) for number, entry in enumerate(entries, start=1)]
    if not methods:
        raise ValueError("method=[]: list at least one method, or use none for the dense model")
    from vtprune_train.pruning.combined import Combined

    return Combined(tuple(methods)) if len(methods) > 1 else methods[0]


def _part(number: int, entry: Any) -> PruningMethod:
    """Build the method for one entry of a combination; errors include the entry's number."""
    settings = {"method": entry} if isinstance(entry, str) else entry
    name = settings.get("method") if isinstance(settings, Mapping) else None
    if not isinstance(name, str) or name == NONE:
        raise ValueError(
            f"entry {number} of the method list, {entry!r}, has no method name; use a name, or a mapping such as "
            f"{{method: random, keep: 0.5}}"
        )
    try:
        method = method_from_settings(settings)
    except ValueError as error:
        raise ValueError(f"entry {number} of the method list, {name}: {error}") from error
    assert method is not None
    return method
