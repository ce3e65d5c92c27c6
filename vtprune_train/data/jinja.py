"""A template of :mod:`vtprune_train.data.chat` as a Hugging Face chat template, for processors and other tools."""

from __future__ import annotations

import json
import re

from vtprune_train.data.chat import Template
from vtprune_train.stream import IMAGE

_PLACE = re.compile(r"(\{text\}|\{eos\})")


def chat_template(template: Template, *, image_first: bool = False) -> str:
    """The Jinja source that writes a conversation exactly as ``template`` does for training.

    Content may be text with ``<image>`` in it, or a list of parts. With a beginning-of-sequence token it writes that
    too, so the text is tokenized without special tokens being added.

    Args:
        template: how training wrote conversations.
        image_first: a message's only image goes to its front (``data.image_position: first``).
    """
    image = json.dumps(IMAGE)
    first = (
        f"{{%- if text.count({image}) == 1 -%}}"
        f"{{%- set text = {image} ~ '\\n' ~ text.replace({image}, '').strip() -%}}{{%- endif -%}}"
    )
    images_only = f"{{%- set text = {image} * text.count({image}) -%}}"
    lines = [
        "{%- macro plain(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
        f"{{{{- {image} if part.type == 'image' else part.text -}}}}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}" if template.bos else "",
        "{%- if messages[0].role == 'system' -%}{%- set text = plain(messages[0].content) -%}"
        f"{{%- else -%}}{{%- set text = {json.dumps(template.default_system)} -%}}{{%- endif -%}}",
        f"{{%- if text -%}}{_writes(template.system)}{{%- endif -%}}",
        "{%- for message in messages -%}{%- set text = plain(message.content) -%}",
        "{%- if message.role == 'user' -%}",
        f"{{%- if loop.previtem is defined and loop.previtem.role == 'assistant' -%}}{_writes(template.separator)}"
        "{%- endif -%}",
        first if image_first else "",
        images_only if template.images_only else "",
        _writes(template.user),
        f"{{%- elif message.role == 'assistant' -%}}{_writes(template.assistant)}{_writes(template.answer)}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_writes(template.assistant)}{{%- endif -%}}",
    ]
    return "\n".join(line for line in lines if line)


def _writes(pattern: str) -> str:
    """A block that writes ``pattern`` with ``{text}`` and ``{eos}`` filled in."""
    names = {"{text}": "text", "{eos}": "eos_token"}
    parts = [names.get(part) or json.dumps(part) for part in _PLACE.split(pattern) if part]
    return f"{{{{- {' ~ '.join(parts)} -}}}}" if parts else ""
