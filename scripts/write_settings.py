#!/usr/bin/env python
"""Write what is generated from the descriptions of settings: docs/settings.md and the comments in configs/.

python scripts/write_settings.py   # make settings; tests fail while either is out of date
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from vtprune_train.config.inherit import read_settings
from vtprune_train.config.paths import PACKAGED_CONFIGS
from vtprune_train.config.pruning import DEFAULT_METHOD
from vtprune_train.config.reference import (
    REQUIRED,
    Setting,
    all_settings,
    find_setting,
    first_sentence,
    method_settings,
)

COLUMN = 30  # of the comments
HERE = "# here:"  # begins a comment that is written by hand, about this recipe alone
PAGE = PACKAGED_CONFIGS.parent / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Generated from the descriptions in vtprune_train/config by `make settings`; edit those. -->

Settings come from a YAML file (`--config`) and from `key=value` on the command line, where dots separate nested keys:
`train.epochs=3`, `data.train.0.take=first:100`. Values are YAML; an empty value is null. The same text is shown by

```bash
vtprune train --help               # options and sections
vtprune train --help train         # the keys of a section
vtprune train --help train.clip    # one key
```

A file may begin with `base: FILE` and state only [what differs](training.md#recipes).
"""


def write() -> None:
    """Rewrite the page and the comments of all recipes."""
    PAGE.write_text(page(), encoding="utf-8")
    for recipe in sorted(PACKAGED_CONFIGS.glob("*.yaml")):
        recipe.write_text(commented(recipe), encoding="utf-8")


def page() -> str:
    """The reference of all settings as Markdown."""
    listed = [setting for key, setting in all_settings().items() if not key.startswith("data.eval.N.")]
    return "\n".join([INTRODUCTION, *map(_entry, listed)])


def _entry(setting: Setting) -> str:
    level = "##" if "." not in setting.key else "###"
    default = "required" if setting.default == REQUIRED else f"default `{setting.default}`"
    facts = f"{setting.type}, {default}\n\n".replace("|", "\\|") if setting.type else ""
    text = textwrap.fill(setting.description, 120, break_on_hyphens=False, break_long_words=False)
    return f"{level} `{setting.key}`\n\n{facts}{text}\n"


def commented(recipe: Path) -> str:
    """The text of a recipe in which the comment of each setting is the first sentence of its description and its
    choices. Comments that begin with ``here:`` stay, as do those of keys that are not settings of this package
    (``model.config``)."""
    text = recipe.read_text(encoding="utf-8")
    lines = text.splitlines()
    settings, _, _ = read_settings(recipe)
    method = settings.get("pruning", {}).get("method", DEFAULT_METHOD)
    for key, line, end in _ends(yaml.compose(text)):
        before, comment = lines[line][:end].rstrip(), lines[line][end:].strip()
        if not comment.startswith(HERE):
            generated = _comment(key, method)
            comment = comment if generated is None else f"# {generated}"
        lines[line] = f"{before.ljust(COLUMN - 2)}  {comment}" if comment else before
    return "\n".join(lines) + "\n"


def _comment(key: str, method: str) -> str | None:
    """The comment of a key; ``None`` leaves the one it has."""
    from vtprune_train.pruning import method_class

    setting = find_setting(key)
    if setting is not None:
        if not setting.type:  # sections need none
            return None
        choices = f": {setting.type}" if "|" in setting.type else ""
        return f"{setting.summary}{choices}"
    section, _, name = key.partition(".")
    if section != "pruning" or method == "none":
        return None
    return first_sentence(method_settings(method_class(method))[name])


def _ends(node: yaml.Node | None, parents: str = "") -> Iterator[tuple[str, int, int]]:
    """``(key, line, column)`` of the end of each ``key: value`` on a separate line: after the value, or after the colon
    if the value begins on the next line. Keys inside ``{...}`` and lists are left out."""
    assert isinstance(node, yaml.MappingNode)
    for key_node, value in node.value:
        key = f"{parents}{key_node.value}"
        line = key_node.start_mark.line
        if value.end_mark.line == line:
            yield key, line, value.end_mark.column
        else:
            yield key, line, key_node.end_mark.column + 1
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _ends(value, f"{key}.")


if __name__ == "__main__":
    write()
