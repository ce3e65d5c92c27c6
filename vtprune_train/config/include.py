"""Includes files that settings name: data mixtures (``data.train: mixtures/x.yaml``, or an entry ``{include: x.yaml}``)
and sections (``pruning: FILE``)."""

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
    """Replace included mixture files by their entries.

    An included file holds a list of entries, or ``{root: folder, sources: [entries]}``. Its paths are relative to
    ``data.root``, or to its ``root``, which is relative to the folder of the included file.

    Args:
        tree: the settings, changed in place.
        config: the file with the settings; included files are looked up in its folder first.

    Returns:
        Errors, one line each: a file that is missing, includes itself or is not a mixture, or an invalid entry.
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
    """The entry, or the entries of the file that it includes; ``chain`` holds the including files."""
    if not isinstance(entry, dict) or "include" not in entry:
        yield entry
        return
    if extra := sorted(set(entry) - {"include"}):
        raise ValueError(f"{key}: an entry with include cannot have other keys, but this one has {', '.join(extra)}")
    name = str(entry["include"])
    if Path(name).suffix in DATA:  # parsing a large data file as YAML takes hours
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
            if root is not None:  # does not change an absolute path
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
        raise ValueError(f"{key}: {file} is not a mixture; write a list of entries, or {{root: ..., sources: [...]}}")
    return content, root


def _problems(entry: Any) -> list[str]:
    """The errors of an entry of an included mixture, one line each."""
    try:
        SourceConfig.model_validate(entry)
    except ValidationError as error:
        lines = explain(error, ("data", "train", 0))
        return [line.replace("data.train.0.", "").removeprefix("data.train.0") for line in lines]
    return []


def include_pruning(tree: dict[str, Any], config: Path) -> list[str]:
    """Replace ``pruning: FILE``, for example written by ``vtprune search``, by the section in it; returns errors."""
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
    """Read the section ``pruning`` of a YAML file.

    Raises:
        ConfigError: the file has none or cannot be read.
    """
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"pruning: {error}") from error
    section = tree.get("pruning") if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"pruning: {path} has no section pruning; put the settings under a line 'pruning:'")
    return section
