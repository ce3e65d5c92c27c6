"""Converts records in the LLaVA form (``conversations``) or the ``messages`` form to conversations.

A malformed record becomes a conversation with an ``error``, so that it is counted and reported instead of ending a run.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.chat import UNSUPERVISED, Turn
from vtprune_train.data.fields import (
    CHAT_RECORD,
    CHAT_TOOL_TURN,
    CHAT_TURN,
    CONVERSATIONS,
    IMAGES,
    RECORD,
    SYSTEM,
    TURN,
    VIDEOS,
    WITH_AUTO,
    check_fields,
    check_marks,
    is_empty,
)
from vtprune_train.data.message_fields import message_fields, tools_turn
from vtprune_train.data.sources import find_files, open_reader
from vtprune_train.data.sources.base import BOUNDS, Bounds, Malformed, TooLarge, utf8_length
from vtprune_train.data.turns import TOOLS
from vtprune_train.data.videos import is_video_name
from vtprune_train.data.visuals import VisualFile

CHAT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ("user", "assistant", "system", "tool")}}
_F = TypeVar("_F")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
LONGEST_ID = 4096  # characters; ids are written to logs, metrics and checkpoints
TURN_BYTES = 256  # added per turn, for the template's text around it and the overhead of the object
LONGEST_ERROR = 300  # characters; a record may contain an image as text
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # unpaired: left in JSON where an emoji was cut; cannot be encoded as UTF-8
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PART_IMAGES = ("image", "image_url", "url", "path", "bytes")
IMAGE_VALUE = frozenset(("bytes", "path", "url"))
TEXT_PART, IMAGE_PART = frozenset(("type", "text")), frozenset(("type", "text", "index", *PART_IMAGES))
PART_VIDEOS = ("video", "video_url", "url", "path", "bytes")
TIMES = {
    **dict.fromkeys(("start", "video_start", "start_time"), "start"),
    **dict.fromkeys(("end", "video_end", "end_time"), "end"),
    "fps": "fps",
}
# Settings of a video in the messages of Qwen's own code; here they are those of a run.
SAMPLING = {
    "num_frames": ("num_frames", "nframes"),
    "min_frames": ("min_frames",),
    "max_frames": ("max_frames",),
    "fps": ("sample_fps", "raw_fps"),
    "max_pixels": ("max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width"),
}
VIDEO_VALUE = frozenset(("video", "bytes", "path", "url", *TIMES))
VIDEO_PART = frozenset(("type", "text", "index", *PART_VIDEOS, *TIMES))
PLACEHOLDER = re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")
_LEADING_IMAGES = re.compile(rf"(?:(?:{re.escape(IMAGE)}|{re.escape(VIDEO)})\s*)*")


@dataclass(frozen=True)
class Video:
    """A video of a record.

    Args:
        file: name of a file or of a folder of frames, encoded bytes, or the names of the files of its frames.
        start, end: the part of the video in seconds, both inclusive; ``None`` for its start or end.
        fps: frames per second of a folder or list of frames.
    """

    file: str | bytes | tuple[str, ...]
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    def source(self, folder: Path) -> Path | bytes | tuple[Path, ...]:
        """The video in ``folder``, or its content."""
        if isinstance(self.file, tuple):
            return tuple(folder / name for name in self.file)
        return folder / self.file if isinstance(self.file, str) else self.file


@dataclass(frozen=True)
class Conversation:
    """One record.

    Args:
        id: the record's id, or its file and number.
        turns: the messages.
        images: names of files, or encoded bytes.
        error: why the record cannot be used; a :class:`~vtprune_train.data.sources.base.TooLarge` if only its size is
            the reason; empty if it can be used.
        unread: names of fields that are not read and may have a meaning.
        videos: see :class:`Video`.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    images: tuple[str | bytes, ...] = ()
    error: str = ""
    unread: frozenset[str] = field(default=frozenset(), compare=False)
    videos: tuple[Video, ...] = ()

    def image_files(self, folder: Path) -> list[Path | bytes]:
        """The file of each image in ``folder``, or its content."""
        return [folder / image if isinstance(image, str) else image for image in self.images]

    def files(self, images: Path, videos: Path) -> list[VisualFile]:
        """The images and videos in the order of their placeholders, in these folders."""
        left = iter(enumerate(self.image_files(images))), iter(enumerate(self.videos))
        return [
            _video_file(*next(left[1]), videos) if mark == VIDEO else _image_file(*next(left[0]))
            for turn in self.turns
            for mark in (PLACEHOLDER.findall(turn.text) if self.videos else [IMAGE] * turn.text.count(IMAGE))
        ]


