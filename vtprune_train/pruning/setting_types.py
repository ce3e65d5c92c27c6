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
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Share = Annotated[float, Field(gt=0, le=1)]
"""A share of tokens, heads or attention in (0, 1]."""

BOUNDS = ("greater_than", "greater_than_equal", "less_than_equal", "finite_number")  # pydantic's errors of constraints


class FitsSettings(ABCMeta):
    """The class of method classes: settings fit their types (and the constraints of ``Annotated`` ones) from the moment
    that a method is made."""

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
        arguments = inspect.signature(cls.__init__).bind(None, *args, **settings).arguments
        return super().__call__(**{name: _fitted(cls, name, arguments[name]) for name in types if name in arguments})


@cache
def setting_types(cls: Any) -> dict[str, Any]:
    """The type of each setting of a method, without its constraints."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _adapter(cls: Any, name: str) -> TypeAdapter[Any]:
    kind = typing.get_type_hints(cls, include_extras=True)[name]
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _fitted(cls: Any, name: str, value: Any) -> Any:
    """``value`` as the type of the setting ``name`` has it: lists become tuples, numbers in text become numbers."""
    kind = setting_types(cls)[name]
    choices = typing.get_args(kind) or (kind,)
    is_bool = isinstance(value, bool) and bool not in choices and any(part in (int, float) for part in choices)
    is_float = isinstance(value, float) and int in choices and float not in choices
    problem = ""
    if not (is_bool or is_float):  # pydantic would take true for 1, and 2.0 for 2
        try:
            return _adapter(cls, name).validate_python(_plain(value))
        except ValidationError as error:
            [first, *_] = error.errors()
            if first["type"] in BOUNDS:
                value, problem = first["input"], _range(_adapter(cls, name).json_schema()) or first["msg"]
    if typing.get_origin(kind) is typing.Literal:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")
    default = {field.name: field.default for field in dataclasses.fields(cls)}[name]
    example = "" if default is dataclasses.MISSING else f"; the default is {json.dumps(default, default=repr)}"
    problem = problem.removeprefix("Input ") or f"does not fit; it takes {_in_words(kind)}"
    raise ValueError(f"{name}={value!r} {problem}{example}")


def _range(schema: dict[str, Any]) -> str:
    """``is not in (0, 1]`` for a number with two bounds, alone, in a list or beside null; else empty."""
    for part in (schema, *schema.get("anyOf", ()), *schema.get("prefixItems", ())):
        if "maximum" in part:
            low = f"({part['exclusiveMinimum']:g}" if "exclusiveMinimum" in part else f"[{part['minimum']:g}"
            return f"is not in {low}, {part['maximum']:g}]"
    return ""


def _plain(value: Any) -> Any:
    """Arrays and ranges as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


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
