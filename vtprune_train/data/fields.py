"""Rules for the fields of a record: fields that are read, that would change the training and are refused, or that have
no effect.

A refused field makes its record malformed, because training on the rest of the record would be training on something
else. docs/data_format.md lists all fields.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Set
from functools import lru_cache
from typing import Any

from vtprune_train.core.stream import VIDEO

CONVERSATIONS = ("conversations", "messages")
IMAGES = ("images", "image")
VIDEOS = ("videos", "video")
SYSTEM = ("system", "system_prompt", "system_message")
RECORD = frozenset(("id", *CONVERSATIONS, *IMAGES, *VIDEOS, *SYSTEM))
TURN = frozenset(("from", "role", "value", "content"))
# Read only for a checkpoint's chat template (`data.template: auto`).
CHAT_RECORD = RECORD | {"tools"}
CHAT_TURN = TURN | {"reasoning_content", "reasoning", "thinking", "tool_calls", "prefix"}
CHAT_TOOL_TURN = TURN | {"tool_call_id", "name"}

LONGEST_NAME = 256  # characters of a field's name
VIDEO_FIELD = "a video"
FLAG, WEIGHT, NOT_TRAINED, IMAGE_FIELD = "a flag that selects what is trained on", "a weight", "a mask", "an image"
LIKE_A_FLAG = "what seems to be a flag that selects what is trained on"
_FILE = r"(_?(path|file|file_?name|name|url|uri|list|data|bytes|base64|b64|input)s?)?"
_FOLDER = r"_?(dir|directory|folder|root)s?"
_VIDEO_FILES = "mp4|avi|mov|mkv|webm|m4v|mpe?g|flv|wmv"
_AUDIO_FILES = "mp3|wav|flac|ogg|m4a|aac|opus|wma"
_MEDIA = {
    VIDEO_FIELD: rf"(vid|video|video_?clip|clip|movie|(key|video)?_?frame|gif|{_VIDEO_FILES})s?({_FILE}|{_FOLDER})",
    "audio": rf"(audio|speech|sound|voice|music|waveform|{_AUDIO_FILES})s?({_FILE}|{_FOLDER})|input_audio",
    "a point cloud or depth map": r"(point_?cloud|depth_?(map|image)|mesh)s?" + _FILE,
    "media": r"media|multi_?(modal|media)(_(data|inputs?))?|attachments?",
}
_FORMAT = {
    "tool use": r"tools?|tool_(calls?|choice|call_ids?|responses?|results?)|functions?|function_(calls?|responses?)"
    r"|observations?",
    "a preference": r"(chosen|rejected|preferred|dispreferred)(_(responses?|messages|conversations|images?|texts?))?",
    "earlier turns": r"history|chat_history|conversation_history",
    "documents": r"documents?",
    "reasoning": r"reasoning|reasoning_(content|text)|thinking|thinking_blocks|thoughts?|chain_of_thought|refusal",
    "a setting of the chat template": r"chat_template|chat_template_kwargs|enable_thinking|add_generation_prompt",
    NOT_TRAINED: r"masks?|masked|mask_(history|prompt|inputs?)|ignore_?(loss)?|no_?(loss|train)"
    r"|skip_?(loss|train)|assistant_masks?|labels_mask",
    "training on prompts": r"train_on_(inputs?|prompts?|source|user)",
}
_IMAGE = r"(?!(num|n|no|has|is|max|with|total)_)(\w+_)?(image|img|picture|photo)s?(_?\d+|_[a-h])?" + _FILE
_FLAG = (
    r"(is_|has_|use_|with_|do_|should_|compute_|calc_|calculate_)?(loss|train|trained|trainable|learn|learned|learnable"
    r"|supervised?)|train_on_turn|kto_tag|desirable|label|(loss|train)_mask"
)
_WEIGHT = r"((sample|loss|token|turn|example|sampling)_)?(weights?|importance)|loss_scale|((num|n)_)?repeat(s|_times?)?"
_LEAVES_OUT = r"exclude|excluded|skip|skipped|ignore|ignored|mask|masked"
_SAYS_WHERE = (  # matches one word of a field's name
    rf"loss|train|trained|training|learn|supervised?|supervision|unmask(ed)?|grad|gradient|backprop|{_LEAVES_OUT}"
)
_LESS = rf"{_LEAVES_OUT}|no|not|non|without|only|last|first|final"  # words that make true mean training on less

_UNSUPPORTED = [(what, re.compile(pattern)) for what, pattern in (_MEDIA | _FORMAT).items()]
_IS_IMAGE, _IS_FLAG, _IS_WEIGHT = re.compile(_IMAGE), re.compile(_FLAG), re.compile(_WEIGHT)
_IS_LIKE_A_FLAG = re.compile(rf"(.*_)?({_SAYS_WHERE})(_.*)?")
_TRAINS_LESS = re.compile(rf"(.*_)?({_LESS})(_.*)?")
_IS_MEDIA_FILE = re.compile(rf"\S.*\.({_VIDEO_FILES}|{_AUDIO_FILES}|gif)", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# Fields without an effect on training. Other unknown fields are allowed too, with a warning.
_HARMLESS = re.compile(
    r"(.*_)?(id|ids|idx|index|uid|uuid|guid|hash|md5|sha256|source|sources|dataset|datasets|width|height|size|sizes|"
    r"metadata|meta|info|score|scores|rating|ratings|quality|language|lang|license|licence|author|date|time|timestamp|"
    r"timestamps|split|subset|category|categories|domain|topic|task|tasks|type|types|tag|tags|model|models|version|"
    r"url|key|count|length|tokens|num|duration|fps)|num_.*|__.*__|_.*"
)

_MARK = re.compile(
    r"<(?:video|audio|speech|sound|music|point_?cloud|vid)s?[_ -]?\d*>|<(?:bbox|ref-object)>"
    r"|<\|(?:video|audio|vision)(?:_pad|_start)?\|>",
    re.IGNORECASE,
)
_IMAGE_MARK = re.compile(
    r"<(?:image[_ -]?\d*|image_?(?:here|placeholder|pad)|img|picture)>|<\|image(?:_pad|_\d+)?\|>", re.IGNORECASE
)
SUPPORTED = {IMAGE_FIELD: "'image' or 'images'", VIDEO_FIELD: "'video' or 'videos'"}
WITH_AUTO = "`data.template: auto` formats it by the checkpoint's chat template"
HOW_TO_FIX = "remove it, or list it in the entry's `ignore` if it can be ignored"


@lru_cache(4096)
def plain(name: str) -> str:
    """``name`` in the snake case of the rules, without the dot of a tar member's extension (``.mp4``)."""
    return _CAMEL.sub("_", name.lstrip(".")).replace("-", "_").replace(" ", "_").lower()