def _image_file(number: int, source: Path | bytes) -> VisualFile:
    return VisualFile(_named(source, number), source)


def _video_file(number: int, video: Video, folder: Path) -> VisualFile:
    source = video.source(folder)
    name = f"{source[0]} and {len(source) - 1} more" if isinstance(source, tuple) else _named(source, number)
    return VisualFile(shortened(name), source, True, video.start, video.end, video.fps)


def _named(source: Path | bytes, number: int) -> str:
    """The name of an image or video in messages."""
    return f"{number + 1} of the record" if isinstance(source, bytes) else shortened(str(source))


@dataclass(frozen=True)
class Prompt:
    """Text that an entry of the data adds to each of its conversations.

    Args:
        system: system prompt of conversations without one, instead of the template's; empty for no system prompt.
        prefix: inserted before the text of the first user turn, after its leading ``<image>`` and ``<video>``
            placeholders.
        suffix: appended to the first user turn.
    """

    system: str | None = None
    prefix: str = ""
    suffix: str = ""

    def apply(self, conversation: Conversation) -> Conversation:
        """Return the conversation with this prompt."""
        if self.system is None and not self.prefix and not self.suffix:
            return conversation
        turns = list(conversation.turns)
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            return conversation
        text = turns[first].text
        match = _LEADING_IMAGES.match(text)
        images = match.group() if match else ""
        turns[first] = replace(turns[first], text=f"{images}{self.prefix}{text[len(images) :]}{self.suffix}")
        if self.system is not None and all(turn.role != "system" for turn in turns):
            turns.insert(0, Turn("system", self.system))
        return replace(conversation, turns=tuple(turns))


NO_PROMPT = Prompt()


def read_records(
    path: Path, ignore: Collection[str] = (), bounds: Bounds = BOUNDS, reader: str = "", *, chat: bool = False
) -> Iterator[Conversation]:
    """Yield all conversations of a data file, or of the files of a folder or glob.

    Args:
        ignore: see :func:`normalize`.
        bounds: a record that exceeds them has an ``error`` and no content.
        reader: path of a reader outside the package.
        chat: see :func:`normalize`.

    Raises:
        ValueError: see :func:`vtprune_train.data.sources.find_files` and the readers.
    """
    for file in find_files(path, reader):
        opened = open_reader(file, bounds.record, reader)
        records = (record for piece in opened.pieces() for _, record in opened.scan(piece))
        for number, record in enumerate(records):
            yield normalize(record, default_id(file, number), ignore, bounds.text, chat=chat)


def default_id(file: Path, number: int) -> str:
    """The id for a record without one."""
    return f"{file.stem}-{number}"


def normalize(
    record: Any, default_id: str, ignore: Collection[str] = (), max_text: int = BOUNDS.text, *, chat: bool = False
) -> Conversation:
    """Convert a record to a conversation; ``error`` says why if it cannot be used.

    Args:
        default_id: id of a record without one.
        ignore: fields and markers (``<audio>``) that are accepted although they would be rejected.
        max_text: limit of :func:`text_bytes`.
        chat: the checkpoint's chat template formats the conversation (``data.template: auto``), so it may have tools,
            reasoning, and turns in any order that ends with an answer.
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
        parser = _Parser(ignore, unread, chat)
        turns, parts = parser.turns(record)
        if (size := text_bytes(turns)) > max_text:
            counted = f" ({TURN_BYTES} are counted for each turn)" if TURN_BYTES * len(turns) > max_text // 2 else ""
            reason = (
                f"its text has {size} bytes in {len(turns)} turns{counted}, more than data.max_text_bytes={max_text}"
            )
            return Conversation(name, error=TooLarge(reason), unread=frozenset(unread))
        images = _images(record, [part for part in parts if not part.is_video], parser)
        videos = _videos(record, [part for part in parts if part.is_video], parser, ignore)
        videos = _with_times(videos, parser.times(record)) if videos else []
        read = (CHAT_RECORD if chat else RECORD) | (TIMES.keys() if videos else set())
        unread |= check_fields(record, read, ignore, answer=None, has_images=bool(images))
        turns = _with_video_marks(turns, images, videos)
        _check(turns, images, videos, chat)
        for turn in turns:
            if turn.role not in ("assistant", TOOLS):
                check_marks(turn.text, ignore, has_images=bool(images), has_videos=bool(videos))
    except RecursionError:
        return Conversation(name, error="its values are nested too deeply", unread=frozenset(unread))
    except ValueError as refusal:
        return Conversation(name, error=shortened(str(refusal)), unread=frozenset(unread))
    return Conversation(name, tuple(turns), tuple(images), unread=frozenset(unread), videos=tuple(videos))


def text_bytes(turns: Sequence[Turn]) -> int:
    """Bytes of a conversation's text, plus ``TURN_BYTES`` for each turn."""
    return sum(utf8_length(turn.text) + utf8_length(turn.fields) for turn in turns) + TURN_BYTES * len(turns)


