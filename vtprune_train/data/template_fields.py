"""Checks that a chat template writes the tools, calls of tools and reasoning of a conversation, by formatting it with
and without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from vtprune_train.data.turns import CALLS, REASONING, TOOLS

RENDER_ERRORS = (TemplateError, TypeError, LookupError)  # raised by templates for messages that they do not accept
LEFT, RIGHT = "\ue000", "\ue001"  # private use: around a probe, whose offset is looked for
PROBE = f"{LEFT}a{RIGHT}"
Message = dict[str, Any]
Render = Callable[[Sequence[Message], list[Any] | None], str]
"""The text of messages with these tools. Raises a ``ValueError`` if the template does not accept them."""


def text_content(text: str, kind: str) -> str | list[dict[str, str]]:
    """Content of a message, as ``text`` or ``parts``."""
    return text if kind == "text" else [{"type": "text", "text": text}]


def messages_of(texts: Sequence[str], kind: str) -> list[Message]:
    """A conversation that starts with the user."""
    return [{"role": ("user", "assistant")[n % 2], "content": text_content(text, kind)} for n, text in enumerate(texts)]


def reasoning_name(render: Render, kind: str) -> str:
    """The name in messages of the reasoning that a template writes; empty if it writes none. (Some versions of
    transformers copy it to the other names.)"""
    for name in REASONING:
        asked, answered = messages_of(["a", "b"], kind)
        text = _try(render, [asked, {**answered, name: PROBE}], None)
        if text is not None and PROBE in text:
            return name
    return ""


def written_messages(
    render: Render, messages: Sequence[Message], tools: list[Any] | None, name: Callable[[], str], template: str
) -> list[Message]:
    """The messages with their reasoning under the name that the template reads.

    Args:
        render: formats messages.
        messages: the conversation, with reasoning as ``reasoning_content``.
        tools: its tools.
        name: gives the result of :func:`reasoning_name`.
        template: the template in errors.

    Raises:
        ValueError: the template does not write the tools, a call of a tool, or reasoning.
    """
    messages = [dict(message) for message in messages]
    for message in messages:
        if REASONING[0] in message:
            if not name():
                raise ValueError(_not_written(REASONING[0], template))
            message[name()] = message.pop(REASONING[0])
    if tools is None and not any(CALLS in message for message in messages):
        return messages
    text = render(messages, tools)
    if tools is not None and _try(render, messages, None) == text:
        raise ValueError(_not_written(TOOLS, template))
    for number, fewer in _with_one_call_less(messages):
        if _try(render, fewer, tools) == text:
            raise ValueError(_not_written(f"a call in {CALLS} of turn {number + 1}", template))
    return messages


def _with_one_call_less(messages: Sequence[Message]) -> Iterator[tuple[int, list[Message]]]:
    """The number of a message with calls, and the messages without one of its calls; for every call."""
    for number, message in enumerate(messages):
        calls = message.get(CALLS, [])
        for index in range(len(calls)):
            rest = [*calls[:index], *calls[index + 1 :]]
            without = {**message, CALLS: rest} if rest else {k: v for k, v in message.items() if k != CALLS}
            yield number, [*messages[:number], without, *messages[number + 1 :]]


def _try(render: Render, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
    try:
        return render(messages, tools)
    except ValueError:
        return None


def _not_written(what: str, template: str) -> str:
    return f"it has {what}, which {template} does not write; remove it, or use another checkpoint"


def spoken_text(text: str) -> str:
    """The text of an answer after its reasoning."""
    return text.rpartition("</think>")[2].strip()


def reasoning_of(text: str, fields: Mapping[str, Any]) -> str:
    """The reasoning of an answer, from its fields or its text; empty without any."""
    for name in REASONING:
        if name in fields:
            return str(fields[name]).strip()
    return text.rpartition("</think>")[0].rpartition("<think>")[2].strip()
