"""``--help KEY`` of the commands that train: what a setting means."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from typing import Any

from vtprune_train.config.errors import did_you_mean
from vtprune_train.config.messages import nearest_key
from vtprune_train.config.paths import recipe_names
from vtprune_train.config.pruning import TRAINING_ONLY, PruningConfig
from vtprune_train.config.reference import REQUIRED, Setting, all_settings, find_setting, method_settings, yaml_value

WIDTH = 100


class SettingsHelp(argparse.Action):
    """``--help`` alone prints the options and sections; ``--help KEY`` explains a section, a setting or a setting of a
    pruning method."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values is None:
            print(parser.format_help())
        text = overview() if values is None else explain_key(values)
        if text is None:
            parser.exit(2, f"{parser.prog} --help: unknown key {values!r}{_suggestion(values)}\n")
        print(text, flush=True)
        parser.exit()


def add_help(parser: argparse.ArgumentParser) -> None:
    """``-h`` and ``--help [KEY]`` for a parser made with ``add_help=False``."""
    help_text = "show this help, or explain a section or setting, for example --help train.clip"
    parser.add_argument("-h", "--help", nargs="?", metavar="KEY", action=SettingsHelp, help=help_text)


def overview() -> str:
    """The sections, and the recipes of the package."""
    sections = [setting for key, setting in all_settings().items() if "." not in key]
    return "\n".join(
        [
            "settings, in the YAML file or as key=value (--help KEY explains a section or a setting):",
            *(_row(section.key, section.summary) for section in sections),
            "",
            _wrapped(f"recipes for --config: {', '.join(recipe_names())}"),
        ]
    )


def explain_key(key: str) -> str | None:
    """The help of a section or setting, of all settings with this last name, or of a method's setting; ``None`` if
    there is no such key."""
    setting = find_setting(key)
    if setting is not None:
        return _section(setting) if setting.children else _setting(setting)
    if "." not in key:
        same_name = [setting for name, setting in all_settings().items() if name.rpartition(".")[2] == key]
        return "\n\n".join(map(_setting, same_name)) or None
    section, _, name = key.partition(".")
    return _of_methods(name) if section == "pruning" else None


def _section(section: Setting) -> str:
    lines = [section.key, _wrapped(section.description, "  ")]
    if section.type:
        lines += ["", f"  type     {section.type}", f"  default  {section.default}"]
    lines.append("")
    lines += [_row(child.key, f"{child.summary} ({child.default or 'a section'})") for child in section.children]
    if section.key == "pruning":
        known = ", ".join(TRAINING_ONLY)
        lines += ["", _wrapped(f"All keys except method, {known} are settings of the method: `vtprune methods NAME`.")]
    return "\n".join(lines)


def _setting(setting: Setting) -> str:
    facts = [f"  type     {setting.type}", f"  default  {setting.default}"] if setting.type else []
    return "\n".join([setting.key, _wrapped(setting.description, "  "), "", *facts])


def _suggestion(key: str) -> str:
    """Suffix of an error about an unknown key: suggests the key that was probably meant, or lists those of the
    section."""
    section, *rest = key.split(".")
    if section != "pruning":
        return nearest_key(key.split("."))
    names = sorted({name for settings in _methods().values() for name in settings} | set(PruningConfig.model_fields))
    return did_you_mean(".".join(rest), names, ["pruning"])


def _methods() -> dict[str, dict[str, str]]:
    """The settings of each pruning method, with description and default."""
    from vtprune_train.pruning import METHODS, method_class
    from vtprune_train.pruning.setting_types import fields_of

    methods: dict[str, dict[str, str]] = {}
    for name in METHODS:
        cls: Any = method_class(name)
        descriptions = method_settings(cls)
        methods[name] = {
            field.name: f"{descriptions[field.name]} (default {_default(field)})" for field in fields_of(cls)
        }
    return methods


def _default(field: dataclasses.Field[Any]) -> str:
    return REQUIRED if field.default is dataclasses.MISSING else yaml_value(field.default)


def _of_methods(name: str) -> str | None:
    """The help of a setting of pruning methods, one paragraph for each method that has it."""
    lines = [_row(method, settings[name]) for method, settings in _methods().items() if name in settings]
    if not lines:
        return None
    return "\n".join([f"pruning.{name}", "  A setting of these pruning methods:", "", *lines])


def _row(name: str, text: str) -> str:
    """A name, and a text beside it or, if the name is long, below."""
    indent = " " * 24
    head = f"  {name}".ljust(len(indent) - 1) + " "
    if len(head) > len(indent):
        head = f"  {name}\n{indent}"
    return head + _wrapped(text, indent).lstrip()


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
