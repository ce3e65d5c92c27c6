"""Records to conversations: the LLaVA form (``conversations``) and the ``messages`` form, whatever file they came from.

A record that is malformed keeps its place with an ``error``, so that it can be counted and named instead of ending a
run.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vtprune_train.core.stream import IMAGE
from vtprune_train.data.chat import UNSUPERVISED, Turn
from vtprune_train.data.fields import CONVERSATIONS, IMAGES, RECORD, SYSTEM, TURN, check_fields, check_marks, is_empty
from vtprune_train.data.sources import find_files, open_reader
from vtprune_train.data.sources.base import BOUNDS, Bounds, Malformed, TooLarge, utf8_length

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
LONGEST_ID = 4096  # characters; ids stand in logs, metrics and checkpoints
TURN_BYTES = 256  # that a turn counts beside its text: for what the template writes around it, and as an object
LONGEST_ERROR = 300  # characters; a record with an image as text would fill the log
_HALF = re.compile(r"[\ud800-\udfff]")  # of a character: what cutting an emoji leaves in JSON, and no UTF-8 can hold
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PART_IMAGES = ("image", "image_url", "url", "path", "bytes")
IMAGE_VALUE = frozenset(("bytes", "path", "url"))
TEXT_PART, IMAGE_PART = frozenset(("type", "text")), frozenset(("type", "text", "index", *PART_IMAGES))
_LEADING_IMAGES = re.compile(rf"(?:{re.escape(IMAGE)}\s*)*")


@dataclass(frozen=True)
class Conversation:
    """One record: its turns, and its images as names of files or as encoded bytes; ``error`` is empty if it can be
    used, and a :class:`~vtprune_train.data.sources.TooLarge` where only its size is wrong. ``unread`` names fields that
    are not read and may say something."""

    id: str
    turns: tuple[Turn, ...] = ()
    images: tuple[str | bytes, ...] = ()
    error: str = ""
    unread: frozenset[str] = field(default=frozenset(), compare=False)

    def image_files(self, folder: Path) -> list[Path | bytes]:
        """Where each image is read from."""
        return [folder / image if isinstance(image, str) else image for image in self.images]


@dataclass(frozen=True)
class Prompt:
    """What a source adds to each of its conversations.

    Args:
        system: the system prompt of conversations that bring none, in place of the template's; empty for none at all.
        prefix: written before the first user turn's text, after the ``<image>`` placeholders that lead it.
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


def read_records(
    path: Path, ignore: Collection[str] = (), bounds: Bounds = BOUNDS, reader: str = ""
) -> Iterator[Conversation]:
    """Yield all conversations of a data file, or of the files of a folder or glob.

    Args:
        ignore: see :func:`normalize`.
        bounds: a record that exceeds them has an ``error`` and no content.
        reader: path of a reader outside the package.

    Raises:
        ValueError: see :func:`vtprune_train.data.sources.find_files` and the readers.
    """
    for file in find_files(path, reader):
        opened = open_reader(file, bounds.record, reader)
        records = (record for piece in opened.pieces() for _, record in opened.scan(piece))
        for number, record in enumerate(records):
            yield normalize(record, default_id(file, number), ignore, bounds.text)


def default_id(file: Path, number: int) -> str:
    """What a record without an ``id`` is called."""
    return f"{file.stem}-{number}"


def normalize(record: Any, default_id: str, ignore: Collection[str] = (), max_text: int = BOUNDS.text) -> Conversation:
    """One record as a conversation; what is wrong with it goes to ``error``.

    Args:
        default_id: what it is called without an ``id``.
        ignore: fields and marks (``<video>``) that change nothing here, so that they are not refused.
        max_text: bytes of text that it may have (see :func:`text_bytes`).
    """
    name = default_id
    unread: set[str] = set()
    if isinstance(record, TooLarge):
        return Conversation(name, error=record)
    try:
        if isinstance(record, Malformed):
            raise ValueError(record)
        if not isinstance(record, Mapping):
            raise ValueError(f"the record is a {type(record).__name__}, not an object")
        name = default_id if record.get("id") is None else _id(record["id"])
        read = _Reading(ignore, unread)
        turns, brought = read.turns(record)
        if (size := text_bytes(turns)) > max_text:
            counted = f" ({TURN_BYTES} are counted for each turn)" if TURN_BYTES * len(turns) > max_text // 2 else ""
            what = f"its text has {size} bytes in {len(turns)} turns{counted}, more than data.max_text_bytes={max_text}"
            return Conversation(name, error=TooLarge(what), unread=frozenset(unread))
        images = _images(record, brought, read)
        unread |= check_fields(record, RECORD, ignore, answer=None, has_images=bool(images))
        _check(turns, images)
        for turn in turns:
            if turn.role != "assistant":
                check_marks(turn.text, ignore, has_images=bool(images))
    except RecursionError:
        return Conversation(name, error="its values are nested too deeply", unread=frozenset(unread))
    except ValueError as error:
        return Conversation(name, error=shortened(str(error)), unread=frozenset(unread))
    return Conversation(name, tuple(turns), tuple(images), unread=frozenset(unread))


