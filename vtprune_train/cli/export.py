"""``vtprune export``: export the model of a checkpoint, or its projector, as safetensors in a chosen precision."""

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
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--part",
        choices=("model", "projector"),
        default="model",
        help="projector: only what stage 2 needs (model.projector)",
    )
    dtypes = [name for name in DTYPES if name != "auto"]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16; for a checkpoint without hf/, as trained")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="largest file, for example 500MB (default: 5GB)")
    parser.add_argument(
        "--merge", action="store_true", help="merge an adapter into its base model, so that PEFT is not needed"
    )
    parser.add_argument(
        "--keep_names", action="store_true", help="keep the tensor names used in memory instead of the published ones"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")


def run(arguments: argparse.Namespace) -> int:
    """Write the export."""
    shard_size = arguments.max_shard_size or "5GB"
    if not SHARD_SIZE.match(shard_size):
        raise ValueError(f"--max_shard_size={shard_size} is not a size such as 5GB or 500MB")
    checkpoint = newest_checkpoint(arguments.model)
    if checkpoint is not None and (checkpoint / UNEXPORTED).is_dir() and not (checkpoint / EXPORT).is_dir():
        return export_checkpoint(checkpoint, arguments)
    source, out = resolve_checkpoint(arguments.model), Path(arguments.out)
    check_export(source)
    check_target(out, source, arguments.force)
    if arguments.part == "model":
        check_merge(source, arguments.merge)
    elif arguments.merge:
        raise ValueError("--merge has no effect with --part projector; remove one of them")
    dtype: torch.dtype = DTYPES[arguments.dtype or "bfloat16"]  # type: ignore[assignment]
    if arguments.part == "projector":
        write = projector_writer(source, dtype, arguments.keep_names)
    else:
        write = model_writer(source, dtype, shard_size, arguments.keep_names)
    publish(out, write)
    log.info("wrote the %s to %s", arguments.part, out)
    return 0


def export_checkpoint(checkpoint: Path, arguments: argparse.Namespace) -> int:
    """Write the ``hf/`` folder that training did not save, from the checkpoint's files of all ranks, bitwise the same
    as training would have. Files are memory-mapped: one tensor is in memory at a time, and the model is not built."""
    from vtprune_train.training.checkpoint.portable import open_state
    from vtprune_train.training.engine.files import weight

    options = vars(arguments) | {"part": arguments.part == "projector"}
    if unsupported := [key for key in ("dtype", "max_shard_size", "part", "merge", "keep_names") if options[key]]:
        raise ValueError(
            f"{checkpoint} has no hf/: export it without --{unsupported[0]} first, then export the resulting folder "
            f"with --{unsupported[0]}"
        )
    kept, out = checkpoint / UNEXPORTED, Path(arguments.out)
    check_target(out, str(checkpoint), arguments.force)
    if wrong := verify(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Use an older step_XXXXXXXX of the run")
    plan, saved = Plan.load(kept), open_state(checkpoint)

    def write(folder: Path) -> None:
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PLAN))
        if is_adapter(kept):
            Base.read(kept).write(folder)  # the base may be named relative to the checkpoint
        write_weights(plan, folder, lambda stored: weight(saved, stored))

    publish(out, write)
    log.info("exported %s to %s", checkpoint, out)
    return 0


def check_merge(source: str, merge: bool) -> None:
    """Raise ``ValueError`` unless ``merge`` is set for an adapter and only for an adapter."""
    if is_adapter(source) and not merge:
        raise ValueError(
            f"{source} is an adapter; use --merge to merge it into its base model. The adapter itself is already in "
            "that folder in PEFT's format, so copy it from there"
        )
    if merge and not is_adapter(source):
        raise ValueError(f"--merge: {source} has no adapter; remove --merge")


def check_target(out: Path, source: str, force: bool) -> None:
    """Raise ``ValueError`` if ``out`` contains the model, or anything that ``force`` may not replace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; use a folder")
    inside = Path(source).resolve()
    if Path(source).is_dir() and (inside == out.resolve() or out.resolve() in inside.parents):
        raise ValueError(f"--out {out} contains the model to export; use another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(f"--out {out} is not empty; use another folder, or --force to replace the export in it")
    if not any(out.glob("*.safetensors")):
        raise ValueError(f"--out {out} is not empty and has no safetensors, so it is not an export; delete it yourself")


def publish(out: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary folder beside ``out``, then rename that to ``out``."""
    out = out.resolve()
    partial, replaced = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            log.warning("removing %s, left by an interrupted export", leftover)
            shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out {out}: the folder cannot be created ({error})") from error
    write(partial)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    if replaced.exists():
        shutil.rmtree(replaced)


def model_writer(source: str, dtype: torch.dtype, shard_size: str, keep_names: bool) -> Callable[[Path], None]:
    """A function that writes weights (with those of the pruning method), config with the pruning settings, generation
    config, and processor with its chat template."""
    config = model_config(source)
    processor = load_processor(source, config)
    # An adapter is merged in float32, so that it is rounded once.
    model = open_adapter(source, "float32", merge=True) if is_adapter(source) else load_weights(source, "auto")
    carry(model)
    for name, parameter in model.named_parameters():
        check_range(name, parameter, dtype)
    model.to(dtype)
    template = recorded_template(source, processor.tokenizer)
    if template is not None:
        stop_where_answers_end(model, processor.tokenizer, template)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not keep_names)
        processor.save_pretrained(folder)

    return write


def projector_writer(source: str, dtype: torch.dtype, keep_names: bool) -> Callable[[Path], None]:
    """A function that writes only the projector (for LLaVA-NeXT and OneVision with ``image_newline``), for
    ``model.projector``."""
    _, loop = trained_family(model_config(source).model_type, f"--part projector: {source}")
    if not Path(source).is_dir():
        raise ValueError(f"--part projector: {source} is not a folder on this machine; download the model first")
    keys = tuple(name.removeprefix("model.") for name in loop.projector)
    weights = read_projector(sorted(Path(source).glob("*.safetensors")), keys)
    if missing := [key for key in keys if not any(name.startswith(key) for name in weights)]:
        raise ValueError(f"--part projector: {source} has no {missing[0]} in its safetensors files")
    for name, tensor in weights.items():
        check_range(name, tensor, dtype)
    prefix = "model." if keep_names else ""
    tensors = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    return lambda folder: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_range(name: str, tensor: Any, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if the cast would overflow."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest, limit = float(tensor.detach().abs().amax()), torch.finfo(dtype).max
    if limit < largest < float("inf"):
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"--dtype {short}: {name} contains {largest:.3g}, which is above {limit:.3g}; use bfloat16")