def is_looked_at(name: str) -> bool:
    """Whether a table's column must be read because the record uses it or it may make the record malformed."""
    return name in RECORD or _unsupported(plain(name)) is not None


@lru_cache(4096)
def is_harmless(name: str) -> bool:
    """Whether a field that is not read can be ignored without a warning."""
    return _HARMLESS.fullmatch(plain(name)) is not None


def is_empty(value: Any) -> bool:
    """Whether a value is empty, such as those that tables fill in for missing fields."""
    if isinstance(value, Mapping):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return value is None or value is False or (isinstance(value, str | bytes) and not value.strip())


def check_fields(
    fields: Mapping[str, Any], read: Set[str], ignore: Collection[str], *, answer: bool | None, has_images: bool
) -> set[str]:
    """Check the fields of a record, a turn, or a part of a turn's content.

    Args:
        fields: names and values.
        read: names of fields that are read.
        ignore: names of fields that the user accepts.
        answer: for a turn, whether it is the assistant's; ``None`` otherwise.
        has_images: whether the record has images in the fields that are read.

    Returns:
        Names of fields that are not read and should be reported.

    Raises:
        ValueError: a field would change the training; the message names it.
    """
    unread: set[str] = set()
    if fields.keys() <= read:  # the usual case
        return unread
    for name, value in fields.items():
        if name in read or name in ignore:
            continue
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the name of one of its fields has {len(name)} characters ({_shortened(name)})")
        kind = _unsupported(plain(name))
        if name == "label" and not isinstance(value, bool):  # a class; the label of a preference is true or false
            continue
        if kind in _MEDIA and isinstance(value, int | float) and not isinstance(value, bool):  # a score or a count
            kind = None
        if kind == IMAGE_FIELD and has_images:  # describes the image that is read
            kind = None
        if kind == LIKE_A_FLAG and not _may_be_a_flag(plain(name), value):
            kind = None
        if kind is None:
            if name not in unread and not is_harmless(name) and (value is False or not is_empty(value)):
                _check_value(name, value)
                unread.add(name)
        elif not _changes_nothing(kind, name, value, answer):
            hint = f"; {WITH_AUTO}" if name in (CHAT_RECORD | CHAT_TURN) - RECORD - TURN else ""
            if kind in SUPPORTED:
                raise ValueError(
                    f"its field {name!r} ({_shortened(value)}) holds {kind}, but only fields named "
                    f"{SUPPORTED[kind]} are read; rename it, or {HOW_TO_FIX}"
                )
            raise ValueError(
                f"its field {name!r} ({_shortened(value)}) holds {kind}, which is not supported; {HOW_TO_FIX}{hint}"
            )
    return unread


