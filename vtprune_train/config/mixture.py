"""Data mixtures in files of their own: ``data.train: mixtures/x.yaml``, or ``{include: x.yaml}`` among the entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vtprune_train.files.parse import read_yaml

DATA = (".json", ".jsonl", ".parquet", ".tar")
CheckEntry = Callable[[dict[str, Any]], list[str]]


def expand(given: Any, key: str, config: Path, find: Callable[[str, str], Path], check: CheckEntry) -> Any:
    """The entries of ``data.train`` or ``data.eval`` with every included file's in place of its name.

    An included file holds a list of entries, or ``{root: folder, sources: [entries]}``. Its paths are relative to
    ``data.root`` like all others, or to ``root`` if it names one, which is relative to the file's own folder.

    Args:
        given: what the settings say; returned as it is if it is neither a name nor a list.
        key: the setting, for messages.
        config: the file with the settings; names are looked for beside it first.
        find: finds a file by name otherwise.
        check: what is wrong with an entry.

    Raises:
        ValueError: a file is missing, includes itself, is not of this form, or has a wrong entry; names it.
    """
    if isinstance(given, str):
        given = [{"include": given}]
    if not isinstance(given, list):
        return given
    return [entry for item in given for entry in _expanded(item, key, (config,), find, check)]


def _expanded(
    item: Any, key: str, chain: tuple[Path, ...], find: Callable[[str, str], Path], check: CheckEntry
) -> Iterator[Any]:
    """The entries that one entry stands for; ``chain`` are the files that led here."""
    if not isinstance(item, dict) or "include" not in item:
        yield item
        return
    if extra := sorted(set(item) - {"include"}):
        raise ValueError(f"{key}: an entry with include has nothing beside it, but this one has {', '.join(extra)}")
    name = str(item["include"])
    if Path(name).suffix in DATA:  # as YAML a large one would be read for hours
        raise ValueError(f"{key}: {name} is a data file, not a mixture; write [{{path: {name}}}], or include a .yaml")
    beside = chain[-1].parent / name
    file = (beside if beside.is_file() else find(name, key)).resolve()
    if file in chain:
        raise ValueError(f"{key}: {file} includes itself ({' -> '.join(path.name for path in (*chain[1:], file))})")
    entries, root = _read(file, key)
    for number, entry in enumerate(entries):
        for inner in _expanded(entry, f"{key}: {file}, entry {number}", (*chain, file), find, check):
            if inner is entry and (wrong := check(entry)):
                raise ValueError("\n".join(f"{key}: {file}, entry {number}: {line}" for line in wrong))
            yield inner if root is None else _at(root, inner)


def _read(file: Path, key: str) -> tuple[list[Any], Path | None]:
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


def _at(root: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its paths joined to ``root``; an absolute path stays."""
    return {**entry, "path": str(root / entry["path"]), "images": str(root / entry.get("images", "."))}
