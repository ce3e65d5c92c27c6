"""Records to conversations: the LLaVA form (``conversations``) and the ``messages`` form, whatever file they came from.

A record that is malformed keeps its place with an ``error``, so that it can be counted and named instead of ending a
run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtprune_train.data.chat import Turn
from vtprune_train.data.sources import Malformed, find_files, open_reader
from vtprune_train.stream import IMAGE

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LEADING_IMAGES = re.compile(rf"(?:{re.escape(IMAGE)}\s*)*")


@dataclass(frozen=True)
class Conversation:
    """One record: its turns, and its pictures as names of files or as encoded bytes; ``error`` is empty if it can be
    used."""

    id: str
    turns: tuple[Turn, ...] = ()
    images: tuple[str | bytes, ...] = ()
    error: str = ""

    def pictures(self, folder: Path) -> list[Path | bytes]:
        """Where each picture is read from."""
        return [folder / image if isinstance(image, str) else image for image in self.images]


@dataclass(frozen=True)
class Prompt:
    """What a source adds to each of its conversations.

    Args:
        system: the system prompt of conversations that bring none, in place of the template's; empty for none at all.
        prefix: written before the first user turn's text, behind the ``<image>`` placeholders that lead it.
        suffix: written at the end of the first user turn.
    """

    system: str | None = None
    prefix: str = ""
    suffix: str = ""

    def apply(self, conversation: Conversation) -> Conversation:
        """The conversation as it is trained on."""
        if self.system is None and not self.prefix and not self.suffix:
            return conversation
        turns = list(conversation.turns)
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            return conversation
        text = turns[first].text
        match = _LEADING_IMAGES.match(text)
        images = match.group() if match else ""
        turns[first] = Turn("user", f"{images}{self.prefix}{text[len(images) :]}{self.suffix}")
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.system))
        return replace(conversation, turns=tuple(turns))


NO_PROMPT = Prompt()


def read_records(path: Path) -> Iterator[Conversation]:
    """All conversations of a data file (or a folder, or a glob of files), one at a time.

    Raises:
        ValueError: see :func:`vtprune_train.data.sources.find_files` and its readers.
    """
    for file in find_files(path):
        reader = open_reader(file)
        records = (record for piece in reader.pieces() for _, record in reader.scan(piece))
        for number, record in enumerate(records):
            yield normalize(record, default_id(file, number))


def default_id(file: Path, number: int) -> str:
    """What a record without an ``id`` is called."""
    return f"{file.stem}-{number}"


def normalize(record: Any, default_id: str) -> Conversation:
    """One record as a conversation; what is wrong with it goes to ``error``."""
    name = default_id
    try:
        if isinstance(record, Malformed):
            raise ValueError(record)
        if not isinstance(record, Mapping):
            raise ValueError(f"the record is a {type(record).__name__}, not an object")
        name = default_id if record.get("id") is None else str(record["id"])
        turns = _turns(record)
        images = _images(record)
        _check(turns, images)
    except ValueError as error:
        return Conversation(name, error=str(error))
    return Conversation(name, tuple(turns), tuple(images))


def _turns(record: Mapping[str, Any]) -> list[Turn]:
    messages = record.get("conversations")
    if messages is None:
        messages = record.get("messages")
    if isinstance(messages, Mapping):  # how `datasets` writes a sequence of objects: an object of lists
        messages = [dict(zip(messages, values, strict=False)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has neither 'conversations' (LLaVA) nor 'messages', or they are empty")
    turns = [_turn(message) for message in messages]
    if isinstance(record.get("system"), str) and turns[0].role != "system":
        turns.insert(0, Turn("system", record["system"]))
    return turns


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"a turn is a {type(message).__name__}, not an object")
    role = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the text of a {role} turn is {content!r}")
    return Turn(ROLES[role], content)


def _part(part: Any) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a part of a message is {part!r}; use {{type: text, text: ...}} or {{type: image}}")


def _images(record: Mapping[str, Any]) -> list[str | bytes]:
    images = record.get("images")
    if images is None:
        images = record.get("image")
    if images is None or images == "":
        return []
    return [_image(image) for image in (images if isinstance(images, list) else [images])]


def _image(image: Any) -> str | bytes:
    """A path, bytes, or ``{bytes, path}`` as `datasets` stores pictures."""
    if isinstance(image, Mapping):
        inside = image.get("bytes")
        image = image.get("path") if inside is None else inside
    if isinstance(image, str | bytes) and image:
        return image
    shown = "empty" if image == b"" or image == "" else repr(image)
    raise ValueError(f"image is {shown}; use a path, bytes, {{bytes, path}}, or a list of them")


def _check(turns: list[Turn], images: list[str | bytes]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn stands after the first turn")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    if [turn.role for turn in spoken] != expected[: len(spoken)] or not spoken:
        raise ValueError(f"turns must alternate, the user first; they are {[turn.role for turn in spoken]}")
    if len(spoken) % 2:
        raise ValueError("the conversation ends with a user turn, so its last question has no answer to learn")
    if any(IMAGE in turn.text for turn in turns if turn.role != "user"):
        raise ValueError(f"{IMAGE} stands outside a user turn")
    placeholders = sum(turn.text.count(IMAGE) for turn in spoken)
    if placeholders != len(images):
        raise ValueError(f"{len(images)} image(s) but {placeholders} {IMAGE} in the text")
