"""Optional output: an error in it does not stop training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def only_warning(what: str | Path) -> Iterator[None]:
    """Log an exception as a warning that names ``what`` could not be written."""
    try:
        yield
    except Exception as error:
        log.debug("traceback", exc_info=True)
        log.warning("could not write %s (%s: %s); training continues without it", what, type(error).__name__, error)