def _id(value: Any) -> str:
    """An id as text."""
    name = _SURROGATE.sub("?", str(value))
    if len(name) > LONGEST_ID:
        raise ValueError(f"its id has {len(name)} characters, more than {LONGEST_ID}; shorten it or leave it out")
    return name


def shortened(text: str) -> str:
    """``text``, truncated for a message."""
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}... ({len(text)} characters)"


@dataclass(frozen=True)
class _Part:
    """An image or video in the content of a turn: itself, or its index in the record's list."""

    image: str | bytes | None = None
    index: int | None = None
    video: Video | None = None
    is_video: bool = False


class _Parser:
    """Parses the turns of one record and collects the names of fields that are not read in ``unread``."""

    def __init__(self, ignore: Collection[str], unread: set[str], chat: bool):
        self._ignore, self._unread, self._chat = ignore, unread, chat

    def turns(self, record: Mapping[str, Any]) -> tuple[list[Turn], list[_Part]]:
        """The turns, and a part for each of their images."""
        forms = [self._conversation(key, record[key]) for key in CONVERSATIONS if not is_empty(record.get(key))]
        if not forms:
            raise ValueError(
                "it has no 'conversations' (LLaVA) or 'messages', or they are empty; its fields: "
                f"{', '.join(map(str, record)) or 'none'}"
            )
        if forms[1:] and forms[0] != forms[1]:
            raise ValueError("'conversations' and 'messages' are both present and differ; remove one of them")
        turns, parts = forms[0]
        prompts = {name: record[name] for name in SYSTEM if record.get(name) is not None and name not in self._ignore}
        for name, prompt in prompts.items():
            if not isinstance(prompt, str):
                raise ValueError(f"its field {name!r} is {prompt!r}; a system prompt must be text")
            if turns[0].role != "system":
                turns.insert(0, Turn("system", prompt))
            elif prompt and turns[0].text != prompt:
                raise ValueError(f"it has two different system prompts, one in {name!r}; remove one of them")
        return [*(tools_turn(record, self._ignore) if self._chat else ()), *turns], parts

    def _conversation(self, key: str, messages: Any) -> tuple[list[Turn], list[_Part]]:
        if isinstance(messages, Mapping):  # the datasets library stores a sequence of objects as an object of lists
            columns = {name: values for name, values in messages.items() if values is not None}
            lengths = {len(values) if isinstance(values, list) else None for values in columns.values()}
            if len(lengths) != 1 or None in lengths:
                raise ValueError(f"{key!r} is an object whose values are not lists of equal length")
            messages = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not isinstance(messages, list):
            raise ValueError(f"{key!r} is a {type(messages).__name__}, not a list of turns")
        turns, parts = [], []
        for number, message in enumerate(messages, 1):
            try:
                turn, images = self._turn(message)
            except ValueError as error:
                raise ValueError(f"{error} (turn {number})") from error
            turns.append(turn)
            parts += images
        return turns, parts

    def _turn(self, message: Any) -> tuple[Turn, list[_Part]]:
        if not isinstance(message, Mapping):
            raise ValueError(f"it is a {type(message).__name__}, not an object")
        role, content = _either(message, "from", "role"), _either(message, "value", "content")
        roles = CHAT_ROLES if self._chat else ROLES
        if not isinstance(role, str) or role not in roles:
            hint = f"; {WITH_AUTO}" if isinstance(role, str) and role in CHAT_ROLES else ""
            raise ValueError(f"unknown role {role!r}; known: {', '.join(roles)}{hint}")
        answer, read, fields = roles[role] == "assistant", TURN, ""
        if self._chat:
            read = CHAT_TOOL_TURN if role == "tool" else CHAT_TURN
            fields = message_fields(message, roles[role], self._ignore)
            content = "" if content is None and fields else content
        self._unread |= check_fields(message, read, self._ignore, answer=answer, has_images=False)
        parts: list[_Part] = []
        if isinstance(content, list):
            texts = []
            for part in content:
                text, images = self._part(part)
                texts.append(text)
                parts += images
            content = "".join(texts)
        elif isinstance(content, str):
            parts = _parts_of_text(content)
        if not isinstance(content, str):
            raise ValueError(f"the text of a {role} turn is {content!r}, which is not text")
        return Turn(roles[role], content, fields), parts

    def image(self, image: Any) -> str | bytes:
        """See :func:`_image`; other fields of its object are handled like fields of a record."""
        if isinstance(image, Mapping):
            self._unread |= check_fields(image, IMAGE_VALUE, self._ignore, answer=None, has_images=True)
        return _image(image)

    def _part(self, part: Any) -> tuple[str, list[_Part]]:
        """The text of one part of a message's content."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            self._unread |= check_fields(part, TEXT_PART, self._ignore, answer=None, has_images=False)
            return part["text"], _parts_of_text(part["text"])
        if kind in ("image", "image_url") and is_empty(part.get("text")):
            self._unread |= check_fields(part, IMAGE_PART, self._ignore, answer=None, has_images=False)
            images = [part[key] for key in PART_IMAGES if not is_empty(part.get(key))]
            if len(images) > 1:
                raise ValueError(f"a part of a message has {len(images)} images; write one part for each image")
            return IMAGE, [_Part(self.image(images[0]) if images else None, part.get("index"))]
        if kind in ("video", "video_url") and is_empty(part.get("text")):
            self._unread |= check_fields(part, VIDEO_PART, self._ignore, answer=None, has_images=False)
            videos = [part[key] for key in PART_VIDEOS if not is_empty(part.get(key))]
            if len(videos) > 1:
                raise ValueError(f"a part of a message has {len(videos)} videos; write one part for each video")
            video = self.video(videos[0], part) if videos else None
            return VIDEO, [_Part(index=part.get("index"), video=video, is_video=True)]
        raise ValueError(
            f"a part of a message is {part!r}; write {{type: text, text: ...}}, {{type: image}}, "
            "{type: image, image: ...} or {type: video, video: ...}"
        )

    def video(self, video: Any, part: Mapping[str, Any] | None = None) -> Video:
        """A video from a path, bytes, a list of frame files, or an object with one of these and optional times.
        ``part`` is the part of a message that contains it, which may have the times."""
        times = self.times(part or {})
        self._check_sampling(part or {})
        if isinstance(video, Mapping):
            self._unread |= check_fields(video, VIDEO_VALUE, self._ignore, answer=None, has_images=True)
            self._check_sampling(video)
            for name, value in self.times(video).items():
                if times.setdefault(name, value) != value:
                    raise ValueError(f"a video has {name}={value:g} and {name}={times[name]:g}; remove one of them")
            names = [key for key in ("bytes", "video", "path", "url") if not is_empty(video.get(key))]
            if len(names) > 1 and (names[0] != "bytes" or len(names) > 2):  # the path beside bytes is their origin
                raise ValueError(f"a video has {' and '.join(names)}; write one of them")
            video = video[names[0]] if names else ""
        if isinstance(video, list | tuple) and video:
            files = tuple(_file(frame, "frame") for frame in video)
            if not all(isinstance(frame, str) for frame in files):
                raise ValueError("a list of frames contains bytes; write the names of files")
            return Video(files, **times)  # type: ignore[arg-type]
        file = _file(video, "video")
        if "fps" in times and isinstance(file, str) and is_video_name(file):
            raise ValueError(
                f"fps={times['fps']:g} of video {file!r}: `fps` is the rate of a folder or list of frames; set the "
                "rate of sampling with data.video.fps, and list `fps` in the entry's `ignore`"
            )
        return Video(file, **times)

    def times(self, values: Mapping[str, Any]) -> dict[str, float]:
        """``start``, ``end`` and ``fps`` from the fields of a video, a part of a message or a record."""
        return _times({key: values[key] for key in TIMES if values.get(key) is not None and key not in self._ignore})

    def _check_sampling(self, values: Mapping[str, Any]) -> None:
        for setting, names in SAMPLING.items():
            for name in names:
                if values.get(name) is not None and name not in self._ignore:
                    raise ValueError(
                        f"a video has {name}={values[name]!r}; set data.video.{setting} for the run, and list `{name}` "
                        "in the entry's `ignore`"
                    )


def _parts_of_text(text: str) -> list[_Part]:
    return [_Part(is_video=mark == VIDEO) for mark in PLACEHOLDER.findall(text)]


def _times(times: Mapping[str, Any]) -> dict[str, float]:
    """``start`` and ``end`` in seconds, and ``fps``, under their canonical names."""
    seconds: dict[str, float] = {}
    for key, value in times.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{key}={value!r} of a video is not a number of at least 0")
        if seconds.setdefault(TIMES[key], float(value)) != value:
            raise ValueError(f"{key}={value!r} of a video, but also {TIMES[key]}={seconds[TIMES[key]]:g}; remove one")
    if seconds.get("start", 0.0) > seconds.get("end", math.inf):
        raise ValueError(f"the part of a video ends at {seconds['end']} s, before its start at {seconds['start']} s")
    if seconds.get("fps") == 0:
        raise ValueError("fps=0 of a video; it must be above 0")
    return seconds


def _either(message: Mapping[str, Any], llava: str, openai: str) -> Any:
    """The value of a field that has one name in the LLaVA form and another in the ``messages`` form."""
    first, second = message.get(llava), message.get(openai)
    if first is not None and second is not None and first != second:
        raise ValueError(f"{llava!r} and {openai!r} are both present and differ; remove one of them")
    return second if first is None else first


def _images(record: Mapping[str, Any], parts: Sequence[_Part], parser: _Parser) -> list[str | bytes]:
    """The images in the order of their placeholders, from the record's fields or from the parts of its turns."""
    keys = [key for key in IMAGES if not is_empty(record.get(key))]
    lists = [
        [parser.image(image) for image in (record[key] if isinstance(record[key], list) else [record[key]])]
        for key in keys
    ]
    if lists[1:] and lists[0] != lists[1]:
        raise ValueError("'images' and 'image' are both present and differ; remove one of them")
    images = lists[0] if lists else []
    in_parts = [part.image for part in parts if part.image is not None]
    if in_parts and len(in_parts) != len(parts):
        raise ValueError(f"{len(parts)} {IMAGE} placeholders, but only {len(in_parts)} of their parts contain an image")
    if in_parts and images and in_parts != images:
        raise ValueError(f"the images in {keys[0]!r} and in the parts of its turns differ")
    return in_parts or _by_index(images, parts, "images")


