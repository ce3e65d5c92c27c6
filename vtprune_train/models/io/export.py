"""Plans the files of an export without its weights, and writes the weights one tensor at a time.

An export consists of small files (configs, tokenizer, processor) and safetensors files. A :class:`Plan` maps each
tensor to its file and its published name. The weights may then come from memory, or later from the files of a
checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vtprune_train.files.disk import naming
from vtprune_train.models import HFModule
from vtprune_train.models.io.placement import whole_shape

EXPORT = "hf"  # folder in a checkpoint
UNEXPORTED = "export"  # folder in a checkpoint without an export: an export without its weights
PLAN = "weights.json"
INDEX = "model.safetensors.index.json"
FILE_SIZE = "5GB"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of an export: its name in the model, dtype and shape."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Plan:
    """The safetensors files of an export with their tensors by published name, and the index if there are several
    files."""

    files: dict[str, dict[str, Stored]]
    index: dict[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for tensors in self.files.values() for stored in tensors.values())

    def save(self, folder: Path) -> None:
        (folder / PLAN).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: the file is missing or cannot be read.
        """
        try:
            content = json.loads((folder / PLAN).read_text())
            files = {
                file: {name: Stored(**stored) for name, stored in tensors.items()}
                for file, tensors in content["files"].items()
            }
            if outside := sorted(name for name in files if Path(name).name != name):
                raise ValueError(f"it names {outside[0]}, which is not a plain file name")
            return cls(files, content["index"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / PLAN} cannot be read ({error})") from error


def stored(name: str, tensor: torch.Tensor) -> Stored:
    """The entry of a model's tensor in a plan."""
    return Stored(name, str(tensor.dtype).removeprefix("torch."), list(whole_shape(tensor)))


def plan_of(model: HFModule) -> Plan:
    """Plan the same files as ``save_pretrained``, each of at most ``FILE_SIZE`` (or with one tensor)."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    empty = {name: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for name, t in state.items()}
    empty = remove_tied_weights_from_state_dict(empty, model)
    name_of = {id(tensor): name for name, tensor in empty.items()}
    published = revert_weight_conversion(model, empty)
    assert all(id(tensor) in name_of for tensor in published.values()), "published tensors are not just renamed"
    split = split_torch_state_dict_into_shards(
        published, filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_SIZE
    )
    files: dict[str, dict[str, Stored]] = {}
    for file, names in split.filename_to_tensors.items():
        in_memory = {name: name_of[id(published[name])] for name in names}
        files[file] = {name: stored(first.get(id(state[m]), m), state[m]) for name, m in in_memory.items()}
    if not split.is_sharded:
        return Plan(files)
    total = sum(whole_shape(parameter).numel() for parameter in model.parameters())
    return Plan(
        files, {"metadata": {"total_parameters": total, **split.metadata}, "weight_map": split.tensor_to_filename}
    )


def write_weights(plan: Plan, folder: Path, read: Callable[[Stored], torch.Tensor]) -> None:
    """Write the safetensors files of an export into an existing folder, with one tensor in memory at a time."""
    for file, tensors in plan.files.items():
        write_tensors(folder / file, tensors, read)
    if plan.index is not None:
        (folder / INDEX).write_text(json.dumps(plan.index, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Stored], read: Callable[[Stored], torch.Tensor]) -> None:
    """Write the same file as ``safetensors.torch.save_file``, tensor by tensor: the length of the header in 8 bytes,
    the header (JSON, padded to a multiple of 8), and the tensors, in descending order of element size."""
    order = sorted(tensors, key=lambda name: (-getattr(torch, tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = tensors[name]
        header[name] = {
            "dtype": DTYPES[getattr(torch, entry.dtype)],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = read(tensors[name]).detach().cpu().contiguous()
            assert stored(tensors[name].name, tensor) == tensors[name], f"{name} differs from the plan"
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
