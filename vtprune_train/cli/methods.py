"""``vtprune methods``: list the pruning methods: where they act, whether they train, settings and papers."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from typing import Any

from vtprune_train.pruning import METHODS, NONE, method_class, setting_types
from vtprune_train.pruning.setting_types import fields_of

WIDTH = 120
NO_BREAK = "\N{NO-BREAK SPACE}"  # keeps "arXiv" and its number on one line, so that they can be searched for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "method",
        nargs="?",
        metavar="NAME",
        help="show one method in full: a name, file.py:Class or package.module:Class",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--names", action="store_true", help="print only the names, one per line")
    form.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or one method."""
    names = [*METHODS, NONE] if arguments.method is None else [arguments.method]
    facts = [facts_of(name) for name in names]
    if arguments.names:
        print("\n".join(names))
        return 0
    if arguments.json:
        print(json.dumps(facts if arguments.method is None else facts[0], indent=2))
    elif arguments.method is None:
        print("\n\n".join(entry(fact) for fact in facts))
    else:
        print(page(facts[0]))
    return 0


def facts_of(name: str) -> dict[str, Any]:
    """A method as plain data: name, where, trains, paper, doc, and ``settings`` (each with name, type, default)."""
    if name == NONE:
        doc = "The dense model: nothing is dropped."
        return {"name": NONE, "where": "nowhere", "trains": "yes", "paper": "", "settings": [], "doc": doc}
    cls = method_class(name)
    types = setting_types(cls)
    settings = [
        {"name": field.name, "type": _type_name(types[field.name]), "default": _default(field)}
        for field in fields_of(cls)
    ]
    facts = {"name": name, "where": cls.where, "trains": cls.trains, "paper": cls.paper}
    doc = inspect.cleandoc(cls.__doc__ or "")
    if doc.startswith(f"{cls.__name__}("):  # written by `dataclass` for a class without a docstring
        doc = ""
    return {**facts, "settings": settings, "doc": doc}


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default as plain data; ``"required"`` if there is none."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    return list(value) if isinstance(value, tuple) else value


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and not hasattr(kind, "__args__"):
        return kind.__name__
    return str(kind).replace("typing.", "")


def entry(fact: dict[str, Any]) -> str:
    """One entry of the list of methods."""
    settings = ", ".join(f"{s['name']}={_shown(s['default'])}" for s in fact["settings"]) or "none"
    rows = {"where": fact["where"], "trains": fact["trains"], "settings": settings, "paper": fact["paper"] or "-"}
    return "\n".join([fact["name"], *_rows(rows)])


def page(fact: dict[str, Any]) -> str:
    """All that is known about one method."""
    rows = {"where": fact["where"], "trains": fact["trains"], "paper": fact["paper"] or "-"}
    settings = {s["name"]: f"{_shown(s['default'])}  ({s['type']})" for s in fact["settings"]} or {"-": "none"}
    parts = [fact["name"], *_rows(rows), "", "settings with their defaults", *_rows(settings), "", fact["doc"]]
    return "\n".join(parts).rstrip()


def _rows(rows: dict[str, str]) -> list[str]:
    width = max(len(label) for label in rows) + 4
    return [
        line.replace(NO_BREAK, " ")
        for label, text in rows.items()
        for line in textwrap.wrap(
            text.replace("arXiv ", f"arXiv{NO_BREAK}"),
            WIDTH,
            initial_indent=f"  {label}".ljust(width),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    ]


def _shown(value: Any) -> str:
    """The value as YAML writes it."""
    return value if isinstance(value, str) and value else json.dumps(value)
