"""Converts a template of :mod:`vtprune_train.data.chat` to a Hugging Face chat template, for processors and other
tools."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from vtprune_train.core.stream import IMAGE
from vtprune_train.data.auto_template import AutoTemplate
from vtprune_train.data.chat import ChatEncoder, Template

_PLACE = re.compile(r"(\{text\}|\{eos\})")


def chat_template(
    template: Template,
    *,
    image_first: bool = False,
    placeholder: str = IMAGE,
    token: str = IMAGE,
    spaces_unless: Sequence[str] | None = None,
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
    """
    image, written = json.dumps(IMAGE), placeholder.replace(IMAGE, token)
    first = (
        f"{{%- if text.count({image}) == 1 -%}}"
        f"{{%- set text = {image} ~ '\\n' ~ text.replace({image}, '').strip() -%}}{{%- endif -%}}"
    )
    images_only = f"{{%- set text = {image} * text.count({image}) -%}}"
    marks = "".join(
        f".replace({json.dumps(mark)}, {image})" for mark in dict.fromkeys((written, token)) if mark != IMAGE
    )
    images = f"{{%- set text = text.replace({image}, {json.dumps(written)}) -%}}" if written != IMAGE else ""
    lines = [
        "{%- macro plain(content) -%}{%- if content is string -%}"
        f"{{{{- content{marks} -}}}}{{%- else -%}}{{%- for part in content -%}}"
        f"{{%- if part.type == 'image' -%}}{{{{- {image} -}}}}"
        f"{{%- elif part.type == 'text' -%}}{{{{- part.text{marks} -}}}}"
        "{%- else -%}{{- raise_exception('this model takes text and images, not ' ~ part.type) -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}" if template.bos else "",
        "{%- set conversation -%}" if spaces_unless is not None else "",
        "{%- if messages[0].role == 'system' -%}{%- set text = plain(messages[0].content) -%}"
        f"{{%- else -%}}{{%- set text = {json.dumps(template.default_system)} -%}}{{%- endif -%}}",
        f"{{%- if text -%}}{images}{_writes(template.system)}{{%- endif -%}}",
        "{%- for message in messages -%}{%- set text = plain(message.content) -%}",
        "{%- if message.role == 'user' -%}",
        f"{{%- if loop.previtem is defined and loop.previtem.role == 'assistant' -%}}{_writes(template.separator)}"
        "{%- endif -%}",
        first if image_first else "",
        images_only if template.images_only else "",
        images,
        _writes(template.user),
        f"{{%- elif message.role == 'assistant' -%}}{_writes(template.assistant)}{_writes(template.answer)}",
        "{%- elif message.role != 'system' or not loop.first -%}"
        "{{- raise_exception('no place for a message of ' ~ message.role ~ ' here') -}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_writes(template.assistant)}{{%- endif -%}}",
        f"{{%- endset -%}}{_with_spaces(written, spaces_unless)}" if spaces_unless is not None else "",
    ]
    return "\n".join(line for line in lines if line)


def _writes(pattern: str) -> str:
    """A Jinja expression that writes ``pattern`` with ``{text}`` and ``{eos}`` filled in."""
    names = {"{text}": "text", "{eos}": "eos_token"}
    parts = [names.get(part) or json.dumps(part) for part in _PLACE.split(pattern) if part]
    return f"{{{{- {' ~ '.join(parts)} -}}}}" if parts else ""


def _with_spaces(image: str, unless: Sequence[str]) -> str:
    """A Jinja block that writes ``conversation`` with a space before each text between images."""
    begins = "".join(f"{json.dumps(mark)}, " for mark in unless)
    return (
        f"{{%- for part in conversation.split({json.dumps(image)}) -%}}"
        f"{{%- if not loop.first -%}}{{{{- {json.dumps(image)} -}}}}{{%- endif -%}}"
        f"{{%- if part and not part.startswith(({begins})) -%}}{{{{- ' ' -}}}}{{%- endif -%}}"
        "{{- part -}}{%- endfor -%}"
    )


def written_by(encoder: ChatEncoder) -> str:
    """The chat template of ``encoder``: prompts formatted by it have the same ids as in training."""
    if isinstance(encoder.template, AutoTemplate):
        return encoder.template.source
    return chat_template(
        encoder.template,
        image_first=encoder.image_position == "first",
        placeholder=encoder.placeholder,
        token=encoder.image_token,
        spaces_unless=encoder.tokenizer.all_special_tokens if encoder.spaces else None,
    )
