"""``base: FILE`` in a file of settings: the file states only what differs from its base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.include import include_mixtures, include_pruning
from vtprune_train.config.paths import find_file, read_deepspeed
from vtprune_train.config.pruning import DEFAULT_METHOD, TRAINING_ONLY
from vtprune_train.files.parse import read_yaml

Tree = dict[str, Any]


class Sources:
    """The file that each setting comes from."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, ...], Path | None] = {}

    def add(self, tree: Tree, file: Path) -> None:
        self._files |= dict.fromkeys(_leaves(tree), file)

    def override(self, key: str) -> None:
        """Record that the command line sets ``key``."""
        self._files[tuple(key.split("."))] = None

    def named(self, line: str) -> str:
        """Append the file that sets the key at the start of an error line, if the settings come from several files."""
        if len(set(self._files.values()) - {None}) < 2:
            return line
        key = tuple(re.match(r"[\w.]*", line)[0].split("."))  # type: ignore[index]
        files = (self._files[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self._files)
        file = next(files, None)
        return line if file is None else f"{line} (in {file})"


def read_settings(file: Path) -> tuple[Tree, Sources, list[str]]:
    """Read a file of settings on top of its bases.

    Returns:
        The merged settings, the file of each, and errors in included files.

    Raises:
        ConfigError: a file is missing, is not YAML or holds no mapping; or the bases form a cycle.
    """
    merged: Tree = {}
    sources, errors = Sources(), []
    for path, tree in reversed(read_chain(file)):
        if isinstance(tree.get("pruning"), str):  # a file with the whole section
            merged.pop("pruning", None)
        errors += [*include_mixtures(tree, path), *include_pruning(tree, path)]
        _leave_method(merged, tree)
        _leave_optimizer(merged, tree)
        if isinstance(tree.get("deepspeed"), dict) and isinstance(merged.get("deepspeed"), str):
            merged["deepspeed"] = read_deepspeed(merged["deepspeed"])
        merged = merge(merged, tree)
        sources.add(tree, path)
    return merged, sources, errors


def merge(base: Tree, tree: Tree) -> Tree:
    """``tree`` on top of ``base``: mappings are merged key by key, everything else replaces."""
    both = {key for key in tree if isinstance(tree[key], dict) and isinstance(base.get(key), dict)}
    return {**base, **{key: merge(base[key], value) if key in both else value for key, value in tree.items()}}


def read_chain(file: Path) -> list[tuple[Path, Tree]]:
    """The file and its bases, each with the settings that it states."""
    chain: list[tuple[Path, Tree]] = []
    key = "--config"
    while True:
        if file.resolve() in [path.resolve() for path, _ in chain]:
            names = " -> ".join(str(path) for path in (*(path for path, _ in chain), file))
            raise ConfigError(f"{key}: the bases form a cycle: {names}")
        try:
            tree = read_yaml(file)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(f"{file} holds a {type(tree).__name__}, not settings")
        chain.append((file, tree))
        name = tree.pop("base", None)
        if name is None:
            return chain
        key = f"{file}: base"
        if not isinstance(name, str):
            raise ConfigError(f"{key}: {name!r} is not the name of a file, for example llava_next_pdrop.yaml")
        file = find_file(name, key, beside=file)


def _leave_method(base: Tree, tree: Tree) -> None:
    """If a file names a different method than its base, drop the base's settings for its method; with ``none``, drop
    the whole section."""
    section, derived = base.get("pruning"), tree.get("pruning")
    if not isinstance(section, dict) or not isinstance(derived, dict) or "method" not in derived:
        return
    if derived["method"] == "none":
        section.clear()
    elif derived["method"] != section.get("method", DEFAULT_METHOD):
        base["pruning"] = {key: value for key, value in section.items() if key in TRAINING_ONLY}


def _leave_optimizer(base: Tree, tree: Tree) -> None:
    """Where a file names another optimizer than its base, drop the base's arguments for it; else those that the file
    sets to null, so that the class's defaults apply."""
    section, derived = base.get("train"), tree.get("train")
    if not isinstance(section, dict) or not isinstance(derived, dict):
        return
    inherited, stated = section.get("optimizer_args"), derived.get("optimizer_args")
    if derived.get("optimizer", section.get("optimizer")) != section.get("optimizer"):
        section.pop("optimizer_args", None)
    elif isinstance(inherited, dict) and isinstance(stated, dict):
        for key in [key for key, value in stated.items() if value is None and key in inherited]:
            del inherited[key], stated[key]


def _leaves(tree: Tree, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*parents, str(key)))
        else:
            yield (*parents, str(key))