def _by_index(files: list[_F], parts: Sequence[_Part], kind: str) -> list[_F]:
    """The record's images or videos in the order of their parts, which may have indices."""
    indices = [part.index for part in parts]
    if all(index is None for index in indices):
        return files
    if set(indices) != set(range(len(files))):
        raise ValueError(
            f"the parts of its turns have the {kind[:-1]} indices {indices}, but there are {len(files)} {kind}"
        )
    return [files[index] for index in indices if index is not None]


def _videos(record: Mapping[str, Any], parts: Sequence[_Part], parser: _Parser, ignore: Collection[str]) -> list[Video]:
    """The videos in the order of their placeholders, from the record's fields or from the parts of its turns."""
    keys = [key for key in VIDEOS if not is_empty(record.get(key)) and key not in ignore]
    lists = [
        [parser.video(video) for video in (record[key] if isinstance(record[key], list) else [record[key]])]
        for key in keys
    ]
    if lists[1:] and lists[0] != lists[1]:
        raise ValueError("'videos' and 'video' are both present and differ; remove one of them")
    videos = lists[0] if lists else []
    in_parts = [part.video for part in parts if part.video is not None]
    if in_parts and len(in_parts) != len(parts):
        raise ValueError(f"{len(parts)} {VIDEO} placeholders, but only {len(in_parts)} of their parts contain a video")
    if in_parts and videos and in_parts != videos:
        raise ValueError(f"the videos in {keys[0]!r} and in the parts of its turns differ")
    return in_parts or _by_index(videos, parts, "videos")


