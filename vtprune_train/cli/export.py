"""``vtprune export``: a checkpoint's model, or its projector, as safetensors in the precision asked for."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vtprune_train.cli.options import add_model_option
from vtprune_train.evaluation.answering import (
    DTYPES,
    load_processor,
    load_weights,
    model_config,
    recorded_template,
    stop_where_answers_end,
)
from vtprune_train.models.families import trained_family
from vtprune_train.models.io.build import newest_checkpoint, read_projector, resolve_checkpoint
from vtprune_train.models.io.export import EXPORT, PLAN, UNEXPORTED, Plan, write_weights
from vtprune_train.models.io.method_parameters import carry
from vtprune_train.models.io.peft import is_adapter, open_adapter
from vtprune_train.models.io.provenance import Base
from vtprune_train.training.checkpoint.manifest import check_export, verify

log = logging.getLogger(__name__)

SHARD_SIZE = re.compile(r"^[1-9]\d*(\.\d+)?[KMG]i?B$", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="made here; written beside and renamed")
    parser.add_argument("--part", choices=("model", "projector"), default="model", help="projector: what stage 2 reads")
    dtypes = [name for name in DTYPES if name != "auto"]
    parser.add_argument("--dtype", choices=dtypes, help="bfloat16 if left out; of a checkpoint without hf/ as trained")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="of a file, for example 5GB (if left out) or 500MB")
    parser.add_argument(
        "--merge", action="store_true", help="fold an adapter into its base: a model that needs no PEFT"
    )
    parser.add_argument("--keep_names", action="store_true", help="tensors named as in memory, not as published ones")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the export."""
    shard_size = arguments.max_shard_size or "5GB"
    if not SHARD_SIZE.match(shard_size):
        raise ValueError(f"--max_shard_size={shard_size} is no size such as 5GB or 500MB")
    checkpoint = newest_checkpoint(arguments.model)
    if checkpoint is not None and (checkpoint / UNEXPORTED).is_dir() and not (checkpoint / EXPORT).is_dir():
        return export_checkpoint(checkpoint, arguments)
    source, out = resolve_checkpoint(arguments.model), Path(arguments.out)
    check_export(source)
    check_target(out, source, arguments.force)
    if arguments.part == "model":
        check_merge(source, arguments.merge)
    elif arguments.merge:
        raise ValueError("--merge has no effect with --part projector; leave one of them out")
    dtype: torch.dtype = DTYPES[arguments.dtype or "bfloat16"]  # type: ignore[assignment]
    if arguments.part == "projector":
        write = projector_writer(source, dtype, arguments.keep_names)
    else:
        write = model_writer(source, dtype, shard_size, arguments.keep_names)
    publish(out, write)
    log.info("%s is in %s", arguments.part, out)
    return 0


def export_checkpoint(checkpoint: Path, arguments: argparse.Namespace) -> int:
    """Write the ``hf/`` that training left out of a checkpoint, bit for bit, from the files of all ranks: mapped, one
    tensor in memory at a time, without the model."""
    from vtprune_train.training.checkpoint.portable import open_state
    from vtprune_train.training.engine.files import weight

    given = vars(arguments) | {"part": arguments.part == "projector"}
    if others := [key for key in ("dtype", "max_shard_size", "part", "merge", "keep_names") if given[key]]:
        raise ValueError(
            f"{checkpoint} holds no hf/: export it without --{others[0]} first, then export the folder that was made "
            f"with --{others[0]}"
        )
    kept, out = checkpoint / UNEXPORTED, Path(arguments.out)
    check_target(out, str(checkpoint), arguments.force)
    if wrong := verify(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Use an older step_XXXXXXXX of the run")
    plan, saved = Plan.load(kept), open_state(checkpoint)

    def write(folder: Path) -> None:
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PLAN))
        if is_adapter(kept):
            Base.read(kept).write(folder)  # its base may be named relative to the checkpoint
        write_weights(plan, folder, lambda stored: weight(saved, stored))

    publish(out, write)
    log.info("the export of %s is in %s", checkpoint, out)
    return 0


def check_merge(source: str, merge: bool) -> None:
    """An adapter is exported folded in only, and nothing else is folded in."""
    if is_adapter(source) and not merge:
        raise ValueError(
            f"{source} holds an adapter: --merge folds it into its base and writes a model that needs no PEFT. The "
            "adapter itself stands in that folder as PEFT reads it, to be copied from there"
        )
    if merge and not is_adapter(source):
        raise ValueError(f"--merge: {source} holds no adapter; leave --merge out")


def check_target(out: Path, source: str, force: bool) -> None:
    """Refuse to replace anything but, with ``force``, an export; and the model itself."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    inside = Path(source).resolve()
    if Path(source).is_dir() and (inside == out.resolve() or out.resolve() in inside.parents):
        raise ValueError(f"--out {out} holds the model that is exported; name another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(f"--out {out} is not empty; name another folder, or replace the export in it with --force")
    if not any(out.glob("*.safetensors")):
        raise ValueError(f"--out {out} is not empty and no export (it has no safetensors); remove it yourself")


def publish(out: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``out`` that then takes its place."""
    out = out.resolve()
    partial, replaced = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            log.warning("removing %s, left by an interrupted export", leftover)
            shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out {out}: no folder can be made there ({error})") from error
    write(partial)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    if replaced.exists():
        shutil.rmtree(replaced)


def model_writer(source: str, dtype: torch.dtype, shard_size: str, keep_names: bool) -> Callable[[Path], None]:
    """Writes weights (those of the pruning method too), config with the pruning settings, generation config, and
    processor with its chat template."""
    config = model_config(source)
    processor = load_processor(source, config)
    # An adapter is folded in with full precision, and rounded once.
    model = open_adapter(source, "float32", merge=True) if is_adapter(source) else load_weights(source, "auto")
    carry(model)
    for name, parameter in model.named_parameters():
        check_range(name, parameter, dtype)
    model.to(dtype)
    template = recorded_template(source)
    if template is not None:
        stop_where_answers_end(model, processor.tokenizer, template)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not keep_names)
        processor.save_pretrained(folder)

    return write


def projector_writer(source: str, dtype: torch.dtype, keep_names: bool) -> Callable[[Path], None]:
    """Writes the projector alone (of LLaVA-NeXT and OneVision with ``image_newline``), as ``model.projector`` of a
    training config reads it."""
    _, loop = trained_family(model_config(source).model_type, f"--part projector: {source}")
    if not Path(source).is_dir():
        raise ValueError(f"--part projector: {source} is not a folder on this machine; download the model first")
    keys = tuple(name.removeprefix("model.") for name in loop.projector)
    found = read_projector(sorted(Path(source).glob("*.safetensors")), keys)
    if missing := [key for key in keys if not any(name.startswith(key) for name in found)]:
        raise ValueError(f"--part projector: {source} holds no {missing[0]} in safetensors files")
    for name, tensor in found.items():
        check_range(name, tensor, dtype)
    prefix = "model." if keep_names else ""
    tensors = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in found.items()}
    return lambda folder: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_range(name: str, tensor: Any, dtype: torch.dtype) -> None:
    """Refuse a cast that would make infinities."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest, limit = float(tensor.detach().abs().amax()), torch.finfo(dtype).max
    if limit < largest < float("inf"):
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"--dtype {short}: {name} holds {largest:.3g}, above {limit:.3g}; use bfloat16")
