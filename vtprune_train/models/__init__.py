"""The packed forward pass of unmodified Hugging Face models."""

from typing import Any, TypeAlias

HFModule: TypeAlias = Any
"""A transformers module. Its attributes depend on the model family, so type checkers cannot verify them."""