def text_bytes(turns: Sequence[Turn]) -> int:
    """Bytes of all texts of a conversation, and ``TURN_BYTES`` for each turn."""
    return sum(utf8_length(turn.text) for turn in turns) + TURN_BYTES * len(turns)


def _id(value: Any) -> str:
    """An id as a text that fits into messages."""
    name = _HALF.sub("?", str(value))
    if len(name) > LONGEST_ID:
        raise ValueError(f"its id has {len(name)} characters, more than {LONGEST_ID}; shorten it or leave it out")
    return name


def shortened(text: str) -> str:
    """``text`` as it may stand in a message."""
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}... ({len(text)} characters)"


@dataclass(frozen=True)
class _Part:
    """What a turn's content brings beside its text: an image, or the number of one among the record's."""

    image: str | bytes | None = None
    index: int | None = None


class _Reading:
    """Reads the turns of one record; fields that are not read and may say something go to ``unread``."""

    def __init__(self, ignore: Collection[str], unread: set[str]):
        self._ignore, self._unread = ignore, unread

    def turns(self, record: Mapping[str, Any]) -> tuple[list[Turn], list[_Part]]:
        """The turns, and what their content says of each image."""
        forms = [self._conversation(key, record[key]) for key in CONVERSATIONS if not is_empty(record.get(key))]
        if not forms:
            raise ValueError(
                "it has neither 'conversations' (LLaVA) nor 'messages', or they are empty; its fields: "
                f"{', '.join(map(str, record)) or 'none'}"
            )
        if forms[1:] and forms[0] != forms[1]:
            raise ValueError("'conversations' and 'messages' are both there and differ; leave one of them out")
        turns, parts = forms[0]
        prompts = {name: record[name] for name in SYSTEM if record.get(name) is not None and name not in self._ignore}
        for name, prompt in prompts.items():
            if not isinstance(prompt, str):
                raise ValueError(f"its field {name!r} is {prompt!r}; a system prompt is a text")
            if turns[0].role != "system":
                turns.insert(0, Turn("system", prompt))
            elif prompt and turns[0].text != prompt:
                raise ValueError(f"it has two system prompts that differ, one in {name!r}; leave one of them out")
        return turns, parts

    def _conversation(self, key: str, messages: Any) -> tuple[list[Turn], list[_Part]]:
        if isinstance(messages, Mapping):  # how `datasets` writes a sequence of objects: an object of lists
            columns = {name: values for name, values in messages.items() if values is not None}
            lengths = {len(values) if isinstance(values, list) else None for values in columns.values()}
            if len(lengths) != 1 or None in lengths:
                raise ValueError(f"{key!r} is an object, but not one of lists of equal length")
            messages = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not isinstance(messages, list):
            raise ValueError(f"{key!r} is a {type(messages).__name__}, not a list of turns")
        turns, parts = [], []
        for number, message in enumerate(messages, 1):
            try:
                turn, brought = self._turn(message)
            except ValueError as error:
                raise ValueError(f"{error} (turn {number})") from error
            turns.append(turn)
            parts += brought
        return turns, parts

    def _turn(self, message: Any) -> tuple[Turn, list[_Part]]:
        if not isinstance(message, Mapping):
            raise ValueError(f"it is a {type(message).__name__}, not an object")
        role, content = _either(message, "from", "role"), _either(message, "value", "content")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
        answer = ROLES[role] == "assistant"
        self._unread |= check_fields(message, TURN, self._ignore, answer=answer, has_images=False)
        parts: list[_Part] = []
        if isinstance(content, list):
            texts = []
            for part in content:
                text, brought = self._part(part)
                texts.append(text)
                parts += brought
            content = "".join(texts)
        elif isinstance(content, str):
            parts = [_Part()] * content.count(IMAGE)
        if not isinstance(content, str):
            raise ValueError(f"the text of a {role} turn is {content!r}")
        return Turn(ROLES[role], content), parts

    def image(self, image: Any) -> str | bytes:
        """See :func:`_image`; what else its object says is read or refused like a record's fields."""
        if isinstance(image, Mapping):
            self._unread |= check_fields(image, IMAGE_VALUE, self._ignore, answer=None, has_images=True)
        return _image(image)

    def _part(self, part: Any) -> tuple[str, list[_Part]]:
        """The text of one part of a message's content."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            self._unread |= check_fields(part, TEXT_PART, self._ignore, answer=None, has_images=False)
            return part["text"], [_Part()] * part["text"].count(IMAGE)
        if kind in ("image", "image_url") and is_empty(part.get("text")):
            self._unread |= check_fields(part, IMAGE_PART, self._ignore, answer=None, has_images=False)
            images = [part[key] for key in PART_IMAGES if not is_empty(part.get(key))]
            if len(images) > 1:
                raise ValueError(f"a part of a message brings {len(images)} images; write a part for each")
            return IMAGE, [_Part(self.image(images[0]) if images else None, part.get("index"))]
        raise ValueError(
            f"a part of a message is {part!r}; use {{type: text, text: ...}}, {{type: image}} or "
            "{type: image, image: ...}"
        )


def _either(message: Mapping[str, Any], llava: str, openai: str) -> Any:
    """The value of a field that has a name in each form."""
    first, second = message.get(llava), message.get(openai)
    if first is not None and second is not None and first != second:
        raise ValueError(f"{llava!r} and {openai!r} are both there and differ; leave one of them out")
    return second if first is None else first


def _images(record: Mapping[str, Any], parts: Sequence[_Part], read: _Reading) -> list[str | bytes]:
    """The images in the order of their placeholders: the record's, or those of the parts of its turns."""
    named = [key for key in IMAGES if not is_empty(record.get(key))]
    forms = [
        [read.image(image) for image in (record[key] if isinstance(record[key], list) else [record[key]])]
        for key in named
    ]
    if forms[1:] and forms[0] != forms[1]:
        raise ValueError("'images' and 'image' are both there and differ; leave one of them out")
    images = forms[0] if forms else []
    brought = [part.image for part in parts if part.image is not None]
    if brought and len(brought) != len(parts):
        raise ValueError(f"{len(parts)} {IMAGE} but {len(brought)} of them bring an image in their part")
    if brought and images and brought != images:
        raise ValueError(f"{named[0]!r} and the parts of its turns both bring images, and they differ")
    indices = [part.index for part in parts]
    if not brought and any(index is not None for index in indices):
        if set(indices) != set(range(len(images))):
            raise ValueError(f"the parts of its turns number the images {indices}, but there are {len(images)}")
        return [images[index] for index in indices if index is not None]
    return brought or images


