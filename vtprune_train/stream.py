"""Deprecated: the old location of ``Drop``, for custom methods that still import it from here."""

import warnings

from vtprune_train.core.stream import Drop as Drop

warnings.warn("vtprune_train.stream moved: use `from vtprune_train import Drop`", FutureWarning, stacklevel=2)
