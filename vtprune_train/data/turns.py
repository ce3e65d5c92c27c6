"""Turns of a conversation, and the placeholders in their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vtprune_train.core.stream import IMAGE, VIDEO

IMAGE_MARK, VISUAL = re.compile(re.escape(IMAGE)), re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same field in records and chat templates
PREFIX = "prefix"  # field of an assistant turn that the next assistant turn continues
CALLS = "tool_calls"
TOOLS = "tools"  # role of a turn that lists the tools of the conversation


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        role: system, user or assistant; with ``data.template: auto`` also ``tool`` (the result of a call), or ``tools``
            for the list of tools as JSON in ``text``.
        text: contains ``<image>`` in place of each image and ``<video>`` in place of each video.
        fields: JSON object of the other fields of the message that chat templates read (``reasoning_content``,
            ``tool_calls``, ...); empty without any.
    """

    role: str
    text: str
    fields: str = ""

    @property
    def is_prefix(self) -> bool:
        """Whether the next turn continues this one, which is then not supervised."""
        return bool(self.fields) and PREFIX in json.loads(self.fields)

    @property
    def calls_tools(self) -> bool:
        return bool(self.fields) and CALLS in json.loads(self.fields)


def join_prefixes(turns: Sequence[Turn]) -> tuple[list[Turn], dict[int, str]]:
    """Join prefixes of answers with the turns that continue them.

    Returns:
        The turns without prefixes, and the prefix of each turn that has one, by its index.

    Raises:
        ValueError: a turn continues a prefix, but has reasoning, which templates write before the text.
    """
    kept: list[Turn] = []
    prefixes: dict[int, str] = {}
    before = ""
    for turn in turns:
        if turn.is_prefix:
            before += turn.text
            continue
        if before:
            if REASONING[0] in turn.fields and REASONING[0] in json.loads(turn.fields):
                raise ValueError(
                    f"turn {len(kept) + 1} continues the prefix {before[:50]!r} and has {REASONING[0]}, which comes "
                    "before the prefix; write the reasoning as <think> in the prefix, or remove one of them"
                )
            prefixes[len(kept)] = before
            turn = replace(turn, text=before + turn.text)
        kept.append(turn)
        before = ""
    return kept, prefixes
