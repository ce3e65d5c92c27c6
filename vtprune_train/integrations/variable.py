"""The environment variable ``VTPRUNE``, which says what the plug-ins for training frameworks do with a loaded model.

- ``pack`` (also if the variable is not set): :func:`vtprune_train.pack`, no visual token is dropped;
- ``saved``: :func:`vtprune_train.prune` with the settings saved in the checkpoint;
- the name of a method (``VTPRUNE=fastv``), or JSON with its settings
  (``VTPRUNE='{"method": "pyramiddrop", "keep": [0.5, 0.25, 0.125]}'``).
"""

from __future__ import annotations

import json
import os
from typing import Any

from vtprune_train import is_pruned, pack, prune

VARIABLE = "VTPRUNE"
PACK = "pack"


def apply(model: Any) -> Any:
    """Pack or prune a loaded model, in place, as the environment variable says.

    Raises:
        ValueError: the variable is neither JSON nor the name of a method, or see :func:`vtprune_train.prune`.
    """
    if is_pruned(model):  # loaded as a copy of a pruned model
        return model
    value = os.environ.get(VARIABLE) or PACK
    if value == PACK:
        return pack(model)
    return prune(model, _method(value))


def _method(value: str) -> Any:
    if not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{VARIABLE}={value} is not valid JSON ({error}); for example "
            '{"method": "pyramiddrop", "keep": [0.5, 0.25, 0.125]}'
        ) from error