def _with_times(videos: list[Video], times: Mapping[str, float]) -> list[Video]:
    """The videos with the times in the fields of their record."""
    if "fps" in times:
        videos = [replace(video, fps=times["fps"]) if video.fps is None else video for video in videos]
    part = {name: value for name, value in times.items() if name != "fps"}
    if not part:
        return videos
    if len(videos) > 1:
        raise ValueError(
            f"its field {next(iter(part))!r} belongs to one of its {len(videos)} videos; write it into the value of "
            "that video: {video: a.mp4, start: 2.5}"
        )
    for name, value in part.items():
        if (of_video := getattr(videos[0], name)) not in (None, value):
            raise ValueError(
                f"its video has {name}={of_video:g}, but the record has {name}={value:g}; remove one of them"
            )
    video = videos[0]
    return [replace(video, start=part.get("start", video.start), end=part.get("end", video.end))]


def _image(image: Any) -> str | bytes:
    """An image from a path, bytes, ``{bytes, path}`` as the datasets library stores images, ``{url}``, or a data
    URL."""
    if isinstance(image, Mapping):
        inside = image.get("bytes")
        image = (image.get("path") or image.get("url")) if inside is None else inside
    return _file(image, "image")


def _file(value: Any, what: str) -> str | bytes:
    """The name of a file, or its content from bytes or a data URL; ``what`` names it in errors."""
    if isinstance(value, str) and value.startswith("data:"):
        return _decoded(value, what)
    if isinstance(value, str) and (scheme := _URL.match(value)):
        if scheme.group() != "file://":
            raise ValueError(f"{what} {value!r} is not a local file; download it and use its path")
        return value.removeprefix("file://")
    if isinstance(value, str | bytes) and value:
        return value
    shown = "empty" if value == b"" or value == "" else repr(value)
    raise ValueError(f"{what} is {shown}; use a path, bytes, {{bytes, path}}, or a list of them")