def check_marks(text: str, ignore: Collection[str], *, has_images: bool, has_videos: bool = False) -> None:
    """Reject placeholders in a prompt for anything but images and videos (``<bbox>`` refers to the record's
    ``objects``), ``<video>`` in a record without videos, and image placeholders other than ``<image>`` in a record
    without images. Markers with a closing tag (``<video>``, ``<picture>``) are HTML and are accepted.

    Raises:
        ValueError: there is such a placeholder; the message names it.
    """
    lowered = text.lower() if (marks := dict.fromkeys(_MARK.findall(text))) else ""
    for mark in marks:
        if mark in ignore or f"</{mark[1:]}".lower() in lowered or (mark == VIDEO and has_videos):
            continue
        if mark == VIDEO:
            raise ValueError(f"its text contains {mark}, but the record has no 'video' or 'videos'; {HOW_TO_FIX}")
        raise ValueError(f"its text contains {mark}, but only <image> and <video> are supported; {HOW_TO_FIX}")
    for mark in () if has_images else dict.fromkeys(_IMAGE_MARK.findall(text)):
        if mark not in ignore and not (mark == "<picture>" and "</picture>" in text):
            raise ValueError(f"its text contains {mark}, but the record has no 'image' or 'images'; {HOW_TO_FIX}")


@lru_cache(4096)
def _unsupported(name: str) -> str | None:
    """What kind of content a field with this name (see :func:`plain`) has, if it would change the training. Leading
    underscores are ignored."""
    name = name.strip("_") or name
    for kind, pattern in ((FLAG, _IS_FLAG), (WEIGHT, _IS_WEIGHT), (IMAGE_FIELD, _IS_IMAGE), *_UNSUPPORTED):
        if pattern.fullmatch(name):
            return kind
    return LIKE_A_FLAG if _IS_LIKE_A_FLAG.fullmatch(name) and not _HARMLESS.fullmatch(name) else None


def _may_be_a_flag(name: str, value: Any) -> bool:
    """Whether a value can be a flag, rather than a loss, the name of a split, or the mask of an object in the image."""
    of_an_image = "mask" in name.split("_")
    return any(leaf in (0, 1) or (isinstance(leaf, Mapping) and not of_an_image) for leaf in _leaves(value))


def _check_value(name: str, value: Any) -> None:
    """Refuse names of video and audio files in any field."""
    for leaf in _leaves(value):
        if isinstance(leaf, str) and _IS_MEDIA_FILE.fullmatch(leaf.strip()):
            raise ValueError(f"its field {name!r} ({_shortened(value)}) names a video or audio file; {HOW_TO_FIX}")


def _changes_nothing(kind: str, name: str, value: Any, answer: bool | None) -> bool:
    """Whether a field asks for what training does anyway."""
    if kind == NOT_TRAINED:
        return all(leaf == 0 for leaf in _leaves(value))
    if kind == LIKE_A_FLAG:
        as_is = (_TRAINS_LESS.fullmatch(plain(name)) is None) == (answer is not False)
        return all(leaf is None or leaf == int(as_is) for leaf in _leaves(value))
    if kind not in (FLAG, WEIGHT):
        return is_empty(value)
    neutral = ((0,) if kind == FLAG else (0, 1)) if answer is False else (1,)  # a prompt is never supervised
    return all(leaf in neutral for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """The items of a list, or the value itself, without missing ones."""
    for leaf in value if isinstance(value, list | tuple) else [value]:
        if leaf is not None and leaf != "":
            yield leaf


def _shortened(value: Any) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
