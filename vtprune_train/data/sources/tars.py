"""WebDataset tars: a record is the run of members that share a key, read in place without unpacking.

The key of ``a/0001.left.jpg`` is ``a/0001``, its extension ``left.jpg``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune_train.data.sources.base import BytesAt, Malformed, Piece, Place, Reader
from vtprune_train.stream import IMAGE

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
Member = tuple[str, bytes]


class Tar(Reader):
    """One piece, as a tar can only be read from its beginning. A place spans the record's members."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._bytes = BytesAt(path)

    def pieces(self) -> Iterator[Piece]:
        yield Piece(0, self.path.stat().st_size)

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        with self._open() as tar:
            members: list[Member] = []
            start = 0
            for offset, name, content in _members(tar, self.path):
                if members and _key(members[0][0]) != _key(name):
                    yield Place(start, offset - start), _record(members)
                    members = []
                if not members:
                    start = offset
                members.append((name, content))
            if members:
                yield Place(start, tar.offset - start), _record(members)

    def read(self, place: Place) -> Any:
        with tarfile.open(fileobj=io.BytesIO(self._bytes.read(*place)), mode="r:") as tar:
            return _record([(name, content) for _, name, content in _members(tar, self.path)])

    def _open(self) -> tarfile.TarFile:
        try:
            return tarfile.open(self.path, "r:")
        except tarfile.ReadError as error:
            raise ValueError(
                f"data file {self.path} is no plain tar ({error}); is it compressed or cut off?"
            ) from error


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[int, str, bytes]]:
    """``(offset of its header, name, content)`` of each regular file.

    Raises:
        ValueError: the tar is cut off.
    """
    while True:
        try:
            member = tar.next()
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member is None:
                return
            if not member.isfile():
                continue
            file = tar.extractfile(member)
            content = file.read() if file else b""
        except tarfile.TarError as error:
            raise ValueError(f"data file {path} is broken at byte {tar.offset} ({error})") from error
        if len(content) != member.size:
            raise ValueError(f"data file {path} is cut off within {member.name}")
        yield member.offset, member.name, content


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _record(members: Sequence[Member]) -> Any:
    """The record in the form of its ``.json``, pictures as bytes; made from the ``.txt`` where that is a caption. Other
    members are fields by their extension (``.mp4``)."""
    key = _key(members[0][0])
    described: Any = None
    caption = None
    pictures: list[Member] = []
    others: dict[str, str] = {}
    for name, content in members:
        extension = _extension(name).lower()
        if extension == "json":
            try:
                described = json.loads(content)
            except (ValueError, RecursionError) as error:
                described = Malformed(f"{name} is not JSON ({error})")
        elif extension == "txt":
            caption = content.decode("utf-8", errors="replace").strip()
        elif extension.rpartition(".")[2] in PICTURES:
            pictures.append((name, content))
        else:
            others[f".{extension.rpartition('.')[2]}"] = name
    talks = isinstance(described, Mapping) and ("conversations" in described or "messages" in described)
    if caption is not None and not talks:
        question = f"{IMAGE}\n" * len(pictures)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        images = [content for _, content in pictures]
        record = described if isinstance(described, Mapping) else {}
        return {"id": key, **record, **others, "images": images, "image": None, "conversations": turns}
    if not isinstance(described, Mapping):
        return {"id": key, **others} if described is None else described
    if caption is not None:
        others[".txt"] = caption
    return {"id": key, **described, **others, "images": _chosen(described, pictures), "image": None}


def _chosen(record: Mapping[str, Any], pictures: Sequence[Member]) -> list[Any]:
    """The pictures in the order in which the record names them; in the tar's if it names none or all by other names. A
    name without a member stays a name, looked up in the source's folder of images."""
    names = record.get("image") if record.get("images") is None else record["images"]
    contents = [content for _, content in pictures]
    if names is None:
        return contents
    names = names if isinstance(names, list) else [names]
    by_name: dict[str, bytes] = {}
    for name, content in pictures:
        for known in (name, name.rpartition("/")[2], _extension(name)):
            by_name.setdefault(known, content)
    found = [by_name.get(name) if isinstance(name, str) else None for name in names]
    if len(names) == len(contents) and not any(content is not None for content in found):
        return contents
    return [name if content is None else content for name, content in zip(names, found, strict=True)]
