"""The errors of videos that cannot be used."""

from __future__ import annotations

from typing import ClassVar

from vtprune_train.data.images import ChangedImage, UnreadableImage


class UnreadableVideo(UnreadableImage):
    """Raised for a video that cannot be used; the message is ``name: reason``."""

    kind: ClassVar[str] = "video"


class ChangedVideo(ChangedImage, UnreadableVideo):
    """Raised for a video that was changed after it was indexed or after its header was read."""
