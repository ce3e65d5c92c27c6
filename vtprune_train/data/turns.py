"""Turns of a conversation, and the placeholders in their texts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vtprune_train.core.stream import IMAGE, VIDEO

IMAGE_MARK, VISUAL = re.compile(re.escape(IMAGE)), re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")
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
