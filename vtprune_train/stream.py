"""Deprecated: the place of ``Drop`` before ``from vtprune_train import Drop``, for methods that name it."""

import warnings

from vtprune_train.core.stream import Drop as Drop

warnings.warn("vtprune_train.stream moved: use `from vtprune_train import Drop`", FutureWarning, stacklevel=2)
