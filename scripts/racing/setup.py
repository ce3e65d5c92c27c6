"""What all rows of a race have in common."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """Settings of a race. ``folder`` holds the checkpoint and the data; ``lengths``: tokens of each sample."""

    folder: str
    device: str
    steps: int
    micro_batch: int
    global_batch: int
    lengths: list[int] = field(default_factory=list)
    learning_rate: float = 1e-4
    clip: float = 1.0
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder) / "checkpoint"

    @property
    def data(self) -> Path:
        return Path(self.folder) / "data"

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def num_samples(self) -> int:
        return self.steps * self.global_batch

    def write(self) -> None:
        (Path(self.folder) / "setup.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: str) -> Setup:
        return cls(**json.loads((Path(folder) / "setup.json").read_text()))
