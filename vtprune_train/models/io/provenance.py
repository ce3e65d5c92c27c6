"""The base model of an adapter: recorded with the hash of its weights, verified, and rebuilt from the record.

``base.json`` names a checkpoint, or the language model and the vision tower that the base was built from.
``base_extra.safetensors`` has the tensors of the base that are in none of these and are not trained: a projector from
another checkpoint, embedding rows added for the image token.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from vtprune_train.config.model import ModelConfig
from vtprune_train.models import HFModule
from vtprune_train.models.io.build import (
    build_model,
    family_of_config,
    first_line,
    load_model_config,
    resolve_checkpoint,
)
from vtprune_train.models.io.placement import WHOLE, Placement, placement_of, whole_shape

RECORD = "base.json"
EXTRA = "base_extra.safetensors"
FORMAT = 1
ROWS = re.compile(r"^(.*)\[(\d+):\]$")


@dataclass(frozen=True)
class Base:
    """The content of ``base.json``.

    Args:
        model: keys of the ``model`` section of the settings that define the base.
        sha256: hash of the weights for each key that names weights, see :func:`weights_digest`.
        peft: the adapter's settings.
        trained: the trained parts, including ``lora``.
        dtype: dtype of training.
    """

    model: dict[str, Any]
    sha256: dict[str, str]
    peft: dict[str, Any]
    trained: list[str]
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig) -> Base:
        """The record of a run's base.

        Raises:
            ValueError: its weights are missing.
        """
        keys = ("path",) if config.path is not None else ("language_model", "vision_tower")
        sources = {key: resolve_checkpoint(getattr(config, key)) for key in keys}
        model = {key: str(Path(name).resolve()) if Path(name).is_dir() else name for key, name in sources.items()}
        hashes = {key: weights_digest(source) for key, source in model.items()}
        if config.path is None:
            model["image_grid_pinpoints"] = config.model_dump(mode="json")["image_grid_pinpoints"]
        return cls(model, hashes, **_how_it_is_trained(config))

    @classmethod
    def kept(cls, folder: Path, config: ModelConfig) -> Base:
        """The record of a base that is saved completely in ``folder``."""
        model = {"path": str(folder.resolve())}
        return cls(model, {"path": weights_digest(str(folder))}, **_how_it_is_trained(config))

    def trained_by(self, config: ModelConfig) -> Base:
        """The record of the same base for the adapter of another run."""
        return replace(self, **_how_it_is_trained(config))

    @classmethod
    def read(cls, folder: Path) -> Base:
        """Read the record in ``folder``; relative paths in it are relative to the folder.

        Raises:
            ValueError: it is missing or cannot be read.
        """
        try:
            content = json.loads((folder / RECORD).read_text())
            if content.pop("format") != FORMAT:
                raise ValueError("written by a newer version")
            base = cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / RECORD}, which names the base model, cannot be read ({error})") from error
        model = {
            key: os.path.normpath(folder / value) if isinstance(value, str) and value.startswith(".") else value
            for key, value in base.model.items()
        }
        return replace(base, model=model)

    def write(self, folder: Path) -> None:
        """Write the record. The path of a base in the same run is written relative to ``folder``."""
        content = asdict(self) | {"format": FORMAT}
        run = folder.parent if folder.name == "base" else folder.resolve().parents[2]
        for key in self.sha256:
            source = Path(self.model[key])
            if source.is_dir() and source.resolve().is_relative_to(run.resolve()):
                relative = os.path.relpath(source.resolve(), folder.resolve())
                content["model"][key] = relative if relative.startswith(".") else f"./{relative}"
        (folder / RECORD).write_text(json.dumps(content, indent=1))

    def check(self, holder: str) -> None:
        """Verify the hashes of the base's weights, for the adapter ``holder``.

        Raises:
            ValueError: the base is missing or has changed; the message names the adapter and the base.
        """
        for key, recorded in self.sha256.items():
            try:
                digest = weights_digest(self.model[key])
            except ValueError as error:
                raise ValueError(
                    f"{holder} is an adapter, and its base model {self.model[key]} (SHA-256 {recorded}) is missing: "
                    f"{error}. Restore it there, or make a link to it"
                ) from error
            if digest != recorded:
                raise ValueError(
                    f"{holder} is an adapter trained on {self.model[key]} with SHA-256 {recorded}, but the weights "
                    f"there have {digest} now; restore the original weights"
                )

    def build(self, dtype: str, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
        """Build the base in ``dtype``, without its extra tensors."""
        return build_model(ModelConfig(**self.model, dtype=dtype), tokenizer, placement)  # type: ignore[arg-type]


def _how_it_is_trained(config: ModelConfig) -> dict[str, Any]:
    assert config.peft is not None
    return {"peft": config.peft.model_dump(), "trained": sorted(config.train), "dtype": config.dtype}


def weights_digest(source: str) -> str:
    """SHA-256 of the weights of a folder or a cached hub id: the hash of the output of
    ``LC_ALL=C sha256sum *.safetensors`` in the folder (``*.bin`` without safetensors). Computed once per process.

    Raises:
        ValueError: there are no weights.
    """
    files = tuple(weight_files(source))
    return _digest(files, tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.cache
def _digest(files: tuple[Path, ...], stamp: tuple[tuple[int, int], ...]) -> str:
    def line(path: Path) -> str:
        with path.open("rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"

    with ThreadPoolExecutor(4) as threads:
        return hashlib.sha256("".join(threads.map(line, files)).encode()).hexdigest()


def weight_files(source: str) -> list[Path]:
    """The weight files of a model, sorted by name.

    Raises:
        ValueError: there are none.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            config = cached_file(source, "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"neither a folder nor a model on the hub ({first_line(error)})") from error
        folder = Path(str(config)).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    return files


def published_names(model: HFModule) -> dict[str, str]:
    """Names of a model's tensors in published checkpoints, by their names in memory; for a model without an adapter.

    Raises:
        ValueError: published checkpoints divide its tensors differently (Qwen3.5-MoE: every expert separately).
    """
    state = model.state_dict()
    name_of = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(model, state)
    if other := [published for published, tensor in saved.items() if id(tensor) not in name_of]:
        raise ValueError(
            f"the weights of a published {type(model).__name__} are not stored as they are in memory ({other[0]}); "
            "open them with from_pretrained instead of load_state_dict, and then prune the model"
        )
    return {name_of[id(tensor)]: published for published, tensor in saved.items()}


def extra_tensors(model: HFModule, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors of a base that are in none of its sources and are not trained, on the CPU. Rows added to a tensor
    have the name ``name[first:]``."""
    extra: dict[str, torch.Tensor] = {}
    _, loop = family_of_config(model.config)
    keeps_projector = "projector" not in config.train and (config.path is None or config.projector is not None)
    rows = load_model_config(config).text_config.vocab_size
    tables = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        if keeps_projector and name.startswith(loop.projector):
            with placement_of(model).whole([parameter]):
                extra[name] = parameter.detach().cpu().clone()
        elif id(parameter) in tables and whole_shape(parameter)[0] > rows:
            with placement_of(model).whole([parameter]):
                extra[f"{name}[{rows}:]"] = parameter.detach()[rows:].cpu().clone()
    return extra


def _renamed(name: str, names: dict[str, str]) -> str:
    rows = ROWS.match(name)
    return f"{names[rows[1]]}[{rows[2]}:]" if rows else names[name]


def save_tensors(tensors: dict[str, torch.Tensor], names: dict[str, str], path: Path) -> None:
    """Write tensors under their published names, if there are any."""
    if tensors:
        renamed = {_renamed(name, names): tensor.contiguous() for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})


def load_tensors(path: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Read tensors that :func:`save_tensors` wrote, by their names in memory; empty without a file."""
    if not path.is_file():
        return {}
    in_memory = {published: name for name, published in names.items()}
    return {_renamed(name, in_memory): tensor for name, tensor in load_file(path).items()}


@torch.no_grad()
def lay_over(model: HFModule, tensors: dict[str, torch.Tensor], place: str) -> None:
    """Copy tensors (or rows, see :func:`extra_tensors`) into a model; all ranks call this.

    Raises:
        ValueError: the shapes differ.
    """
    state = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        rows = ROWS.match(name)
        parameter = state[rows[1] if rows else name]
        with placement_of(model).whole([parameter]):
            target = parameter.data[int(rows[2]) :] if rows else parameter.data
            if target.shape != tensor.shape:
                raise ValueError(
                    f"{place}: {name} has shape {tuple(tensor.shape)}, but this model needs {tuple(target.shape)}"
                )
            target.copy_(tensor)
