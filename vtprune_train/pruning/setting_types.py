"""Validated settings: frozen dataclasses that check the type and range of every value, whether it comes from Python or
YAML."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, NoReturn

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Share = Annotated[float, Field(gt=0, le=1)]
"""A share of tokens, heads or attention in (0, 1]."""

# pydantic's error types for violated constraints
BOUNDS = ("greater_than", "greater_than_equal", "less_than_equal", "finite_number")


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
class Settings:
    """Base class of frozen dataclasses whose fields are validated by pydantic; subclasses need no decorator.

    Lists, ranges and arrays become tuples, numeric strings become numbers; ``True`` is not accepted as a number, nor
    ``2.0`` as an integer. A ``__post_init__`` may check more.

    Raises:
        TypeError: a setting does not exist (the error suggests the nearest) or is missing; or a subclass defines
            ``__init__``.
        ValueError: a value is invalid; the error names the setting, the value and the valid type or range.
    """

    if typing.TYPE_CHECKING:
        __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} defines __init__, which would be replaced; declare settings as fields with types, and "
                "compute or check the rest in __post_init__"
            )
        dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
        # The base class freezes instead, so that a class decorated with @dataclass(frozen=True) in addition is valid.
        del cls.__setattr__, cls.__delattr__
        setattr(cls, "__init__", _validating(cls.__init__))  # noqa: B010

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot set {name}; copy with dataclasses.replace(..., {name}=...)")

    def __delattr__(self, name: str) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot delete {name}")


def setting_types(cls: type[Settings]) -> dict[str, Any]:
    """The type of each field, without its constraints."""
    return _types_of(typing.cast(Any, cls))


@cache
def _types_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields_of(cls)}


def fields_of(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a class, keyword-only ones last."""
    return sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)


def _validating(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap pydantic's ``__init__`` with stricter number checks and one-line errors."""

    @functools.wraps(init)
    def checked(self: Settings, *args: Any, **settings: Any) -> None:
        cls = type(self)
        types = setting_types(cls)
        if unknown := [name for name in settings if name not in types]:
            nearest = difflib.get_close_matches(unknown[0], types, n=1, cutoff=0.5)
            meant = f"did you mean {nearest[0]}? " if nearest else ""
            raise TypeError(
                f"{cls.__name__} has no setting {unknown[0]!r}; {meant}it has: {', '.join(types) or 'none'}"
            )
        try:
            values = inspect.signature(cls).bind(*args, **settings).arguments
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}; its settings are {', '.join(types) or 'none'}") from None
        plain = {name: _plain(value) for name, value in values.items()}
        for name, value in plain.items():
            if _is_another_number(types[name], value):
                raise ValueError(_message(cls, name, values[name], f"is invalid; expected {_in_words(types[name])}"))
        try:
            init(self, **plain)
        except ValidationError as error:
            raise _readable(cls, values, error) from None

    return checked


def _readable(cls: type[Settings], values: Mapping[str, Any], error: ValidationError) -> Exception:
    """Convert pydantic's first error to a one-line error; return an error raised by ``__post_init__`` unchanged."""
    first = error.errors()[0]
    cause: Exception | None = first.get("ctx", {}).get("error")
    if not first["loc"] and cause is not None:
        return cause
    name = str(first["loc"][0])
    kind, value = setting_types(cls)[name], values[name]
    if cause is not None:
        return ValueError(f"{name}={value!r}: {cause}")
    if first["type"] in BOUNDS:
        problem = _range(_schema(cls, name)) or first["msg"].removeprefix("Input ")
        return ValueError(_message(cls, name, first["input"], problem))
    if typing.get_origin(kind) is typing.Literal:
        return ValueError(f"{name}={value!r} is not one of {', '.join(map(str, typing.get_args(kind)))}")
    return ValueError(_message(cls, name, value, f"is invalid; expected {_in_words(kind)}"))


def _message(cls: type[Settings], name: str, value: Any, problem: str) -> str:
    default = {field.name: field.default for field in dataclasses.fields(cls)}[name]
    example = "" if default is dataclasses.MISSING else f"; the default is {json.dumps(default, default=repr)}"
    return f"{name}={value!r} {problem}{example}"


def _schema(cls: type[Settings], name: str) -> dict[str, Any]:
    return TypeAdapter(typing.get_type_hints(cls, include_extras=True)[name]).json_schema()


def _range(schema: dict[str, Any]) -> str:
    """Return e.g. ``is not in (0, 1]`` for a bounded number (plain, in a list, or optional); otherwise an empty
    string."""
    for part in (schema, *schema.get("anyOf", ()), *schema.get("prefixItems", ())):
        if "maximum" in part:
            low = f"({part['exclusiveMinimum']:g}" if "exclusiveMinimum" in part else f"[{part['minimum']:g}"
            return f"is not in {low}, {part['maximum']:g}]"
    return ""


def _plain(value: Any) -> Any:
    """Convert arrays and ranges to lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def _is_another_number(kind: Any, value: Any) -> bool:
    """Return whether ``value`` contains a bool where ``kind`` only allows numbers, or a float where it only allows
    integers. pydantic would accept true as 1 and 2.0 as 2."""
    leaves = set(_leaves(kind))
    numbers = value if isinstance(value, list) else [value]
    is_bool = bool not in leaves and not leaves.isdisjoint((int, float))
    is_int = int in leaves and float not in leaves
    return any((is_bool and isinstance(n, bool)) or (is_int and isinstance(n, float)) for n in numbers)


def _leaves(kind: Any) -> Iterable[Any]:
    arguments = typing.get_args(kind)
    return (leaf for part in arguments for leaf in _leaves(part)) if arguments else (kind,)


def _in_words(kind: Any) -> str:
    """User-facing description of a setting's type."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        entries = ["0.5" if part is float else "1" if part is int else "..." for part in inner if part is not Ellipsis]
        number = f" of {len(inner)}" if Ellipsis not in inner else ""
        return f"a list{number} such as [{', '.join(entries)}]"
    if inner:
        return " or ".join(_in_words(part) for part in inner)
    names = {int: "an integer", float: "a number", bool: "true or false", NoneType: "null", str: "text"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")
