"""Fields of records and turns that only a checkpoint's chat template can format (``data.template: auto``): tools, tool
calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from vtprune_train.data.fields import is_empty
from vtprune_train.data.turns import CALLS, PREFIX, REASONING, TOOLS, Turn


def message_fields(message: Mapping[str, Any], role: str, ignore: Collection[str]) -> str:
    """JSON object of the fields of a turn that a chat template reads besides its role and content; empty without any.

    Raises:
        ValueError: a field has a wrong type, or belongs to another role.
    """
    fields: dict[str, Any] = {}
    reasoning = {name: message[name] for name in REASONING if name not in ignore and not is_empty(message.get(name))}
    if len(set(map(repr, reasoning.values()))) > 1:
        raise ValueError(f"its fields {' and '.join(map(repr, reasoning))} differ; remove one of them")
    for name, value in reasoning.items():
        if not isinstance(value, str) or role != "assistant":
            raise ValueError(f"its field {name!r} must be text in an assistant turn")
        fields[REASONING[0]] = value
    if CALLS not in ignore and not is_empty(message.get(CALLS)):
        if role != "assistant":
            raise ValueError(f"its field {CALLS!r} is outside an assistant turn")
        fields[CALLS] = _objects(CALLS, message[CALLS])
    if PREFIX not in ignore and not is_empty(message.get(PREFIX)):
        if message[PREFIX] is not True or role != "assistant":
            raise ValueError(f"its field {PREFIX!r} must be true, in an assistant turn that the next turn continues")
        if fields:
            others = ", ".join(f"{name!r}: {str(value)[:50]!r}" for name, value in fields.items())
            raise ValueError(
                f"it has {PREFIX!r} and {others}, but the beginning of an answer can only be text; write calls in the "
                "turn that continues it, and reasoning as <think> in its text"
            )
        fields[PREFIX] = True
    for name in ("tool_call_id", "name"):
        if role == "tool" and name not in ignore and not is_empty(message.get(name)):
            fields[name] = message[name]
    return _json(fields, ", ".join(map(repr, fields))) if fields else ""


def tools_turn(record: Mapping[str, Any], ignore: Collection[str]) -> list[Turn]:
    """A turn that lists the tools of a record; none if it has none.

    Raises:
        ValueError: they are not a list of objects.
    """
    if TOOLS in ignore or is_empty(record.get(TOOLS)):
        return []
    return [Turn(TOOLS, _json(_objects(TOOLS, record[TOOLS]), repr(TOOLS)))]


def _objects(name: str, value: Any) -> list[Any]:
    """A list of objects, or one written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"its field {name!r} is text, but not JSON ({error})") from error
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"its field {name!r} must be a list of objects, or one as JSON text")
    return value


def _json(value: Any, names: str) -> str:
    """``value`` as JSON text; ``names`` are its fields, for an error."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"a value in {names} cannot be written as JSON ({error})") from error
