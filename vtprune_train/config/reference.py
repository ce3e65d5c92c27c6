"""What each setting means, read from its ``Field(description=...)``: for the reference page, ``--help KEY`` and the
comments of the recipes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vtprune_train.config.settings import Config

REQUIRED = "required"
ENTRY = "N"  # stands for the number of an entry in a key: data.train.N.path
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Setting:
    """One key. A section has ``children`` and neither type nor default."""

    key: str
    description: str
    type: str = ""
    default: str = ""
    children: list[Setting] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The first sentence of the description, without its period."""
        return first_sentence(self.description)


def first_sentence(text: str) -> str:
    """The first sentence of a text, without its period, on one line."""
    return re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


@cache
def all_settings() -> dict[str, Setting]:
    """Every key with its setting, sections before their keys."""
    schema = Config.model_json_schema()
    return {
        setting.key: setting
        for name, entry in schema["properties"].items()
        for setting in _flat(_setting(name, entry, schema["$defs"]))
    }


def find_setting(key: str) -> Setting | None:
    """The setting of a key; entries of lists may be numbers, as in ``data.train.0.path``."""
    return all_settings().get(".".join(ENTRY if part.isdigit() else part for part in key.split(".")))


def method_settings(cls: type) -> dict[str, str]:
    """The description of each setting of a pruning method, from the ``Args`` of its docstring (and its bases')."""
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        block = re.split(r"\n(?=\S)", arguments)[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE):
            plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))
            described[name] = plain[0].upper() + plain[1:].replace("``", "`")
    return described


def yaml_value(value: Any) -> str:
    """A value on one line, as YAML accepts it."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    return json.dumps(value)


def _flat(setting: Setting) -> list[Setting]:
    return [setting, *(inner for child in setting.children for inner in _flat(child))]


def _setting(key: str, schema: dict[str, Any], sections: dict[str, Any]) -> Setting:
    """A key with what JSON schema says about it."""
    children, prefix, nested = [], key, _nested(schema)
    if nested is not None:
        prefix = f"{key}.{ENTRY}" if "items" in schema else key
        properties = sections[nested]["properties"]
        children = [_setting(f"{prefix}.{name}", entry, sections) for name, entry in properties.items()]
    described = schema if nested is None or "description" in schema else sections[nested]
    description = " ".join(described["description"].split())
    is_section = nested is not None and "$ref" in schema
    default = yaml_value(schema["default"]) if "default" in schema else REQUIRED
    if is_section:
        return Setting(key, description, children=children)
    return Setting(key, description, _words(schema), default, children)


def _nested(schema: dict[str, Any]) -> str | None:
    """Name of the section that a key holds: directly, as entries of a list, or as an alternative to null."""
    for part in (schema, schema.get("items", {}), *schema.get("anyOf", ())):
        if "$ref" in part:
            return str(part["$ref"]).rpartition("/")[2]
    return None


def _words(schema: dict[str, Any]) -> str:
    """A type with its choices and bounds: ``integer >= 1 or null``."""
    if "anyOf" in schema:
        has_choices = any("enum" in part for part in schema["anyOf"])
        return (" | " if has_choices else " or ").join(map(_words, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return "mapping"
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(map(_words, schema['prefixItems']))}]"
        return f"list of {_words(schema['items'])}" if schema["items"] else "list"
    if schema["type"] == "object":
        return "mapping"
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema)
    return f"{WORDS[schema['type']]} {bounds}".rstrip()
