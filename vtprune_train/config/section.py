"""The base class of all sections of settings."""

from __future__ import annotations

import json
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Refuses unknown keys, and ``true`` where a number is expected (pydantic would read it as 1)."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if field is not None and _takes_numbers(field.annotation):
            named = value.items() if isinstance(value, dict) else [("", value)]
            for key, item in named:
                for part in item if isinstance(item, list | tuple) else [item]:
                    if isinstance(part, bool):
                        raise ValueError(f"{f'{key}: ' if key else ''}{json.dumps(part)} is not a number")
        return value


def _takes_numbers(annotation: Any) -> bool:
    """Whether a type has numbers but neither booleans nor literals."""
    parts = list(_parts(annotation))
    return any(part in (int, float) for part in parts) and bool not in parts and Literal not in parts


def _parts(annotation: Any) -> typing.Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        yield Literal
    elif origin is None:
        yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from _parts(part)
