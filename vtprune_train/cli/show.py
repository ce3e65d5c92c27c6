"""``vtprune show``: draw which visual tokens of an image are kept in each stage, for a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from vtprune_train.cli.options import (
    METHOD_HELP,
    add_set_option,
    add_trust_option,
    changed,
    named_method,
    numbers,
    set_values,
)
from vtprune_train.evaluation.answering import load, model_config, open_image
from vtprune_train.models.families import supported_family
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.patch import is_pruned, prune
from vtprune_train.pruning import CONFIG_KEY, PruningMethod, method_class, method_from_settings, saved_settings
from vtprune_train.viz.draw import draw
from vtprune_train.viz.page import page
from vtprune_train.viz.show import encode, look, stage_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", required=True, help="a run, one of its checkpoints, a Hugging Face model folder, or a Hub id"
    )
    add_trust_option(parser)
    parser.add_argument("--image", required=True, nargs="+", action="extend", type=Path, help="one or more image files")
    parser.add_argument("--prompt", required=True, help="the question about the images")
    parser.add_argument("--out", required=True, type=Path, help="image file to write (.png, .jpg, ...)")
    parser.add_argument("--html", type=Path, help="also write an HTML page with a slider over the stages")
    parser.add_argument("--method", help=f"{METHOD_HELP} (default: the saved settings)")
    add_set_option(parser)
    parser.add_argument("--layers", type=numbers(int, "8,16,24"), help="drop before these layers, for example 8,16,24")
    parser.add_argument("--keep", type=numbers(float, "0.5,0.25"), help="keep ratios, for example 0.5,0.25")


def run(arguments: argparse.Namespace) -> int:
    """Check the options, load the model, write the files."""
    disable_progress_bar()
    for path in (arguments.out, arguments.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    if Image.registered_extensions().get(arguments.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {arguments.out}: unknown image format {arguments.out.suffix!r}; use .png")
    files = [open_image(path) for path in arguments.image]
    config = model_config(resolve_checkpoint(arguments.model))
    supported_family(config.model_type, f"--model {arguments.model}: it")
    loaded = load(arguments.model, _method(config, arguments))
    model, processor = loaded.model if is_pruned(loaded.model) else prune(loaded.model, None), loaded.processor
    inputs = encode(processor, files, arguments.prompt, model.device)
    images, stages = look(model, processor.image_processor, inputs, files), stage_names(model)
    draw(images, stages, arguments.prompt).save(arguments.out)
    counts = [sum(len(image.kept[stage]) for image in images) for stage in range(len(stages))]
    print(f"wrote {arguments.out}: {counts[0]} visual tokens, kept by stage: {', '.join(map(str, counts[1:]))}")
    if arguments.html is not None:
        arguments.html.write_text(page(images, stages, arguments.prompt), encoding="utf-8")
    return 0


def _method(config: PreTrainedConfig, arguments: argparse.Namespace) -> PruningMethod | None:
    """The settings of the checkpoint, changed by the options."""
    options = {key: value for key in ("layers", "keep") if (value := getattr(arguments, key)) is not None}
    options.update(set_values(arguments.set))
    recorded = (getattr(config, CONFIG_KEY, None) or {}).get("method")
    if arguments.method is not None and arguments.method == recorded:
        method_class(recorded)  # named by the user, so its code may run
    named = arguments.method not in (None, recorded)
    settings: dict[str, Any] = named_method(arguments.method) if named else saved_settings(config) or {}
    if "method" not in settings:
        raise ValueError(
            f"--model {arguments.model}: it has no saved pruning settings; set a method, for example "
            "--method pyramiddrop --layers 8,16,24 --keep 0.5,0.25,0.125"
        )
    return method_from_settings(changed(settings, options))
