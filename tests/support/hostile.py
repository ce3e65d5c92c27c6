"""Files that run code when they are opened the usual way: what the tests of trust put into checkpoints."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from vtprune_train.training.checkpoint import manifest


class Payload:
    """Its pickle makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def infect(path: Path, mark: Path, **save: Any) -> None:
    """Put a payload beside what a file of ``torch.save`` holds."""
    state = torch.load(path, weights_only=False)
    state["client_state"] = {"note": [Payload(mark)]}
    torch.save(state, path, **save)


def seal(checkpoint: Path) -> None:
    """A manifest that is right about what lies in the folder now."""
    (checkpoint / manifest.MANIFEST).unlink(missing_ok=True)
    names = manifest.files_in(checkpoint)
    manifest.write_manifest(checkpoint, {name: manifest.sync_and_hash(checkpoint / name) for name in names})


def as_bin(folder: Path, mark: Path) -> Path:
    """Weights as ``pytorch_model.bin`` with a payload, instead of safetensors."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def name_method(folder: Path, method: str, **more: Any) -> None:
    """Let a ``config.json`` name a method."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pruning": {"method": method}, **more}))


def module(path: Path, mark: Path) -> Path:
    """A file of Python that makes ``mark`` when it is imported, and has a method."""
    path.write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from vtprune_train import PyramidDrop\n\n\nclass Evil(PyramidDrop):\n    pass\n"
    )
    return path


def pickled(path: Path, mark: Path, protocol: int) -> Path:
    """A bare pickle."""
    path.write_bytes(pickle.dumps({"note": Payload(mark)}, protocol))
    return path
