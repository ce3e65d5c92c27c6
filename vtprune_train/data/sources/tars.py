"""Reader for WebDataset tars: a record is the consecutive members that share a key, read without unpacking.

The key of ``a/0001.left.jpg`` is ``a/0001``, its extension ``left.jpg``.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.sources.base import Malformed, Piece, Place, Reader, parse_record, too_many_bytes
from vtprune_train.data.videos import is_video_name

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
LONGEST_NAME = 1 << 20  # bytes of an extended header (long name, times, attributes)
Member = tuple[str, bytes]


class Tar(Reader):
    """A tar is one piece, because it can only be scanned from its beginning. A place spans the record's members.
    Reads the content only of members that records use, and not if the record is too large."""

    def pieces(self) -> Iterator[Piece]:
        yield Piece(0, self.path.stat().st_size)

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        return self._records(*piece)

    def read(self, place: Place) -> Any:
        return next(record for _, record in self._records(place.at, place.at + place.size))

    def _records(self, start: int, stop: int) -> Iterator[tuple[Place, Any]]:
        """The records whose members lie between bytes ``start`` and ``stop``."""
        with self.path.open("rb") as file:
            file.seek(start)
            try:
                tar = tarfile.TarFile(fileobj=file, tarinfo=_Header)
            except tarfile.ReadError as error:
                raise ValueError(
                    f"data file {self.path} is not a plain tar ({error}); it may be compressed or truncated"
                ) from error
            group = _Group(tar, start)
            for header in _headers(tar, self.path, stop):
                if group.key is not None and group.key != _key(header.name):
                    yield Place(group.at, header.offset - group.at), group.record(self.max_bytes)
                    group = _Group(tar, header.offset)
                group.add(header, self.max_bytes)
            if group.key is not None:
                yield Place(group.at, tar.offset - group.at), group.record(self.max_bytes)


class _Header(tarfile.TarInfo):
    """A member's header with a limit on its name, which :mod:`tarfile` reads at any length."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        is_name = self.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.size < 0 or (is_name and self.type != tarfile.GNUTYPE_SPARSE and self.size > LONGEST_NAME):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]  # documented for subclasses


class _Group:
    """The members that share a key, starting at byte ``at``; their content is read once all are known."""

    def __init__(self, tar: tarfile.TarFile, at: int):
        self.key: str | None = None
        self.at = at
        self._tar, self._bytes = tar, 0
        self._members: list[tarfile.TarInfo] = []

    def add(self, header: tarfile.TarInfo, max_bytes: int) -> None:
        if self.key is None:
            self.key, self.at = _key(header.name), header.offset
        self._bytes += tarfile.BLOCKSIZE + (header.size if _is_read(header.name) else 0)
        if self._bytes <= max_bytes:
            self._members.append(header)

    def record(self, max_bytes: int) -> Any:
        if self._bytes > max_bytes:
            return too_many_bytes(self._bytes, max_bytes, f"members {self.key}.* at byte {self.at}")
        return _record([(header.name, self._content(header)) for header in self._members], self.at)

    def _content(self, header: tarfile.TarInfo) -> bytes:
        file = self._tar.extractfile(header) if _is_read(header.name) else None
        return file.read() if file else b""


def _headers(tar: tarfile.TarFile, path: Path, stop: int) -> Iterator[tarfile.TarInfo]:
    """The header of each regular file before byte ``stop``; raises ``ValueError`` if the tar is broken or truncated."""
    size = path.stat().st_size
    while True:
        try:
            header = tar.next()
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
        except tarfile.TarError as error:
            raise ValueError(f"data file {path} is broken at byte {tar.offset} ({error})") from error
        if header is None:
            break
        end = tar.offset - tarfile.BLOCKSIZE if header.issparse() else header.offset_data + header.size
        if tar.offset <= header.offset or end > size:
            raise ValueError(f"data file {path} is truncated within {header.name}")
        if header.isfile():
            yield header
        if tar.offset >= stop:
            return
    with path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"data file {path} is broken at byte {tar.offset} (there is no member header)")


def _is_read(name: str) -> bool:
    kind = _extension(name).lower()
    return kind in ("json", "txt") or kind.rpartition(".")[2] in IMAGE_ENDINGS or is_video_name(name)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _record(members: Sequence[Member], at: int) -> Any:
    """The record of a key: the content of its ``.json`` with images and videos as bytes, or a caption from its
    ``.txt``. Other members become fields named by their extension (``.wav``)."""
    key = _key(members[0][0])
    described: Any = None
    caption = None
    visuals: list[Member] = []
    others: dict[str, str] = {}
    for name, content in members:
        extension = _extension(name).lower()
        if extension == "json":
            try:
                described = parse_record(content, at)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                described = Malformed(f"{name} is not JSON ({error})")
        elif extension == "txt":
            caption = content.decode("utf-8", errors="replace").strip()
        elif _is_read(name):
            visuals.append((name, content))
        else:
            others[f".{extension.rpartition('.')[2]}"] = name
    images, videos = _by_kind(described if isinstance(described, Mapping) else {}, visuals)
    has_turns = isinstance(described, Mapping) and ("conversations" in described or "messages" in described)
    if caption is not None and not has_turns:
        question = f"{IMAGE}\n" * len(images) + f"{VIDEO}\n" * len(videos)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        record = described if isinstance(described, Mapping) else {}
        found: dict[str, Any] = {"images": [content for _, content in images], "image": None}
        if videos:
            found |= {"videos": [content for _, content in videos], "video": None}
        return {"id": key, **record, **others, **found, "conversations": turns}
    if not isinstance(described, Mapping):
        return {"id": key, **others} if described is None else described
    if caption is not None:
        others[".txt"] = caption
    found = {"images": _contents(described, "image", images), "image": None}
    if videos:
        found |= {"videos": _contents(described, "video", videos), "video": None}
    return {"id": key, **described, **others, **found}


def _by_kind(record: Mapping[str, Any], visuals: Sequence[Member]) -> tuple[list[Member], list[Member]]:
    """The images and the videos. A GIF is an image, unless the record names it as a video."""
    names = _listed(record, "video") or []
    videos = [
        (name, content)
        for name, content in visuals
        if _extension(name).lower().rpartition(".")[2] not in IMAGE_ENDINGS or any(k in names for k in _names(name))
    ]
    return [member for member in visuals if member not in videos], videos


def _names(name: str) -> tuple[str, ...]:
    """How a record may refer to a member."""
    return name, name.rpartition("/")[2], _extension(name)


def _listed(record: Mapping[str, Any], field: str) -> list[Any] | None:
    """What a record has in ``field`` or its plural; ``None`` if it has neither."""
    names = record.get(field) if record.get(f"{field}s") is None else record[f"{field}s"]
    return names if isinstance(names, list) or names is None else [names]


def _contents(record: Mapping[str, Any], field: str, members: Sequence[Member]) -> list[Any]:
    """The images (or videos) in the order in which the record names them, or in the tar's order if the record names
    none of these members. A name without a member is kept and looked up in the source's folder."""
    names, contents = _listed(record, field), [content for _, content in members]
    if names is None:
        return contents
    by_name: dict[str, bytes] = {}
    for name, content in members:
        for known in _names(name):
            by_name.setdefault(known, content)
    named = [by_name.get(name) if isinstance(name, str) else None for name in names]
    if len(names) == len(contents) and not any(content is not None for content in named):
        return contents
    return [name if content is None else content for name, content in zip(names, named, strict=True)]
