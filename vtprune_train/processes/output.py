"""Standard output and error that may break: what they cannot take is lost, and training goes on.

A pipe breaks when ``tee`` gets the Ctrl-C that was meant for training, a terminal is closed, the file after
``> log`` fills its disk. None of that may cost the checkpoint that is being written, or the message of another rank.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

GONE_FOR_GOOD = (errno.EPIPE, errno.EIO, errno.EBADF)  # the reader, the terminal


class Stream:
    """A text stream whose writes do not fail; everything else is the stream's own."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.failed = False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if error.errno in GONE_FOR_GOOD:
                _to_nowhere(self.stream.fileno())
            if not self.failed:
                self.failed = True
                other = sys.stderr if self is sys.stdout else sys.stdout
                if not getattr(other, "failed", True):
                    other.write(f"\n{self.stream.name} cannot be written ({error}); what it would show is lost\n")


def keep_streams() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` streams whose writes do not fail. Descriptors 0 to 2 that are closed lead
    nowhere from now on: else the next files that are opened would get them, and whatever is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_nowhere(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(descriptor, "w", closefd=False)
        if not isinstance(stream, Stream):
            setattr(sys, name, Stream(stream))


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
