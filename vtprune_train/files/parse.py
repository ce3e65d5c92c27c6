"""Parse YAML and JSON files and overrides; errors name the line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def _read(path: Path, kind: str) -> str:
    """Read a text file that should be of the format ``kind``; errors name the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        raise ValueError(f"{path} is not {kind}: {reason}") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: the file cannot be read, is not YAML or has a duplicate key; the error names line and column.
    """
    try:
        return yaml.load(_read(path, "YAML"), _NoDuplicates)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {_problem(error)}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file cannot be read or is not JSON; the error names line and column.
    """
    try:
        return json.loads(_read(path, "JSON"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: see :func:`read_json`; or the file does not contain an object.
    """
    loaded = read_json(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} contains a {type(loaded).__name__}, not a JSON object")
    return loaded


def parse_value(text: str, key: str) -> Any:
    """Parse the value of an override; empty text is null.

    Raises:
        ValueError: it is not YAML; the error shows how to quote it.
    """
    try:
        return yaml.load(text, _NoDuplicates) if text else None
    except yaml.YAMLError as error:
        quoted = f"""'{key}="{text}"'"""
        raise ValueError(f"{key}: {text!r} is not YAML: {_problem(error)}; quote it: {quoted}") from error


class _NoDuplicates(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML would silently keep the last value."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if (key := (key_node.tag, key_node.value)) in seen:
                problem = f"duplicate key {key_node.value!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return node


def _problem(error: yaml.YAMLError) -> str:
    """The problem with its line and column."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = f"{error.context}: " if getattr(error, "context", None) else ""  # type: ignore[attr-defined]
    return f"{context}{problem}" + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")
