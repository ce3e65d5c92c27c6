"""Converts a template of :mod:`vtprune_train.data.chat` to a Hugging Face chat template, for processors and other
tools."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.data.auto_template import AutoTemplate
from vtprune_train.data.chat import ChatEncoder, Template
from vtprune_train.models.families.base import Lacks, Loop

_PLACE = re.compile(r"(\{text\}|\{eos\})")


def chat_template(
    template: Template,
    *,
    image_first: bool = False,
    placeholder: str = IMAGE,
    token: str = IMAGE,
    spaces_unless: Sequence[str] | None = None,
    video: tuple[str, str] = ("", ""),
) -> str:
    """Jinja source of a chat template that formats conversations exactly like ``template`` in training.

    Content may be text with ``<image>`` (or the image token), or a list of parts. The output includes the
    beginning-of-sequence token, so it must be tokenized without adding special tokens. Roles and parts that training
    does not support raise jinja2's ``TemplateError``.

    Args:
        image_first: move the only image of a message to its front (``data.image_position: first``).
        placeholder: the text that the family writes for an image; ``<image>`` in it is the image token.
        token: the image token.
        spaces_unless: insert a space before each text between images, unless it starts with one of these
            (``data.tokenization: llava``); ``None`` for no spaces.
        video: the text of a video, and the token in it that the family's processor expands; empty for a family without
            videos. If set, content may contain this token, or parts of type ``video``.
    """
    image, written = json.dumps(IMAGE), placeholder.replace(IMAGE, token)
    clip = json.dumps(video[1])
    first = (
        f"{{%- if text.count({image}) == 1 -%}}"
        f"{{%- set text = {image} ~ '\\n' ~ text.replace({image}, '').strip() -%}}{{%- endif -%}}"
    )
    images_only = f"{{%- set text = {image} * text.count({image}) -%}}"
    if video[1]:
        first = (
            f"{{%- if text.count({image}) + text.count({clip}) == 1 -%}}"
            f"{{%- set mark = {image} if {image} in text else {clip} -%}}"
            "{%- set text = mark ~ '\\n' ~ text.replace(mark, '').strip() -%}{%- endif -%}"
        )
        images_only = (
            f"{{%- set kept -%}}{{%- for part in text.split({image}) -%}}"
            f"{{%- if not loop.first -%}}{{{{- {image} -}}}}{{%- endif -%}}{{{{- {clip} * part.count({clip}) -}}}}"
            "{%- endfor -%}{%- endset -%}{%- set text = kept -%}"
        )
    marks = "".join(
        f".replace({json.dumps(mark)}, {image})" for mark in dict.fromkeys((written, token)) if mark != IMAGE
    )
    images = f"{{%- set text = text.replace({image}, {json.dumps(written)}) -%}}" if written != IMAGE else ""
    videos = ""
    if video[0] != video[1]:
        marks = f".replace({json.dumps(video[0])}, {clip}){marks}"
        videos = f"{{%- set text = text.replace({clip}, {json.dumps(video[0])}) -%}}"
    part_of_video = f"{{%- elif part.type == 'video' -%}}{{{{- {clip} -}}}}" if video[1] else ""
    takes = "text, images and videos" if video[1] else "text and images"
    lines = [
        "{%- macro plain(content) -%}{%- if content is string -%}"
        f"{{{{- content{marks} -}}}}{{%- else -%}}{{%- for part in content -%}}"
        f"{{%- if part.type == 'image' -%}}{{{{- {image} -}}}}"
        f"{part_of_video}{{%- elif part.type == 'text' -%}}{{{{- part.text{marks} -}}}}"
        f"{{%- else -%}}{{{{- raise_exception('this model takes {takes}, not ' ~ part.type) -}}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}" if template.bos else "",
        "{%- set conversation -%}" if spaces_unless is not None else "",
        "{%- if messages[0].role == 'system' -%}{%- set text = plain(messages[0].content) -%}"
        f"{{%- else -%}}{{%- set text = {json.dumps(template.default_system)} -%}}{{%- endif -%}}",
        f"{{%- if text -%}}{images}{videos}{_writes(template.system)}{{%- endif -%}}",
        "{%- for message in messages -%}{%- set text = plain(message.content) -%}",
        "{%- if message.role == 'user' -%}",
        f"{{%- if loop.previtem is defined and loop.previtem.role == 'assistant' -%}}{_writes(template.separator)}"
        "{%- endif -%}",
        first if image_first else "",
        images_only if template.images_only else "",
        images,
        videos,
        _writes(template.user),
        f"{{%- elif message.role == 'assistant' -%}}{_writes(template.assistant)}{_writes(template.answer)}",
        "{%- elif message.role != 'system' or not loop.first -%}"
        "{{- raise_exception('no place for a message of ' ~ message.role ~ ' here') -}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_writes(template.assistant)}{{%- endif -%}}",
        f"{{%- endset -%}}{_with_spaces(written, spaces_unless, video[0])}" if spaces_unless is not None else "",
    ]
    return "\n".join(line for line in lines if line)


def _writes(pattern: str) -> str:
    """A Jinja expression that writes ``pattern`` with ``{text}`` and ``{eos}`` filled in."""
    names = {"{text}": "text", "{eos}": "eos_token"}
    parts = [names.get(part) or json.dumps(part) for part in _PLACE.split(pattern) if part]
    return f"{{{{- {' ~ '.join(parts)} -}}}}" if parts else ""


def _with_spaces(image: str, unless: Sequence[str], video: str) -> str:
    """A Jinja block that writes ``conversation`` with a space before each text between images and videos."""
    begins = "".join(f"{json.dumps(mark)}, " for mark in unless)
    text = f"{{%- if part and not part.startswith(({begins})) -%}}{{{{- ' ' -}}}}{{%- endif -%}}{{{{- part -}}}}"
    for mark in filter(None, (video, image)):
        text = (
            f"{{%- for part in part.split({json.dumps(mark)}) -%}}"
            f"{{%- if not loop.first -%}}{{{{- {json.dumps(mark)} -}}}}{{%- endif -%}}{text}{{%- endfor -%}}"
        )
    return f"{{%- set part = conversation -%}}{text}"


def video_text(tokenizer: PreTrainedTokenizerBase, loop: Loop) -> tuple[str, str]:
    """The text that a chat template writes for a video, and the token in it that the family's processor expands; empty
    if the family or this tokenizer does not support videos."""
    token: str = loop.video_token or getattr(tokenizer, "video_token", "")
    if isinstance(loop.videos, Lacks) or not token or (loop.video_token and token not in tokenizer.get_vocab()):
        return "", ""
    return loop.template_video.replace(VIDEO, token), token


def written_by(encoder: ChatEncoder, loop: Loop | None = None) -> str:
    """The chat template of ``encoder``: prompts formatted by it, with images and videos expanded by the processor of
    the family of ``loop``, have the same ids as in training. Without ``loop`` it takes no videos."""
    if isinstance(encoder.template, AutoTemplate):
        return encoder.template.source
    return chat_template(
        encoder.template,
        image_first=encoder.image_position == "first",
        placeholder=encoder.placeholder if loop is None or loop.template_image is None else loop.template_image,
        token=encoder.image_token,
        spaces_unless=encoder.tokenizer.all_special_tokens if encoder.spaces else None,
        video=("", "") if loop is None else video_text(encoder.tokenizer, loop),
    )
