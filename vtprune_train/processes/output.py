"""Standard output and error whose failures do not stop training.

``tee`` may receive the Ctrl-C that was meant for training, a terminal may be closed, the disk of a log file may be
full. Output is lost then, but neither the checkpoint that is being written nor the messages of other ranks.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

GONE_FOR_GOOD = (errno.EPIPE, errno.EIO, errno.EBADF)  # of a closed pipe or terminal


class Stream:
    """Wraps a text stream; failing writes are dropped instead of raised."""

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
                _to_devnull(self.stream.fileno())
            if not self.failed:
                self.failed = True
                other = sys.stderr if self is sys.stdout else sys.stdout
                if not getattr(other, "failed", True):
                    other.write(f"\n{self.stream.name} cannot be written ({error}); its output is lost\n")


def keep_streams() -> None:
    """Wrap ``sys.stdout`` and ``sys.stderr`` in :class:`Stream`. Closed descriptors 0 to 2 are opened on ``/dev/null``;
    otherwise the next opened file would get one of them and receive the output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_devnull(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(descriptor, "w", closefd=False)
        if not isinstance(stream, Stream):
            setattr(sys, name, Stream(stream))


def _to_devnull(descriptor: int) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    if devnull != descriptor:
        os.dup2(devnull, descriptor)
        os.close(devnull)
