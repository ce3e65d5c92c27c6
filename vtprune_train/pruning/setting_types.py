"""Whether a method's settings are of their types, checked before the method sees them, from Python as from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import typing
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from functools import cache
from types import NoneType
from typing import Any

from pydantic import ConfigDict, TypeAdapter


class FitsSettings(ABCMeta):
    """The class of method classes: settings that are given to one are of their types when it is made."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        """A method with these settings.

        Raises:
            TypeError: there is no such setting; names the nearest.
            ValueError: one does not fit its type; names it, its value and what fits.
        """
        if not dataclasses.is_dataclass(cls):
            return super().__call__(*args, **settings)
        types = setting_types(cls)
        if unknown := [name for name in settings if name not in types]:
            nearest = difflib.get_close_matches(unknown[0], types, n=1, cutoff=0.5)
            meant = f"did you mean {nearest[0]}? " if nearest else ""
            raise TypeError(
                f"{cls.__name__} has no setting {unknown[0]!r}; {meant}it has: {', '.join(types) or 'none'}"
            )
        given = inspect.signature(cls.__init__).bind(None, *args, **settings).arguments
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        fitting: dict[str, Any] = {}
        late: ValueError | None = None
        for name, value in given.items():
            if name == "self":
                continue
            try:
                fitting[name] = fitted(name, value, types[name], defaults[name])
            except ValueError as error:
                if not _method_checks(types[name], value):
                    raise
                fitting[name], late = value, error
        method = super().__call__(**fitting)
        if late is not None:
            raise late
        return method


def _method_checks(kind: Any, value: Any) -> bool:
    """Whether what does not fit is left to the method, which may say more of it: a word that is not among the choices,
    a list of another length."""
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str)
    entries = typing.get_args(kind) if typing.get_origin(kind) is tuple else (Ellipsis,)
    return Ellipsis not in entries and isinstance(value, tuple | list) and len(value) != len(entries)


@cache
def setting_types(cls: Any) -> dict[str, Any]:
    """The type of each setting of a method."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fitted(key: str, value: Any, kind: Any, default: Any) -> Any:
    """``value`` as the setting's type has it: lists become tuples, numbers in text become numbers.

    Raises:
        ValueError: it does not fit; says what does.
    """
    choices = typing.get_args(kind) or (kind,)
    try:
        if isinstance(value, bool) and bool not in choices and any(part in (int, float) for part in choices):
            raise ValueError
        if isinstance(value, float) and int in choices and float not in choices:
            raise ValueError
        return _adapter(kind).validate_python(_plain(value))
    except ValueError:  # pydantic's among them
        if typing.get_origin(kind) is typing.Literal:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(map(str, choices))}") from None
        example = "" if default is dataclasses.MISSING else f"; the default is {_written(default)}"
        raise ValueError(f"{key}={value!r} does not fit; it takes {_in_words(kind)}{example}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _plain(value: Any) -> Any:
    """Arrays and ranges as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def _written(default: Any) -> str:
    return json.dumps(default, default=repr)


def _in_words(kind: Any) -> str:
    """A setting's type as a user would say it."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        entries = ["0.5" if part is float else "1" if part is int else "..." for part in inner if part is not Ellipsis]
        number = f" of {len(inner)}" if Ellipsis not in inner else ""
        return f"a list{number} such as [{', '.join(entries)}]"
    if inner:
        return " or ".join(_in_words(part) for part in inner)
    return {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}.get(kind, "a text")