def _decoded(url: str, what: str) -> bytes:
    kind, _, content = url.partition(",")
    try:
        if kind.endswith(";base64") and content:
            return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{what} {url[:40]}... is not base64 ({error})") from error
    raise ValueError(f"{what} {url[:40]}... is a data URL without base64 content")


def _with_video_marks(turns: list[Turn], images: list[str | bytes], videos: list[Video]) -> list[Turn]:
    """Replace ``<image>`` by ``<video>`` in LLaVA-Video's data, which marks videos with ``<image>``."""
    texts = "".join(turn.text for turn in turns)
    if not videos or images or VIDEO in texts or texts.count(IMAGE) != len(videos):
        return turns
    return [replace(turn, text=turn.text.replace(IMAGE, VIDEO)) for turn in turns]


def _check(turns: list[Turn], images: list[str | bytes], videos: list[Video], chat: bool) -> None:
    spoken = [turn for turn in turns if turn.role not in ("system", TOOLS)]
    if not chat:
        _check_order(turns, spoken)
    elif not any(turn.role == "assistant" for turn in turns):
        raise ValueError(UNSUPERVISED)
    elif turns[-1].role != "assistant":
        raise ValueError(f"the conversation ends with a {turns[-1].role} turn, which has no answer to train on")
    if turns[-1].is_prefix or any(turn.is_prefix and after.role != "assistant" for turn, after in pairwise(turns)):
        raise ValueError("an assistant turn with `prefix` is not followed by the assistant turn that continues it")
    texts = (text for turn in turns for text in (turn.text, turn.fields))
    if half := next(filter(None, map(_SURROGATE.search, texts)), None):
        raise ValueError(f"its text contains an unpaired surrogate ({half.group()!a}), probably from a cut emoji")
    kinds: list[tuple[str, str, Sequence[Any]]] = [(IMAGE, "image(s)", images)]
    kinds += [(VIDEO, "video(s)", videos)] if videos else []
    for mark, what, listed in kinds:
        if any(mark in turn.text for turn in turns if turn.role not in ("user", "tool")):
            raise ValueError(f"{mark} is outside a user turn")
        placeholders = sum(turn.text.count(mark) for turn in spoken)
        if placeholders != len(listed):
            hint = ""
            if mark == VIDEO and placeholders == 1 and all(_is_image_name(video.file) for video in listed):
                hint = "; write the frames of one video as {video: [a.jpg, b.jpg]}"
            raise ValueError(f"{len(listed)} {what} but {placeholders} {mark} in the text{hint}")


def _is_image_name(file: Any) -> bool:
    return isinstance(file, str) and file.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))


def _check_order(turns: list[Turn], spoken: list[Turn]) -> None:
    """Check the turns for a named or custom template."""
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn is not the first turn")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    roles = [turn.role for turn in spoken]
    if roles != expected[: len(spoken)] or not spoken:
        hint = "; `data.template: auto` takes other orders" if roles else ""
        raise ValueError(f"turns must alternate and start with the user; they are {roles}{hint}")
    if len(spoken) == 1:
        raise ValueError(UNSUPERVISED)
    if len(spoken) % 2:
        raise ValueError("the conversation ends with a user turn, so its last question has no answer to train on")
