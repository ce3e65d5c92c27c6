"""The model that an adapter stands on: named with the hash of its weights, checked, and made again from that name.

``base.json`` names a checkpoint, or the language model and the tower that it was put together from.
``base_extra.safetensors`` holds what of the base is in none of them and is not trained: a projector that came from
elsewhere, rows of embeddings that were added for the image token.
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
    """What ``base.json`` says.

    Args:
        model: the keys of the YAML's ``model`` section that make the base.
        sha256: for each key that names weights, their hash, see :func:`weights_digest`.
        peft: the adapter's settings.
        trained: the parts that are trained, ``lora`` among them.
        dtype: that of training.
    """

    model: dict[str, Any]
    sha256: dict[str, str]
    peft: dict[str, Any]
    trained: list[str]
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig) -> Base:
        """The record of a base that is there.

        Raises:
            ValueError: its weights are not there.
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
        """The record of a base that is kept whole in ``folder``."""
        model = {"path": str(folder.resolve())}
        return cls(model, {"path": weights_digest(str(folder))}, **_how_it_is_trained(config))

    def trained_by(self, config: ModelConfig) -> Base:
        """The same base under another run's adapter."""
        return replace(self, **_how_it_is_trained(config))

    @classmethod
    def read(cls, folder: Path) -> Base:
        """The record in ``folder``; paths in it that are relative are so to the folder.

        Raises:
            ValueError: there is none that can be read.
        """
        try:
            found = json.loads((folder / RECORD).read_text())
            if found.pop("format") != FORMAT:
                raise ValueError("written by a newer version")
            base = cls(**found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / RECORD}, which names the base model, cannot be read ({error})") from error
        model = {
            key: os.path.normpath(folder / value) if isinstance(value, str) and value.startswith(".") else value
            for key, value in base.model.items()
        }
        return replace(base, model=model)

    def write(self, folder: Path) -> None:
        """Write the record; a base that is kept in the same run is named relative to ``folder``."""
        found = asdict(self) | {"format": FORMAT}
        run = folder.parent if folder.name == "base" else folder.resolve().parents[2]
        for key in self.sha256:
            source = Path(self.model[key])
            if source.is_dir() and source.resolve().is_relative_to(run.resolve()):
                relative = os.path.relpath(source.resolve(), folder.resolve())
                found["model"][key] = relative if relative.startswith(".") else f"./{relative}"
        (folder / RECORD).write_text(json.dumps(found, indent=1))

    def check(self, holder: str) -> None:
        """Compare hashes with what is there, for the adapter ``holder``.

        Raises:
            ValueError: the base is gone or another one, naming both.
        """
        for key, recorded in self.sha256.items():
            try:
                found = weights_digest(self.model[key])
            except ValueError as error:
                raise ValueError(
                    f"{holder} is an adapter, and its base model {self.model[key]} (SHA-256 {recorded}) is gone: "
                    f"{error}. Put it back, or a link to it"
                ) from error
            if found != recorded:
                raise ValueError(
                    f"{holder} is an adapter trained on {self.model[key]} with SHA-256 {recorded}, but the weights "
                    f"there have {found} now; put the original back"
                )

    def build(self, dtype: str, tokenizer: PreTrainedTokenizerBase, placement: Placement = WHOLE) -> HFModule:
        """The base in ``dtype``, without its extra tensors."""
        return build_model(ModelConfig(**self.model, dtype=dtype), tokenizer, placement)  # type: ignore[arg-type]


def _how_it_is_trained(config: ModelConfig) -> dict[str, Any]:
    assert config.peft is not None
    return {"peft": config.peft.model_dump(), "trained": sorted(config.train), "dtype": config.dtype}


def weights_digest(source: str) -> str:
    """SHA-256 of the weights of a folder or of a hub id in the cache: of the lines that
    ``LC_ALL=C sha256sum *.safetensors`` prints in its folder (``*.bin`` where there are none). Read once a process.

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
    """A model's weights files, by name.

    Raises:
        ValueError: there are none.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            found = cached_file(source, "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"no such folder, nor a model of the hub ({first_line(error)})") from error
        folder = Path(str(found)).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    return files


def published_names(model: HFModule) -> dict[str, str]:
    """Names of a plain model's tensors in published checkpoints, by their names in memory."""
    own = model.state_dict()
    name_of = {id(tensor): name for name, tensor in own.items()}
    saved = revert_weight_conversion(model, own)
    assert all(id(tensor) in name_of for tensor in saved.values()), "published tensors differ by more than their names"
    return {name_of[id(tensor)]: published for published, tensor in saved.items()}


def extra_tensors(model: HFModule, config: ModelConfig) -> dict[str, torch.Tensor]:
    """What of a base is in none of its sources and is not trained, on the CPU; rows that were added to a tensor are
    called ``name[first:]``."""
    found: dict[str, torch.Tensor] = {}
    _, loop = family_of_config(model.config)
    keeps_projector = "projector" not in config.train and (config.path is None or config.projector is not None)
    rows = load_model_config(config).text_config.vocab_size
    tables = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        if keeps_projector and name.startswith(loop.projector):
            with placement_of(model).whole([parameter]):
                found[name] = parameter.detach().cpu().clone()
        elif id(parameter) in tables and whole_shape(parameter)[0] > rows:
            with placement_of(model).whole([parameter]):
                found[f"{name}[{rows}:]"] = parameter.detach()[rows:].cpu().clone()
    return found


def _renamed(name: str, names: dict[str, str]) -> str:
    rows = ROWS.match(name)
    return f"{names[rows[1]]}[{rows[2]}:]" if rows else names[name]


def save_tensors(tensors: dict[str, torch.Tensor], names: dict[str, str], path: Path) -> None:
    """Write tensors under their published names; nothing where there are none."""
    if tensors:
        renamed = {_renamed(name, names): tensor.contiguous() for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})


def load_tensors(path: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """What :func:`save_tensors` wrote, under the names in memory; empty where there is no file."""
    if not path.is_file():
        return {}
    own = {published: name for name, published in names.items()}
    return {_renamed(name, own): tensor for name, tensor in load_file(path).items()}


@torch.no_grad()
def lay_over(model: HFModule, tensors: dict[str, torch.Tensor], place: str) -> None:
    """Copy tensors (or rows, see :func:`extra_tensors`) into a model; all ranks call this.

    Raises:
        ValueError: the shapes differ.
    """
    own = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        rows = ROWS.match(name)
        parameter = own[rows[1] if rows else name]
        with placement_of(model).whole([parameter]):
            target = parameter.data[int(rows[2]) :] if rows else parameter.data
            if target.shape != tensor.shape:
                raise ValueError(
                    f"{place}: {name} has shape {tuple(tensor.shape)}, but this model needs {tuple(target.shape)}"
                )
            target.copy_(tensor)
