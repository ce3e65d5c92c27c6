"""Maps the frames of a video file to its packets, and finds the packets to decode for a frame. Host arithmetic only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

SAME_RATE = 0.01  # relative; smaller differences come from rounded times

Run = tuple[int, int]
"""The first and the last of adjacent packets."""


class Packet(NamedTuple):
    """One packet of a file; times are in units of the stream's time base."""

    pts: int | None
    duration: int
    is_keyframe: bool
    is_shown: bool


class Timeline:
    """The packets of a video file in decoding order, and its frames in presentation order.

    Attributes:
        packets: all packets, in decoding order.
        frames: the position in ``packets`` of each frame.
        dropped: packets that cannot be decoded because they precede the first keyframe, in decoding or presentation
            order, and need frames that are not in the file; it was cut from a longer stream.
        times: the presentation time of each frame; empty if the file has no usable times. ``frames`` is then in
            decoding order, and frames can only be counted.
    """

    def __init__(self, packets: Sequence[Packet], reorders: bool = False):
        """``reorders``: the codec shows frames in another order than that of their packets."""
        self.packets = packets
        keyframes = [position for position, packet in enumerate(packets) if packet.is_keyframe]
        first = keyframes[0] if keyframes else 0
        dropped = set(range(first))
        shown = [position for position in range(first, len(packets)) if packets[position].is_shown]
        timed = [(pts, position) for position in shown if (pts := packets[position].pts) is not None]
        self.times: list[int] = []
        self.frames = shown
        self.dropped = dropped
        self._keyframes = keyframes or [0]
        # Some formats (AVI) have no presentation times: those of reordered packets are then times of decoding.
        if len({pts for pts, _ in timed}) == len(shown) and not (reorders and timed == sorted(timed)):
            start = packets[first].pts if packets else None
            dropped |= {position for pts, position in timed if start is not None and pts < start}
            timed = sorted((pts, position) for pts, position in timed if position not in dropped)
            self.times, self.frames = [pts for pts, _ in timed], [position for _, position in timed]

    def rate(self, time_base: Fraction | None, nominal: Fraction | None, default: float) -> float:
        """Mean frames per second. The nominal rate is exact if the rate is constant; the times in some formats are
        rounded to milliseconds."""
        mean = None
        if self.times and time_base:
            last = self.packets[self.frames[-1]].duration
            intervals = len(self.times) - (not last)
            seconds = float((self.times[-1] + last - self.times[0]) * time_base)
            mean = intervals / seconds if seconds > 0 else None
        if nominal and (mean is None or abs(float(nominal) / mean - 1) < SAME_RATE):
            return float(nominal)
        return mean or default

    def seconds(self, time_base: Fraction | None, fps: float) -> tuple[float, ...] | None:
        """Seconds of each frame after the first one; ``None`` for a constant rate or without times."""
        if not self.times or not time_base:
            return None
        return uneven_times([float((time - self.times[0]) * time_base) for time in self.times], fps)

    def runs(self, indices: Iterable[int], from_start: bool = False) -> list[Run]:
        """The runs of packets to decode for some frames: from the keyframe before each frame to its packet. All
        packets from the start if ``from_start`` or if frames can only be counted."""
        if from_start or not self.times:
            return [(0, len(self.packets) - 1)]
        runs: list[Run] = []
        for position in sorted(self.frames[index] for index in indices):
            start = self._keyframe_before(position)
            if runs and start <= runs[-1][1]:
                start = min(start, runs.pop()[0])
            runs.append((start, position))
        return runs

    def _keyframe_before(self, position: int) -> int:
        """The last keyframe that precedes a frame in both decoding and presentation order. A frame that is decoded
        after a keyframe but shown before it may need the keyframe before that one (open GOPs)."""
        time = self.packets[position].pts or 0
        for place in range(bisect_right(self._keyframes, position) - 1, -1, -1):
            keyframe = self._keyframes[place]
            pts = self.packets[keyframe].pts
            if pts is not None and pts <= time:
                return keyframe
        return 0


def uneven_times(seconds: Sequence[float], fps: float) -> tuple[float, ...] | None:
    """``seconds`` if one of them is at least half a frame off a constant rate, else ``None``: the times in some formats
    are rounded."""
    is_even = all(abs(time * fps - index) < 0.5 for index, time in enumerate(seconds))
    return None if is_even else tuple(seconds)
