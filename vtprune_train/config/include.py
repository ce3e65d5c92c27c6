"""Files that settings name: data mixtures (``data.train: mixtures/x.yaml``, or ``{include: x.yaml}`` among the entries)
and the section that ``pruning: FILE`` stands for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vtprune_train.config.data import SourceConfig
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.messages import explain
from vtprune_train.config.paths import find_file
from vtprune_train.files.parse import read_yaml

DATA = (".json", ".jsonl", ".parquet", ".tar")


def include_mixtures(tree: dict[str, Any], config: Path) -> list[str]:
    """Put the entries of included mixtures in place of their files.

    An included file holds a list of entries, or ``{root: folder, sources: [entries]}``. Its paths are relative to
    ``data.root`` like all others, or to ``root`` if it names one, which is relative to the file's own folder.

    Args:
        tree: the settings, changed in place.
        config: the file with the settings; names are looked for beside it first.

    Returns:
        What is wrong with a mixture: a file is missing, includes itself, is not of this form, or has a wrong entry.
    """
    data = tree.get("data")
    errors = []
    for which in ("train", "eval"):
        sources = data.get(which) if isinstance(data, dict) else None
        entries = [{"include": sources}] if isinstance(sources, str) else sources
        if isinstance(data, dict) and isinstance(entries, list):
            try:
                data[which] = [e for entry in entries for e in _expanded(entry, f"data.{which}", (config.resolve(),))]
            except ValueError as error:
                errors.append(str(error))
                del data[which]
    return errors


def _expanded(entry: Any, key: str, chain: tuple[Path, ...]) -> Iterator[Any]:
    """The entries that one entry stands for; ``chain`` are the files that led here."""
    if not isinstance(entry, dict) or "include" not in entry:
        yield entry
        return
    if extra := sorted(set(entry) - {"include"}):
        raise ValueError(f"{key}: an entry with include has nothing beside it, but this one has {', '.join(extra)}")
    name = str(entry["include"])
    if Path(name).suffix in DATA:  # as YAML a large one would be read for hours
        raise ValueError(f"{key}: {name} is a data file, not a mixture; write [{{path: {name}}}], or include a .yaml")
    file = find_file(name, key, beside=chain[-1]).resolve()
    if file in chain:
        raise ValueError(f"{key}: {file} includes itself ({' -> '.join(path.name for path in (*chain[1:], file))})")
    entries, root = _read_mixture(file, key)
    for number, included in enumerate(entries):
        place = f"{key}: {file}, entry {number}"
        for inner in _expanded(included, place, (*chain, file)):
            if inner is included and (wrong := _problems(inner)):
                raise ValueError("\n".join(f"{place}: {line}" for line in wrong))
            if root is not None:  # an absolute path stays
                inner = {**inner, "path": str(root / inner["path"]), "images": str(root / inner.get("images", "."))}
            yield inner


def _read_mixture(file: Path, key: str) -> tuple[list[Any], Path | None]:
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    root = None
    if isinstance(content, dict) and "sources" in content and set(content) <= {"root", "sources"}:
        root = file.parent / str(content["root"]) if content.get("root") is not None else None
        content = content["sources"]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{key}: {file} holds no mixture; write a list of entries, or {{root: ..., sources: [...]}}")
    return content, root


def _problems(entry: Any) -> list[str]:
    """What is wrong with an entry of an included mixture, one line each."""
    try:
        SourceConfig.model_validate(entry)
    except ValidationError as error:
        lines = explain(error, ("data", "train", 0))
        return [line.replace("data.train.0.", "").removeprefix("data.train.0") for line in lines]
    return []


def include_pruning(tree: dict[str, Any], config: Path) -> list[str]:
    """Put the section in place of ``pruning: FILE``, as ``vtprune search`` writes it; returns what is wrong with it."""
    name = tree.get("pruning")
    if not isinstance(name, str):
        return []
    del tree["pruning"]
    if not Path(name).suffix and not (config.resolve().parent / name).is_file():
        return [f"pruning: {name} is not a file; to choose a method, set pruning.method={name}"]
    try:
        tree["pruning"] = read_pruning(find_file(name, "pruning", beside=config))
    except ConfigError as error:
        return [str(error)]
    return []


def read_pruning(path: Path) -> dict[str, Any]:
    """The section ``pruning`` of a YAML file.

    Raises:
        ConfigError: there is none.
    """
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"pruning: {error}") from error
    section = tree.get("pruning") if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"pruning: {path} has no section pruning; it begins with a line 'pruning:'")
    return section
