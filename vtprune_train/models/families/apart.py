"""Processors of families whose transformers class wants a video processor, which needs torchvision."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class ApartProcessor:
    """Image processor, tokenizer and the processor's own settings, saved where ``AutoProcessor`` looks for them."""

    image_processor: Any
    tokenizer: Any
    settings: dict[str, Any]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, ``processor_config.json`` and the tokenizer's files."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps(self.settings, indent=2))