def _image(image: Any) -> str | bytes:
    """A path, bytes, ``{bytes, path}`` as `datasets` stores images, ``{url}``, or a data URL."""
    if isinstance(image, Mapping):
        inside = image.get("bytes")
        image = (image.get("path") or image.get("url")) if inside is None else inside
    if isinstance(image, str) and image.startswith("data:"):
        return _decoded(image)
    if isinstance(image, str) and (scheme := _URL.match(image)):
        if scheme.group() != "file://":
            raise ValueError(f"image {image!r} is not on this machine; download it and name the file")
        return image.removeprefix("file://")
    if isinstance(image, str | bytes) and image:
        return image
    shown = "empty" if image == b"" or image == "" else repr(image)
    raise ValueError(f"image is {shown}; use a path, bytes, {{bytes, path}}, or a list of them")


def _decoded(url: str) -> bytes:
    kind, _, content = url.partition(",")
    try:
        if kind.endswith(";base64") and content:
            return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image {url[:40]}... is not base64 ({error})") from error
    raise ValueError(f"image {url[:40]}... is a data URL without base64 content")


def _check(turns: list[Turn], images: list[str | bytes]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn stands after the first turn")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    if [turn.role for turn in spoken] != expected[: len(spoken)] or not spoken:
        raise ValueError(f"turns must alternate, the user first; they are {[turn.role for turn in spoken]}")
    if len(spoken) == 1:
        raise ValueError(UNSUPERVISED)
    if len(spoken) % 2:
        raise ValueError("the conversation ends with a user turn, so its last question has no answer to learn")
    if half := next(filter(None, (_HALF.search(turn.text) for turn in turns)), None):
        raise ValueError(f"its text holds half of a character ({half.group()!a}), as cutting an emoji leaves it")
    if any(IMAGE in turn.text for turn in turns if turn.role != "user"):
        raise ValueError(f"{IMAGE} stands outside a user turn")
    placeholders = sum(turn.text.count(IMAGE) for turn in spoken)
    if placeholders != len(images):
        raise ValueError(f"{len(images)} image(s) but {placeholders} {IMAGE} in the text")
