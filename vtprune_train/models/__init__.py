"""The packed forward pass of unmodified Hugging Face models."""

from typing import Any, TypeAlias

HFModule: TypeAlias = Any
"""A transformers module: which attributes it has depends on its family, so a type checker cannot know them."""
