"""A template of :mod:`vtprune_train.data.chat` as a Hugging Face chat template, for processors and other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from vtprune_train.core.stream import IMAGE
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
    """The Jinja source that writes a conversation exactly as ``template`` does for training.

    Content may be text with ``<image>`` (or the image token) in it, or a list of parts. With a beginning-of-sequence
    token it writes that too, so the text is tokenized without special tokens being added. Roles and parts that training
    does not know raise jinja2's ``TemplateError``.

    Args:
        image_first: a message's only image goes to its front (``data.image_position: first``).
        placeholder: what the family writes at an image, ``<image>`` standing for its image token.
        spaces_unless: a space before every text between images that does not begin with one of these
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
    """A block that writes ``pattern`` with ``{text}`` and ``{eos}`` filled in."""
    names = {"{text}": "text", "{eos}": "eos_token"}
    parts = [names.get(part) or json.dumps(part) for part in _PLACE.split(pattern) if part]
    return f"{{{{- {' ~ '.join(parts)} -}}}}" if parts else ""


def _with_spaces(image: str, unless: Sequence[str]) -> str:
    """Writes ``conversation`` with a space before every text between images."""
    begins = "".join(f"{json.dumps(mark)}, " for mark in unless)
    return (
        f"{{%- for part in conversation.split({json.dumps(image)}) -%}}"
        f"{{%- if not loop.first -%}}{{{{- {json.dumps(image)} -}}}}{{%- endif -%}}"
        f"{{%- if part and not part.startswith(({begins})) -%}}{{{{- ' ' -}}}}{{%- endif -%}}"
        "{{- part -}}{%- endfor -%}"
    )


def written_by(encoder: ChatEncoder) -> str:
    """The chat template of what ``encoder`` makes: prompts by it have the ids of training."""
    return chat_template(
        encoder.template,
        image_first=encoder.image_position == "first",
        placeholder=encoder.placeholder,
        token=encoder.image_token,
        spaces_unless=encoder.tokenizer.all_special_tokens if encoder.spaces else None,
    )
