"""What depends on the type of the language model, whatever family it is part of."""

from __future__ import annotations

from typing import Any

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


def sliding_window(attention: Any) -> int | None:
    """Keys that a query of this attention layer sees, its own included; ``None`` for all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    config = attention.config
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def normalizes_queries_and_keys(config: Any) -> bool:
    """Whether each head's queries and keys go through a norm of their own."""
    return config.model_type.startswith("qwen3")
